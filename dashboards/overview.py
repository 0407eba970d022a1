"""A study in one sentence and one line: what its best point gains over a uniform one, and how its frontier grew."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from autoq.display import numbers
from autoq.display.compare import gains, quality_objective

from .volume import sparkline

if TYPE_CHECKING:
    from autoq.display.compare import Gain
    from autoq.store import StudyObjective, TrialRecord

    from .study_view import View

_NAMES = {
    "kl_nats_per_token": "KL divergence",
    "size_bytes": "size",
    "latency_decode_ms": "decode latency",
    "latency_prefill_ms": "prefill latency",
    "energy_joule_per_token": "energy per token",
    "peak_memory_bytes": "peak memory",
}
_WIDTH, _HEIGHT = 128, 40


def overview(view: View) -> dict[str, Any]:
    """`{"study", "changes", "budget", "workers", "headline", "trial", "spark"}` of a view that is up to date.

    `headline` is a sentence, None where there is nothing to say yet; `trial` the number it is about. `budget` is how
    many trials the study may have, `workers` how many it is to have at a time, `spark` the hypervolume as an SVG path
    in a box of 128 by 40.
    """
    study, trials = view.study, view.trials
    first = sorted(trials.baselines)
    records = view.records(first)
    points = view.records(trials.number[trials.on_frontier].tolist())
    told = _headline(points, [trial for trial in records if trial.state == "complete"], study.objectives)
    return {
        "study": study.name,
        "changes": study.changes,
        "budget": study.spec.get("budget", {}).get("trials"),
        "workers": int(study.spec.get("workers", {}).get("count", 1)),
        "headline": told[0],
        "trial": told[1],
        "spark": sparkline(view.volume().share.tolist(), width=_WIDTH, height=_HEIGHT)["path"],
    }


def _headline(
    points: list[TrialRecord], baselines: list[TrialRecord], objectives: tuple[StudyObjective, ...]
) -> tuple[str | None, int | None]:
    found = gains(points, baselines, objectives)
    if found:
        return _gain(found[0], objectives), found[0].point.number
    quality = quality_objective(objectives) or objectives[0]
    searched = [trial for trial in points if trial.baseline is None]
    if not searched:
        return None, None
    sign = 1 if quality.direction == "minimize" else -1
    best = min(searched, key=lambda trial: sign * trial.values([quality.name])[0])
    own = best.best_measurements()
    said = [
        f"{numbers.quantity(own[o.name].value, o.unit)}{' (predicted)' if own[o.name].kind == 'predicted' else ''}"
        for o in objectives
    ]
    return f"Best {_name(quality.name)} so far: trial {best.number} with {', '.join(said)}.", best.number


def _gain(gain: Gain, objectives: tuple[StudyObjective, ...]) -> str:
    ours, theirs = gain.point.best_measurements()[gain.quality], gain.baseline.best_measurements()[gain.quality]
    costs = [
        f"{ratio:.2f} × the {_name(o.name)}"
        for o in objectives
        if o.name != gain.quality and (ratio := gain.ratios.get(o.name)) is not None
    ]
    return (
        f"Trial {gain.point.number} has {gain.ratios[gain.quality]:.2f} × the {_name(gain.quality)} of "
        f"{gain.baseline.baseline} at {' and '.join(costs)}: {numbers.quantity(ours.value, ours.unit)} against "
        f"{numbers.number(theirs.value, theirs.unit)}."
    )


def _name(objective: str) -> str:
    return _NAMES.get(objective, objective.replace("_", " "))
