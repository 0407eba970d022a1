"""What a controller knows of trials that are out, and what it tells of those that came back; how a study is left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from autoq.errors import AutoQError, NotFinite, StoreAway, StoreError
from autoq.measurement import Measurement
from autoq.search.executors import Failure, Result
from autoq.search.space import SearchSpace
from autoq.search.stopping import expected, was_stopped
from autoq.spec import Bound, StudySpec
from autoq.store import Ending, Store, TrialError, TrialRecord


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


@dataclass(slots=True)
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


def ending_of(
    spec: StudySpec,
    trial: TrialRecord,
    result: Result,
    failure: Failure | None,
    measurements: Sequence[Measurement],
    sampler_attrs: Mapping[str, Any] | None,
) -> Ending:
    """How a trial ended: by `failure`, or with these measurements."""
    attempt = result.job.attempt
    told = Ending(trial.id, attempt, result.seconds, result.worker)
    if failure is not None:
        message = f"quarantined after {attempt} crashes: {failure.message}" if failure.crashed else failure.message
        return replace(told, error=TrialError(failure.error, message, failure.traceback))
    stopped = was_stopped(measurements)
    told = replace(told, measurements=measurements, violations=violations(spec.constraints, measurements))
    return replace(told, stopped=stopped, sampler_attrs=None if stopped else sampler_attrs)


def summed(space: SearchSpace, slopes: Mapping[str, Any]) -> dict[str, Any]:
    """Slopes of layers as those of the parameters of a space."""
    own = {v.name: [slopes["table"][part.name] for part in v.members] for v in space.variables}
    table = {name: [float(f"{sum(parts):.6g}") for parts in zip(*rows, strict=True)] for name, rows in own.items()}
    return {"loss": slopes["loss"], "table": table}


def keep(store: Store, endings: Sequence[Ending]) -> list[TrialRecord | None]:
    """`Store.end_trials`, and if they cannot be stored together one by one: what one of them fails by must not take the
    others with it."""
    try:
        return store.end_trials(endings)
    except (StoreError, NotFinite) as problem:
        if len(endings) == 1 or isinstance(problem, StoreAway):
            raise
    found: list[TrialRecord | None] = []
    problems = []
    for ending in endings:
        try:
            found += store.end_trials([ending])
        except (StoreError, NotFinite) as problem:
            problems.append(problem)
    if problems:
        raise problems[0]
    return found


def leave_failed(store: Store, study_id: int, reason: str) -> None:
    """Note the reason, unless the database itself is what failed."""
    try:
        store.queue.settle(study_id, "failed", reason)
    except AutoQError:
        return


def refuse_nothing(store: Store, study_id: int, done: int) -> None:
    """A study in which every trial failed has failed, for what is most likely one reason: raises `AutoQError`."""
    failed = store.trials(study_id, states=["failed"], limit=1)
    if failed and failed[0].error is not None and not store.trials(study_id, ["complete"], limit=1):
        error = failed[0].error
        raise AutoQError(f"all {done} trials failed, the first with {error.type}: {error.message}")
