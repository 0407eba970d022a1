"""Three points to look at first: the smallest, the knee, the best."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from autoq.display.compare import quality_objective, sort_objective

from . import drawing

if TYPE_CHECKING:
    from .figures import Facts


def default_trial(facts: Facts) -> int | None:
    """The trial that is looked at where none is named: the knee, None where no feasible trial is complete."""
    found = picks(facts)
    return found.get("knee", found.get("best"))


def picks(facts: Facts) -> dict[str, int]:
    """`smallest`, `knee` and `best` -> the number of a frontier trial; fewer where they are the same.

    By search values, as every pick is. Searched points come before baselines. The knee is the point of the staircase
    of size (or what the frontier is listed by) against quality, both on a logarithmic scale where they are positive,
    that lies farthest below the line from its first to its last point (Satopää et al. 2011, "Finding a 'kneedle' in a
    haystack"). Empty where no feasible trial is complete.
    """
    trials, objectives = facts.trials, facts.study.objectives
    size = sort_objective(objectives)
    quality = quality_objective(objectives) or objectives[0]
    member = trials.on_frontier & trials.complete([size.name, quality.name])
    searched = member & ~trials.is_baseline
    place = np.flatnonzero(searched if searched.any() else member)
    if not len(place):
        return {}
    points = np.stack([trials.measured(o.name, "search").value[place] for o in (size, quality)], 1)
    costs = drawing.costs(points, [size.direction, quality.direction])
    number = trials.number[place].tolist()
    if size == quality:
        return {"best": number[int(costs[:, 0].argmin())]}
    smallest = int(np.lexsort((costs[:, 1], costs[:, 0]))[0])
    best = int(np.lexsort((costs[:, 0], costs[:, 1]))[0])
    kept = drawing.staircase(costs[:, 0], costs[:, 1], ("minimize", "minimize"))
    found = {"smallest": number[smallest]}
    if len(kept) > 2:
        scaled = np.stack([_scaled(costs[kept, 0]), _scaled(costs[kept, 1])], 1)
        middle = int(kept[1 + (scaled[1:-1].sum(1)).argmin()])
        found["knee"] = number[middle]
    else:
        found["knee"] = number[best]
    found["best"] = number[best]
    return found


def _scaled(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """From 0, the least, to 1, on a logarithmic scale where all are positive."""
    if (values > 0).all():
        values = np.log(values)
    scaled: NDArray[np.float64] = (values - values.min()) / (np.ptp(values) or 1.0)
    return scaled
