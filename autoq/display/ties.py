"""Ties: frontier points that are no better than another one, beyond noise. For display; the frontier stays exact.

A point has an advantage over another where it is better in something by more than noise. Where it has none, it
might as well not be on the frontier.

Quality is compared in pairs, token by token on the same text. What a text does to all assignments alike
cancels out, so far smaller differences show than from the two standard errors. Neighbouring tokens share
their context, so the error is that of means over blocks of tokens (Flegal & Jones 2010, "Batch means and
spectral variance estimators in Markov chain Monte Carlo"). Latencies, and qualities whose values per token
are not stored, are compared by their two standard errors. What was predicted and has no error counts from
a difference of 1 %, what was computed exactly from any.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from autoq.measurement import Measurement, Part

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from autoq.store import Store, StudyObjective, StudyRecord, TrialRecord

    Blocks = tuple[NDArray[np.float64], NDArray[np.int64]]  # sums and counts (blocks,)

ERRORS = 2.0  # standard errors of a difference that could be chance
PREDICTED = 0.01  # relative difference of predictions that means nothing
TokenValues = Callable[[int, str, Part], "NDArray[np.float32] | None"]  # trial number, objective, part


def ties(
    trials: Sequence[TrialRecord], objectives: Sequence[StudyObjective], values: TokenValues
) -> dict[int, list[int]]:
    """Trial number -> the numbers of those that it has no advantage over, in the order given; all trials are keys.

    `values` gives a trial's values (windows, tokens) behind a measurement, where they are stored.
    """
    judge = _Judge(objectives, values)
    return {
        one.number: [other.number for other in trials if other is not one and not judge.ahead(one, other)]
        for one in trials
    }


def stored_ties(store: Store, study: StudyRecord, trials: Sequence[TrialRecord]) -> dict[int, list[int]]:
    """`ties` of trials of a study, by the values that `store` has."""
    return ties(trials, study.objectives, lambda number, name, part: store.token_values(study.id, number, name, part))


class KnownTies:
    """The ties of one frontier as it grows: only what is new is compared, and values per token are read once.

    A trial is the same one as long as its number and its last change are.
    """

    def __init__(self) -> None:
        self._judge: _Judge | None = None
        self._seen: dict[int, int] = {}  # number -> its last change
        self._tied: dict[int, set[int]] = {}

    def update(
        self, trials: Sequence[TrialRecord], objectives: Sequence[StudyObjective], values: TokenValues
    ) -> dict[int, list[int]]:
        """As `ties`, for the frontier as it is now."""
        if self._judge is None:
            self._judge = _Judge(objectives, values)
        self._judge.values = values
        fresh = [trial for trial in trials if self._seen.get(trial.number) != trial.changed]
        self._judge.forget({trial.number for trial in fresh})
        new = {trial.number for trial in fresh}
        kept = {trial.number for trial in trials} - new
        tied = {number: (self._tied[number] & kept) if number in kept else set() for number in kept | new}
        for one in trials:
            others = trials if one.number in new else fresh
            tied[one.number] |= {
                other.number for other in others if other is not one and not self._judge.ahead(one, other)
            }
        self._seen = {trial.number: trial.changed for trial in trials}
        self._tied = tied
        return {one.number: [other.number for other in trials if other.number in tied[one.number]] for one in trials}


class _Judge:
    """Compares trials; reads the values per token of each once, as sums over blocks."""

    def __init__(self, objectives: Sequence[StudyObjective], values: TokenValues) -> None:
        self.objectives, self.values = objectives, values
        self._blocks: dict[tuple[int, str, Part], Blocks | None] = {}

    def forget(self, numbers: set[int]) -> None:
        """Read the values of these trials again: they have changed."""
        self._blocks = {key: blocks for key, blocks in self._blocks.items() if key[0] not in numbers}

    def ahead(self, one: TrialRecord, other: TrialRecord) -> bool:
        """Whether `one` is better than `other` in some objective by more than noise."""
        return any(self._better(objective, one, other) for objective in self.objectives)

    def _better(self, objective: StudyObjective, one: TrialRecord, other: TrialRecord) -> bool:
        pair = _comparable(objective.name, one, other)
        if pair is None:
            return True  # nothing says that they are alike
        a, b = pair
        gain = b.value - a.value if objective.direction == "minimize" else a.value - b.value
        if gain <= 0:
            return False
        paired = self._paired(objective.name, a.part, one.number, other.number)
        if paired is not None:
            # Objectives are monotone in the mean over tokens, so it decides for them.
            difference, error = paired
            return abs(difference) > ERRORS * error
        if a.stderr is not None or b.stderr is not None:
            return gain > ERRORS * math.hypot(a.stderr or 0.0, b.stderr or 0.0)
        return gain > PREDICTED * max(abs(a.value), abs(b.value)) if a.kind == "predicted" else True

    def _paired(self, name: str, part: Part, one: int, other: int) -> tuple[float, float] | None:
        """Mean difference over tokens and its standard error; None without values of both on the same tokens."""
        a, b = self._sums(one, name, part), self._sums(other, name, part)
        if a is None or b is None or a[1].shape != b[1].shape or (a[1] != b[1]).any() or not len(a[1]):
            return None
        from autoq.statistics import error_of_mean

        return error_of_mean(a[0] - b[0], a[1])

    def _sums(self, number: int, name: str, part: Part) -> Blocks | None:
        key = (number, name, part)
        if key not in self._blocks:
            from autoq.statistics import block_sums

            values = self.values(*key)
            self._blocks[key] = None if values is None else block_sums(values)
        return self._blocks[key]


def _comparable(name: str, one: TrialRecord, other: TrialRecord) -> tuple[Measurement, Measurement] | None:
    """Two measurements of one objective that may stand against each other, reported ones before searched."""
    parts: tuple[Part, Part] = ("report", "search")
    for part in parts:
        a, b = one.measurements.get((name, part)), other.measurements.get((name, part))
        if a is not None and b is not None and a.kind == b.kind:
            return a, b
    return None
