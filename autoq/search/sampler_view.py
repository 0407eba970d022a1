"""What a sampler thought of its own proposals: predicted against measured quality.

A sampler that models quality leaves its prediction of a trial, in the objective's unit, in the trial's
sampler attributes. Trials that were stopped early count by the estimate of their full value: they are the ones
that turned out worse than expected, and a view without them would flatter.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoq.store import TrialRecord, TrialState

ENDED: tuple[TrialState, ...] = ("complete", "stopped")
PREDICTED = "frontier:predicted"
FEWEST = 3  # trials below which neither number means anything
RANKED = 8  # and below which a rank correlation may be chance


@dataclass(frozen=True)
class SamplerView:
    """Over `trials` finished proposals: rank correlation of predicted and measured quality (Spearman; None
    of fewer than eight and where it has no meaning) and the median of measured over predicted."""

    trials: int
    spearman: float | None
    median_ratio: float

    def to_json(self) -> dict[str, Any]:
        """`{"trials", "spearman", "median_ratio"}`."""
        return asdict(self)

    def __str__(self) -> str:
        rank = "" if self.spearman is None else f"rank correlation {self.spearman:.2f}, "
        return f"sampler's own predictions: {rank}measured / predicted {self.median_ratio:.2f} ({self.trials} trials)"


def view_of_pairs(pairs: Sequence[tuple[float, float]]) -> SamplerView | None:
    """The view over (predicted, measured) values; None below three, and where nothing was predicted but 0."""
    ratios = [measured / predicted for predicted, measured in pairs if predicted]
    if len(pairs) < FEWEST or not ratios:
        return None
    rank = spearman(*zip(*pairs, strict=True)) if len(pairs) >= RANKED else None
    return SamplerView(len(pairs), rank, statistics.median(ratios))


def sampler_view(trials: Iterable[TrialRecord], quality: str) -> SamplerView | None:
    """The view over those of `trials` that a sampler proposed and that have ended with a value; None below
    three with a prediction."""
    pairs = []
    for trial in trials:
        predicted, measured = trial.sampler_attrs.get(PREDICTED), trial.measurements.get((quality, "search"))
        if trial.origin == "sampler" and trial.state in ENDED and predicted is not None and measured is not None:
            pairs.append((float(predicted), float(measured.detail.get("estimate", measured.value))))
    return view_of_pairs(pairs)


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation; equal values share the mean of their ranks. None where all of one are equal."""
    if len(set(a)) < 2 or len(set(b)) < 2:
        return None
    return statistics.correlation(_ranks(a), _ranks(b))


def _ranks(values: Sequence[float]) -> list[float]:
    places: dict[float, list[int]] = {}
    for place, value in enumerate(sorted(values)):
        places.setdefault(value, []).append(place)
    return [statistics.fmean((places[value][0], places[value][-1])) for value in values]
