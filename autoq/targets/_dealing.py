"""A design of experiment for latency tables: whole models in which all kernels are dealt out in mixed company.

Layers of one kind (alike in shape and in the kernels that may run them) get a kind's kernels in turn, as in a
Latin square: over the models each kind meets each of its kernels equally often, among neighbours of all sorts.
That is what the assignments of a search look like, and what a layer timed alone or among its own does not
tell.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from autoq.layer import Layer
from autoq.methods import QuantizedWeight
from autoq.models.loaded import LoadedModel

K = TypeVar("K", bound=Hashable)
LEAST_MODELS = 3


@dataclass(frozen=True)
class Kind(Generic[K]):
    """Layers that cost the same under the same kernel.

    `kernels` begins with the one that runs the unquantized layer; `weights` has for each of the others a
    quantized weight per layer, in the order of `layers`.
    """

    layers: tuple[Layer, ...]
    kernels: tuple[K, ...]
    weights: Mapping[K, Sequence[QuantizedWeight]]


def kinds(
    model: LoadedModel,
    choices: Mapping[str, Sequence[QuantizedWeight]],
    kernel_of: Callable[[Layer, QuantizedWeight], K],
    unquantized: K,
    place: Callable[[str], str] = lambda _: "",
) -> list[Kind[K]]:
    """The layers of `choices` by kind. Schemes that share a kernel are one; `place` maps a layer's name to what
    else must be equal."""
    members: dict[tuple[Any, ...], list[tuple[Layer, dict[K, QuantizedWeight]]]] = {}
    for name, weights in choices.items():
        layer = model.info.layer(name)
        first: dict[K, QuantizedWeight] = {}
        for weight in weights:
            first.setdefault(kernel_of(layer, weight), weight)
        first.pop(unquantized, None)
        key = (place(name), layer.kind, layer.out_features, layer.in_features, layer.has_bias, frozenset(first))
        members.setdefault(key, []).append((layer, first))
    found = []
    for group in members.values():
        kernels = (unquantized, *sorted(group[0][1], key=str))
        quantized = {kernel: [first[kernel] for _, first in group] for kernel in kernels[1:]}
        found.append(Kind(tuple(layer for layer, _ in group), kernels, quantized))
    return found


def deals(among: Sequence[Kind[K]]) -> list[dict[str, tuple[K, QuantizedWeight | None]]]:
    """One layer -> (kernel, weight) mapping per model to time; no weight for an unquantized layer."""
    models = max([LEAST_MODELS, *(math.ceil(len(kind.kernels) / len(kind.layers)) for kind in among)])
    dealt: list[dict[str, tuple[K, QuantizedWeight | None]]] = [{} for _ in range(models)]
    shuffle = random.Random(0)  # noqa: S311 - a design of experiment, not a secret
    for kind in among:
        order = list(range(len(kind.layers)))
        # In order, the layers of one block would all get the same kernel.
        shuffle.shuffle(order)
        for number, deal in enumerate(dealt):
            for position, index in enumerate(order):
                # Models advance by as many kernels as there are layers, so few layers still meet all.
                turn = (position + number * len(order)) % len(kind.kernels)
                kernel = kind.kernels[turn]
                deal[kind.layers[index].name] = (kernel, kind.weights[kernel][index] if turn else None)
    return dealt
