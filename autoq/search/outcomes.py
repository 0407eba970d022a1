"""What a controller knows of trials that are out, and what it tells of those that came back; how a study is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from autoq.errors import AutoQError
from autoq.measurement import Measurement
from autoq.search.stopping import expected
from autoq.spec import Bound
from autoq.store import Store, TrialRecord


def violations(constraints: Mapping[str, Bound], measurements: Sequence[Measurement]) -> dict[str, float]:
    """How far each bound is overstepped, relative to the bound; at most 0 where it is kept."""
    values = {m.objective: expected(m) for m in measurements if m.part == "search"}
    found = {}
    for name, bound in constraints.items():
        if bound.max is not None:
            found[f"{name}.max"] = (values[name] - bound.max) / (abs(bound.max) or 1.0)
        if bound.min is not None:
            found[f"{name}.min"] = (bound.min - values[name]) / (abs(bound.min) or 1.0)
    return found


@dataclass
class Outcome:
    """What the sampler is told of a trial: the values that it steers by, or None if it failed.

    `beats` says whether it was evaluated in full and is feasible, so that others may be held against it.
    """

    values: list[float] | None
    violations: list[float] = field(default_factory=list)
    beats: bool = False


@dataclass
class Flight:
    """A trial that is out: what is known of it without evaluating it, since when, and the number of its rival."""

    trial: TrialRecord
    computed: list[Measurement]
    since: float
    rival: int | None = None


def leave_failed(store: Store, study_id: int, reason: str) -> None:
    """Note the reason, unless the database itself is what failed."""
    try:
        store.queue.settle(study_id, "failed", reason)
    except AutoQError:
        return
