"""The parameters of a search as arrays: what each is predicted to lose, its kind and its depth."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

_DEGREES = 4  # of the polynomials in depth


@dataclass(frozen=True, eq=False)
class Layers:
    """The parameters as arrays: predicted `loss` (n, choices), +inf beyond a parameter's last choice.

    `known` tells whether losses were predicted from the model or only assumed.
    """

    names: tuple[str, ...]
    loss: Floats
    known: bool = True

    @cached_property
    def counts(self) -> Indices:
        """Choices of each parameter (n,)."""
        counts: Indices = np.isfinite(self.loss).sum(1)
        return counts

    @cached_property
    def kinds(self) -> Indices:
        """Which parameters are of one kind (n,), by their names without numbers: 0, 1, …"""
        _, kinds = np.unique([re.sub(r"\d+", "*", name) for name in self.names], return_inverse=True)
        return kinds.astype(np.int64)

    @cached_property
    def basis(self) -> Floats:
        """What a parameter's factor depends on beside itself (n, features): its kind and its depth."""
        kinds = [re.sub(r"\d+", "*", name) for name in self.names]
        shared = sorted(kind for kind, count in Counter(kinds).items() if count > 1)
        columns = [np.array([float(kind == other) for kind in kinds]) for other in shared]
        numbers = [re.search(r"\d+", name) for name in self.names]
        # A head or an embedding has no number, and no depth among those that have one.
        placed = np.array([number is not None for number in numbers])
        if shared and placed.any():
            depth = np.array([float(found.group()) for found in numbers if found])
            if np.ptp(depth) > 0:
                place = 2 * (depth - depth.min()) / np.ptp(depth) - 1
                for degree in range(1, _DEGREES + 1):
                    columns.append(np.zeros(len(self.names)))
                    columns[-1][placed] = np.polynomial.Legendre.basis(degree)(place)
        return np.stack(columns, 1) if columns else np.zeros((len(self.names), 0))

    @cached_property
    def least(self) -> float:
        """The least loss of a choice that is not 0: what a sum that is less is taken for."""
        positive = self.loss[np.isfinite(self.loss) & (self.loss > 0)]
        return float(positive.min()) if positive.size else 1.0

    def pick(self, table: Floats, choices: Indices) -> Floats:
        """Entries of a table (n, choices) under assignments (…, n): (…, n)."""
        picked: Floats = table[np.arange(len(table)), choices]
        return picked
