"""Jobs of finished studies: what a runner is to do beside the search. Checked before they are queued."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from autoq.errors import BadInput, UnknownName
from autoq.store import Store, StudyRecord

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


def recover(
    store: Store, study_id: int, trial: int, training: Mapping[str, Any], limit: int | None = None
) -> StudyRecord:
    """Queue a finished study to have a trial trained; `training` are the fields of `search.training.Training`.

    Raises `NotFound` for a trial that is not there, `BadInput` for a training that cannot be, `Conflict` and
    `LimitReached` as `Queue.enqueue`.
    """
    from autoq.search.training import Training

    try:
        wanted = Training(**training)
        wanted.check()
    except TypeError:
        fields = ", ".join(sorted(Training.__dataclass_fields__))
        raise BadInput(
            f"a training has {fields}; steps is needed (got {', '.join(sorted(training)) or 'none'})"
        ) from None
    store.trial(study_id, trial, with_assignments=False)
    job = {"kind": "recover", "trial": trial, "training": asdict(wanted)}
    return store.queue.enqueue(study_id, job=job, limit=limit)
