"""Whom a candidate is held against while it is evaluated: early stopping by paired differences.

A candidate's size, predicted latency and estimated energy are known before it is evaluated. A finished
trial that is at least as good in all of them beats the candidate as soon as the candidate's quality is
worse, and that is known long before all tokens are evaluated: on the same tokens two assignments' losses
move together (racing: Maron & Moore 1994; Birattari et al. 2002). The same holds of labelled examples, where
an objective is a mean over them. The evaluator compares, see
`autoq.statistics.Rival`; who is compared is chosen here, from trials that were told to the sampler only,
so that it depends neither on which worker was faster nor on interruptions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from autoq.measurement import Measurement


class Finished(NamedTuple):
    """A trial that may be a rival: complete, feasible; its values begin with those of the study's objectives."""

    number: int
    values: Sequence[float]


def choose(
    finished: Sequence[Finished],
    names: Sequence[str],
    directions: Sequence[str],
    qualities: Sequence[str],
    known: Mapping[str, float],
) -> int | None:
    """The number of the rival: of trials nowhere worse than `known` in the computed objectives the best in the
    first of the `qualities`, the earliest of equals; None where there is none.

    `names` and `directions` are the study's objectives. `known` are the candidate's computed values.
    """
    signs = [1.0 if direction == "minimize" else -1.0 for direction in directions]
    computed = [(i, signs[i] * known[name]) for i, name in enumerate(names) if name not in qualities]
    first = next((i for i, name in enumerate(names) if name in qualities), None)
    if first is None:
        return None
    able = [trial for trial in finished if all(signs[i] * trial.values[i] <= value for i, value in computed)]
    best = min(able, key=lambda trial: (signs[first] * trial.values[first], trial.number), default=None)
    return None if best is None else best.number


def was_stopped(measurements: Sequence[Measurement]) -> bool:
    """Whether these are the measurements of a trial that was given up."""
    return any("rival" in measurement.detail for measurement in measurements)


def expected(measurement: Measurement) -> float:
    """The value that all tokens would most likely give; the value itself where all were evaluated."""
    value = measurement.detail.get("estimate", measurement.value)
    assert isinstance(value, float), measurement
    return value
