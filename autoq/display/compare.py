"""What a frontier says: what the search gained over uniform, and how well it was foretold.

Only numbers that may be compared are compared: the same objective, the same part of the data, both
measured. A gain is claimed only beyond twice the combined standard error.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from autoq.measurement import Measurement
from autoq.search.sampler_view import spearman

if TYPE_CHECKING:
    from autoq.store import StudyObjective, TrialRecord

SIZE_SLACK = 1.12  # how much larger than a baseline a point may be and still be set against it
_COSTS = ("bytes", "ms", "bits/weight", "J")  # units of what is paid; quality has others
MAX_GAINS = 3


def quality_objective(objectives: Sequence[StudyObjective]) -> StudyObjective | None:
    """The first objective that is neither size nor time nor energy."""
    return next((o for o in objectives if o.unit not in _COSTS), None)


def sort_objective(objectives: Sequence[StudyObjective]) -> StudyObjective:
    """What a frontier is listed by: the first objective that is a size, else the last."""
    return next((o for o in objectives if o.unit == "bytes"), objectives[-1])


def comparable(a: Measurement, b: Measurement) -> bool:
    """Whether two measurements may stand against each other."""
    return a.objective == b.objective and a.part == b.part and a.kind == b.kind


def _error(a: Measurement, b: Measurement) -> float:
    return math.hypot(a.stderr or 0.0, b.stderr or 0.0)


@dataclass(frozen=True)
class Gain:
    """A searched point beside a uniform baseline: `ratios` of each objective, point over baseline."""

    point: TrialRecord
    baseline: TrialRecord
    quality: str
    ratios: dict[str, float]

    def __str__(self) -> str:
        ours = self.point.best_measurements()[self.quality]
        theirs = self.baseline.best_measurements()[self.quality]
        costs = ", ".join(f"{ratio:.2f} × its {name}" for name, ratio in self.ratios.items() if name != self.quality)
        return (
            f"trial {self.point.number} against {self.baseline.baseline}: {costs} and "
            f"{self.ratios[self.quality]:.2f} × its {self.quality} ({ours.value:.4g} against {theirs.value:.4g})"
        )


def gains(
    frontier: Sequence[TrialRecord], baselines: Sequence[TrialRecord], objectives: Sequence[StudyObjective]
) -> list[Gain]:
    """For each quantized uniform baseline the best searched point of its size, where that is better.

    The point is chosen by the search part and then shown with what was reported of it. A baseline that
    another one beats in size and quality is no yardstick. Empty where quality or size is no objective.
    Best first.
    """
    quality = quality_objective(objectives)
    cost = next((o for o in objectives if o.unit == "bytes"), None)
    if quality is None or cost is None or quality.direction != "minimize":
        return []
    keys = (cost.name, quality.name)
    yardsticks = [trial for trial in baselines if trial.values([quality.name])[0] > 0]
    yardsticks = [t for t in yardsticks if not any(_beats(other, t, keys) for other in yardsticks)]
    found = []
    for baseline in yardsticks:
        theirs = baseline.best_measurements()
        fitting = [
            trial
            for trial in frontier
            if trial.baseline is None
            and trial.values([cost.name])[0] <= SIZE_SLACK * theirs[cost.name].value
            and comparable(trial.best_measurements()[quality.name], theirs[quality.name])
        ]
        if not fitting:
            continue
        best = min(fitting, key=lambda trial: trial.values([quality.name]))
        ours = best.best_measurements()
        margin = 2 * _error(ours[quality.name], theirs[quality.name])
        if ours[quality.name].value + margin < theirs[quality.name].value:
            ratios = {
                o.name: ours[o.name].value / theirs[o.name].value
                for o in objectives
                if theirs[o.name].value and comparable(ours[o.name], theirs[o.name])
            }
            found.append(Gain(best, baseline, quality.name, ratios))
    found.sort(key=lambda gain: gain.ratios[gain.quality])
    return found[:MAX_GAINS]


def _beats(a: TrialRecord, b: TrialRecord, keys: Sequence[str]) -> bool:
    x, y = a.values(keys), b.values(keys)
    return x != y and all(i <= j for i, j in zip(x, y, strict=True))


@dataclass(frozen=True)
class Foretold:
    """How well a latency was predicted: over `count` trials that were timed, the median of |predicted/measured - 1|
    and the rank correlation (Spearman; None where it has no meaning)."""

    objective: str
    count: int
    median_error: float
    rank_correlation: float | None

    def __str__(self) -> str:
        rank = "" if self.rank_correlation is None else f", rank correlation {self.rank_correlation:.2f}"
        return f"{self.objective}: predicted within {self.median_error:.1%} (median of {self.count} timed){rank}"


def foretold(trials: Sequence[TrialRecord]) -> list[Foretold]:
    """Predicted against measured, per latency objective that three trials or more have both of."""
    pairs: dict[str, list[tuple[float, float]]] = {}
    for trial in trials:
        for (name, part), measurement in trial.measurements.items():
            predicted = measurement.detail.get("predicted_ms")
            if part == "report" and predicted and measurement.value > 0:
                pairs.setdefault(name, []).append((float(predicted), measurement.value))
    found = (foretold_by_pairs(name, both) for name, both in sorted(pairs.items()))
    return [each for each in found if each is not None]


def foretold_by_pairs(objective: str, pairs: Sequence[tuple[float, float]]) -> Foretold | None:
    """The same from (predicted, measured) values above 0; None of fewer than three."""
    if len(pairs) < 3:
        return None
    errors = [abs(predicted / measured - 1) for predicted, measured in pairs]
    ranks = spearman([predicted for predicted, _ in pairs], [measured for _, measured in pairs])
    return Foretold(objective, len(pairs), statistics.median(errors), ranks)
