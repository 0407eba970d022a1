"""A study's trials as JSON, by columns: what a page needs to filter, rank and list them.

Twenty thousand trials are a few hundred kilobytes that way, and whoever has them asks only for what changed since.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoq.store import StudyObjective, StudyRecord

from .columns import KINDS, ORIGINS, PARTS, STATES, Floats, Small, Trials


def points(study: StudyRecord, trials: Trials) -> dict[str, Any]:
    """`{"study", "state", "changes", "objectives", "columns", "measured"}`.

    `columns` holds one list per fact of a trial, `measured` per objective one list per fact of its measurement: the
    reported value where there is one, with its provenance, and in `search` the value that the search went by. The
    study's objectives come first, in their order; what else was measured has no direction.
    """
    objectives = list(study.objectives)
    own = {objective.name for objective in objectives}
    objectives += [StudyObjective(name, unit, "") for name, unit in sorted(trials.units.items()) if name not in own]
    measured = {}
    for objective in objectives:
        best = trials.best(objective.name)
        measured[objective.name] = {
            "value": _numbers(best.value),
            "stderr": _numbers(best.stderr),
            "kind": _words(KINDS, best.kind),
            "part": _words(PARTS, best.part),
            "search": _numbers(trials.measured(objective.name, "search").value),
        }
    numbers: list[int] = trials.number.tolist()
    return {
        "study": study.name,
        "state": study.state,
        "changes": study.changes,
        "objectives": [objective.to_json() for objective in objectives],
        "columns": {
            "number": numbers,
            "state": _words(STATES, trials.state),
            "origin": _words(ORIGINS, trials.origin),
            "baseline": [trials.baselines.get(number) for number in numbers],
            "feasible": [None if known < 0 else bool(known) for known in trials.feasible.tolist()],
            "on_frontier": trials.on_frontier.tolist(),
            "duplicate_of": [None if number < 0 else number for number in trials.duplicate_of.tolist()],
            "seconds": _numbers(trials.seconds),
        },
        "measured": measured,
    }


def _numbers(values: Floats) -> list[float | None]:
    """Eight digits: more than any measurement has, and half the bytes. None for what is not there."""
    there = np.isfinite(values)
    found = [float(f"{value:.8g}") for value in np.where(there, values, 0.0).tolist()]
    return [value if known else None for value, known in zip(found, there.tolist(), strict=True)]


def _words(words: Sequence[str], places: Small | NDArray[np.int8]) -> list[str | None]:
    return [None if place < 0 else words[place] for place in places.tolist()]
