"""What a controller knows of trials that are out, and what it tells of those that came back; how a study is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from autoq.errors import AutoQError
from autoq.measurement import Measurement
from autoq.search.executors import Failure, Result
from autoq.search.stopping import expected, was_stopped
from autoq.spec import Bound, StudySpec
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


def outcome_of(trial: TrialRecord, steering: Sequence[str]) -> Outcome:
    """What the sampler, which steers by these objectives, is told of a trial that has ended."""
    # What was trained was not proposed: its schemes are those of another trial, which the sampler has learned from.
    if trial.state not in ("complete", "stopped") or trial.parent is not None:
        return Outcome(None)
    values = [expected(trial.measurements[name, "search"]) for name in steering]
    return Outcome(values, [trial.violations[k] for k in sorted(trial.violations)], bool(trial.feasible))


@dataclass
class Flight:
    """A trial that is out: what is known of it without evaluating it, since when, and the number of its rival."""

    trial: TrialRecord
    computed: list[Measurement]
    since: float
    rival: int | None = None


def keep(
    store: Store,
    spec: StudySpec,
    trial: TrialRecord,
    result: Result,
    failure: Failure | None,
    measurements: Sequence[Measurement],
    sampler_attrs: Mapping[str, Any] | None,
) -> bool:
    """Store how a trial ended: by `failure`, or with these measurements. False if this attempt had ended before."""
    attempt, seconds, worker = result.job.attempt, result.seconds, result.worker
    if failure is not None:
        message = f"quarantined after {attempt} crashes: {failure.message}" if failure.crashed else failure.message
        return store.fail_trial(trial.id, attempt, failure.error, message, failure.traceback, seconds, worker)
    told = (trial.id, attempt, measurements, violations(spec.constraints, measurements), seconds, worker)
    return store.stop_trial(*told) if was_stopped(measurements) else store.finish_trial(*told, sampler_attrs)


def leave_failed(store: Store, study_id: int, reason: str) -> None:
    """Note the reason, unless the database itself is what failed."""
    try:
        store.queue.settle(study_id, "failed", reason)
    except AutoQError:
        return
