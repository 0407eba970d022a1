"""Designs of experiment for latency tables: which whole models to time, and what their times tell.

`leaders` has a model for each kernel, which runs every layer that it can. What a layer takes in place, in
company of its own, leaves out what its kernel does to all that runs beside it: lighter weights leave attention
and norms more of the caches. `around` finds that from the models as wholes. For runtimes that time only
parts there is `deals`: layers of one kind (alike in shape and in the kernels that may run them) get a kind's
kernels in turn, as in a Latin square, so over the models each kind meets each of its kernels, the unquantized one
too, equally often and in mixed company.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np

from autoq.layer import Layer
from autoq.methods import QuantizedWeight
from autoq.models.loaded import LoadedModel

K = TypeVar("K", bound=Hashable)
LEAST_MODELS = 3
# Standard deviations of `around`: of a whole model's latency, of a and of e.
_NOISE, _COMMON, _APART = 0.01, 1.0, 0.15


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


def leaders(among: Sequence[Kind[K]]) -> list[dict[str, tuple[K, QuantizedWeight | None]]]:
    """One layer -> (kernel, weight) mapping for each quantized kernel: a model in which it runs every layer that it
    can. Layers that it cannot run take their own kernels in turn, and stay unquantized where they have none.

    Where there is no quantized kernel at all, the one model is the unquantized.
    """
    dealt: list[dict[str, tuple[K, QuantizedWeight | None]]] = []
    leading = _quantized(among)
    for number in range(max(1, len(leading))):
        deal: dict[str, tuple[K, QuantizedWeight | None]] = {}
        for kind in among:
            own = kind.kernels[1:]
            for index, layer in enumerate(kind.layers):
                if not own:
                    deal[layer.name] = (kind.kernels[0], None)
                    continue
                kernel = leading[number] if leading[number] in own else own[(index + number) % len(own)]
                deal[layer.name] = (kernel, kind.weights[kernel][index])
        dealt.append(deal)
    return dealt


def around(
    among: Sequence[Kind[K]],
    dealt: Sequence[Mapping[str, tuple[K, Any]]],
    spent: Mapping[tuple[int, K], float],
    whole: Sequence[float],
    unquantized: float,
) -> dict[K, float]:
    """Quantized kernel -> what a layer under it adds to (or, negative, takes off) all that runs beside it, as a share
    of the layer's own unquantized time.

    `spent` has the milliseconds of a layer by (index of its kind, kernel), `whole` those of each of the `dealt`
    models, `unquantized` those of the model as it is. For u a layer's unquantized milliseconds, all in units of
    `unquantized`,

        whole - 1 - Σ_layers (spent - u) = Σ_layers u (a + e_kernel) + noise

    by least squares with e shrunk towards 0: where the models tell kernels apart badly, these have one share, a.
    """
    kernels = _quantized(among)
    kind_of = {layer.name: index for index, kind in enumerate(among) for layer in kind.layers}
    matrix, observed = np.zeros((len(dealt), 1 + len(kernels))), np.zeros(len(dealt))
    for row, (deal, total) in enumerate(zip(dealt, whole, strict=True)):
        observed[row] = total / unquantized - 1
        for name, (kernel, _) in deal.items():
            index = kind_of[name]
            own = spent[index, among[index].kernels[0]] / unquantized
            if kernel in kernels:
                matrix[row, [0, 1 + kernels.index(kernel)]] += own
                observed[row] -= spent[index, kernel] / unquantized - own
    prior = np.diag([_NOISE / _COMMON, *[_NOISE / _APART] * len(kernels)])
    rows, values = np.vstack([matrix, prior]), np.concatenate([observed, np.zeros(len(prior))])
    common, *apart = np.linalg.lstsq(rows, values, rcond=None)[0]
    return {kernel: float(common + share) for kernel, share in zip(kernels, apart, strict=True)}


def _quantized(among: Sequence[Kind[K]]) -> list[K]:
    return sorted({kernel for kind in among for kernel in kind.kernels[1:]}, key=str)
