"""Whom candidates of a running study are held against: `autoq.search.stopping.choose`, kept up as trials are told.

Trials are told in the order of their numbers. Of those told, most can never be chosen again: a trial that is nowhere
better than another one in what is computed, and no better in the first quality, is not the best of any set that it is
in. So only those on that frontier are kept, and a choice costs the frontier's length, not the study's. What is
dropped was never chosen by `choose` over all: a test holds one against the other.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autoq.objectives import can_be_compared
from autoq.search.setup import Problem
from autoq.search.stopping import Finished, choose
from autoq.statistics import Rival
from autoq.store import Store

KEPT_VALUES = 64  # rivals whose values per token stay in memory: 8 kB each for 2,048 tokens


class Rivals:
    """The rivals of one study. `tell` and `choose` go on in the order of numbers."""

    def __init__(self, problem: Problem, store: Store, study_id: int) -> None:
        self._names = problem.spec.objectives
        self._qualities = problem.qualities
        self._directions = [problem.objectives[name].direction for name in self._names]
        self._confidence = problem.spec.budget.stop_confidence
        # What only bounds what is feasible is left out: who beats whom is a matter of the objectives.
        self._compared = [name for name in self._qualities if name in self._names]
        able = bool(self._compared) and can_be_compared([problem.objectives[name] for name in self._compared])
        self.wanted = self._confidence is not None and able
        self._first = next((i for i, name in enumerate(self._names) if name in self._qualities), 0)
        self._kept: list[tuple[tuple[float, ...], Finished]] = []  # with its costs
        self._told = 0

        @functools.lru_cache(maxsize=KEPT_VALUES)
        def values(number: int, name: str) -> NDArray[np.float32] | None:
            return store.token_values(study_id, number, name, "search")

        self._values = values

    @property
    def told(self) -> int:
        """The number that `tell` gets next."""
        return self._told

    def tell(self, values: Sequence[float] | None) -> None:
        """The next trial's values, which begin with those of the study's objectives; None for what is no rival."""
        number = self._told
        self._told += 1
        if values is None or not self.wanted:
            return
        new = self._costs(values)
        # Of equals the earliest is chosen, and this one is the latest.
        if any(_nowhere_worse(costs, new) for costs, _ in self._kept):
            return
        self._kept = [kept for kept in self._kept if not (new[0] < kept[0][0] and _nowhere_worse(new, kept[0]))]
        self._kept.append((new, Finished(number, values)))

    def _costs(self, values: Sequence[float]) -> tuple[float, ...]:
        """The first quality, and what is computed; less is better."""
        signed = [value if d == "minimize" else -value for value, d in zip(values, self._directions, strict=False)]
        return (
            signed[self._first],
            *(v for v, name in zip(signed, self._names, strict=True) if name not in self._qualities),
        )

    def number(self, known: Mapping[str, float]) -> int | None:
        """Of the trials told, the rival of a candidate with these computed values."""
        if not self.wanted:
            return None
        return choose([finished for _, finished in self._kept], self._names, self._directions, self._qualities, known)

    def rival(self, number: int | None) -> Rival | None:
        """What an evaluator is given; None where there is no such trial, or it has no values."""
        if number is None or self._confidence is None:
            return None
        values = {}
        for name in self._compared:
            found = self._values(number, name)
            if found is None:
                return None
            values[name] = found
        return Rival(number, values, self._confidence)


def _nowhere_worse(a: Sequence[float], b: Sequence[float]) -> bool:
    return all(x <= y for x, y in zip(a, b, strict=True))
