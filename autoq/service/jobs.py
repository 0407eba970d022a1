"""Jobs of finished studies: what a runner is to do beside the search. Checked before they are queued."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from autoq.errors import BadInput, Conflict, UnknownName
from autoq.store import Store, StudyRecord
from autoq.store.queue_records import JOB, RUN

MAX_REFINED = 64

Limits = Mapping[str, float | str]


def refine(
    store: Store,
    study_id: int,
    maximum: Limits,
    minimum: Limits,
    n: int = 1,
    best: str | None = None,
    limit: int | None = None,
) -> StudyRecord:
    """Queue a finished study to have up to `n` of its model's offers for these limits measured ("measure it").

    Raises `BadInput` and `UnknownName` for limits that are none, `Conflict` and `LimitReached` as `Queue.enqueue`.
    """
    from autoq.study import bounds

    study = store.study(study_id)
    if not 1 <= n <= MAX_REFINED:
        raise BadInput(f"n must be from 1 to {MAX_REFINED} (got {n})")
    names = [objective.name for objective in study.objectives]
    if best is not None and best not in names:
        raise UnknownName("objective of this study", best, names)
    if not bounds(study, maximum, minimum):
        raise BadInput("give at least one limit: max or min of an objective")
    job = {"kind": "refine", "max": dict(maximum), "min": dict(minimum), "n": n, "best": best}
    return store.queue.enqueue(study_id, job=job, limit=limit)


def improvable(store: Store, study_id: int, trial: int) -> dict[str, str | None]:
    """Kind of job -> why it cannot be done to the trial, None where it can, whatever the study is at."""
    from autoq.search.lineage import recoverable, sequenceable

    def why_not(check: Callable[[Store, int, int], object]) -> str | None:
        try:
            check(store, study_id, trial)
        except BadInput as problem:
            return str(problem)
        return None

    return {"sequential": why_not(sequenceable), "recover": why_not(recoverable)}


def of_trial(store: Store, study_id: int) -> dict[str, Any] | None:
    """Which trial the study's job is done to, and what: {"kind", "trial"}; None where it is done to none."""
    job = store.table(study_id, JOB) or RUN
    return {"kind": job["kind"], "trial": job["trial"]} if "trial" in job else None


def sequential(store: Store, study_id: int, trial: int, limit: int | None = None) -> StudyRecord:
    """Queue a finished study to have a trial's layers quantized once more, in sequence.

    Raises `NotFound` for a trial that is not there, `BadInput` for one that cannot be, `Conflict` where that was done,
    and what `Queue.enqueue` raises.
    """
    from autoq.search.lineage import sequenceable, sequenced_before

    found = sequenceable(store, study_id, trial)
    if (done := sequenced_before(store, study_id, trial)) is not None:
        raise Conflict(f"trial {trial} of {found.study!r} was quantized in sequence before: it is trial {done}")
    return store.queue.enqueue(study_id, job={"kind": "sequential", "trial": trial}, limit=limit)


def recover(
    store: Store, study_id: int, trial: int, training: Mapping[str, Any], limit: int | None = None
) -> StudyRecord:
    """Queue a finished study to have a trial trained; `training` are the fields of `search.training.Training`.

    Raises `NotFound` for a trial that is not there, `BadInput` for a training that cannot be and a trial with nothing
    to train, `Conflict` and `LimitReached` as `Queue.enqueue`.
    """
    from autoq.search.lineage import recoverable
    from autoq.search.training import Training

    try:
        wanted = Training(**training)
        wanted.check()
    except TypeError:
        fields = ", ".join(sorted(Training.__dataclass_fields__))
        raise BadInput(
            f"a training has {fields}; steps is needed (got {', '.join(sorted(training)) or 'none'})"
        ) from None
    recoverable(store, study_id, trial)
    job = {"kind": "recover", "trial": trial, "training": asdict(wanted)}
    return store.queue.enqueue(study_id, job=job, limit=limit)
