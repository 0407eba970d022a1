"""What is known of a study before its first trial, in the terms of a sampler: parameters and choices.

Sizes are sums over layers, exactly; so are predicted latencies and estimated energies. Of quality there
is a prediction per layer and choice. Samplers that use none of it are free to ignore it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


@dataclass(frozen=True)
class Additive:
    """A quantity that is `constant` plus one entry of `parts` per parameter, exactly.

    `parts[name]` has one entry per choice. A study's bounds on the quantity are `low` and `high`.
    """

    constant: float
    parts: Mapping[str, Vector]
    low: float = -np.inf
    high: float = np.inf

    def of(self, choices: Mapping[str, int]) -> float:
        """The value under one choice index per parameter."""
        return self.constant + float(sum(part[choices[name]] for name, part in self.parts.items()))


@dataclass(frozen=True)
class Prior:
    """What is known beforehand; everything may be missing.

    `losses[name]` is the predicted loss of quality of each choice of a parameter when all others keep
    their weights: a sum over parameters predicts a whole assignment to first order. `additive` maps an
    objective's place among the study's objectives to its table; objectives without one are learned from
    trials, and `learned` are their bounds (low, high). `limits` are bounded quantities that are no objectives.
    """

    losses: Mapping[str, Vector] = field(default_factory=dict)
    additive: Mapping[int, Additive] = field(default_factory=dict)
    limits: Sequence[Additive] = ()
    learned: Mapping[int, tuple[float, float]] = field(default_factory=dict)
