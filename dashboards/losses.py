"""Predicted losses of layers, and what their bytes buy: the terms of the study's own knapsack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoq.assignment import Assignment
from autoq.scheme import parse_scheme

if TYPE_CHECKING:
    from autoq.layer import Layer

    from .figures import Facts

KEEP = "keep"


def loss_unit(facts: Facts) -> str:
    """What predicted losses are in: KL in nats per token, for an encoder without a head cosine distance."""
    names = [objective.name for objective in facts.study.objectives]
    return "1-cos" if "cosine_distance" in names else "nats/token"


def loss_of(losses: Mapping[str, float] | None, scheme: str) -> float | None:
    """The predicted loss of a layer under a scheme; none where it stays as it is, None where nothing was predicted."""
    return 0.0 if scheme == KEEP else None if losses is None else losses.get(scheme)


def lightest(facts: Facts) -> str:
    """Of the schemes that most layers have the one of fewest bytes; without shapes the one that loses most. `keep`,
    which loses nothing, only where there is no other."""
    losses, layers = facts.sensitivity, facts.layers
    counts = Counter(scheme for own in losses.values() for scheme in own)
    if len(counts) > 1:
        del counts[KEEP]
    most = max(counts.values())

    def weight(scheme: str) -> tuple[float, float, str]:
        own = [name for name in losses if scheme in losses[name]]
        size = sum(layers[name].nbytes(parse_scheme(scheme)) for name in own if name in layers)
        return size, -sum(losses[name][scheme] for name in own), scheme

    return min((scheme for scheme, count in counts.items() if count == most), key=weight)


@dataclass(frozen=True)
class Step:
    """One layer's exchange of one scheme for a heavier one: bytes that it costs, predicted loss that it avoids."""

    layer: str
    lighter: str
    heavier: str
    nbytes: int
    avoided: float

    @property
    def rate(self) -> float:
        """Loss avoided per MB."""
        return 1e6 * self.avoided / self.nbytes


@dataclass(frozen=True)
class Choice:
    """A layer in an assignment: what its last bytes have bought, what more would; None where there is no step."""

    layer: str
    scheme: str
    paid: Step | None
    offered: Step | None


def choices(
    assignment: Assignment, layers: Mapping[str, Layer], losses: Mapping[str, Mapping[str, float]]
) -> list[Choice]:
    """Each layer whose losses and shape are known, with its neighbours on the lower hull of bytes against loss.

    `keep` is among the neighbours: it loses nothing. What an exact solution of the knapsack would trade next lies on
    that hull; a scheme above it is never worth its bytes.
    """
    found = []
    for name in assignment:
        layer, own = layers.get(name), losses.get(name)
        scheme = str(assignment[name])
        current = loss_of(own, scheme)
        if layer is None or own is None or current is None:
            continue
        options = {(layer.nbytes(parse_scheme(text)), loss, text) for text, loss in [*own.items(), (KEEP, 0.0)]}
        here = (layer.nbytes(assignment[name]), current, scheme)
        lighter = [o for o in options if o[0] < here[0] and o[1] > here[1]]
        heavier = [o for o in options if o[0] > here[0] and o[1] < here[1]]
        # The next corner of the hull: least loss avoided per byte on the way down, most on the way up.
        down = min(lighter, key=lambda o: (_rate(o, here), o), default=None)
        up = max(heavier, key=lambda o: (_rate(here, o), o), default=None)
        found.append(
            Choice(
                name,
                scheme,
                None if down is None else Step(name, down[2], scheme, here[0] - down[0], down[1] - here[1]),
                None if up is None else Step(name, scheme, up[2], up[0] - here[0], here[1] - up[1]),
            )
        )
    return found


def _rate(lighter: tuple[int, float, str], heavier: tuple[int, float, str]) -> float:
    return (lighter[1] - heavier[1]) / (heavier[0] - lighter[0])
