"""What changes studies: submit, cancel, remove, resume, refine, improve; and the questions that need a model."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Path, Query, Request, Response

from autoq import documents
from autoq.errors import AutoQError, BadInput, GaveUp, LimitReached, StoreError, Unavailable
from autoq.service import jobs
from autoq.service.answers import answer
from autoq.service.context import WAKES, Asks, Configured, Stored, Visible
from autoq.service.errors import Refusal, field_of
from autoq.service.requests import CheckBody, RecoverBody, RefineBody, ResumeBody, SubmitBody
from autoq.service.schemas import CheckAnswer, OfferAnswer, RemovalAnswer, StudyAnswer
from autoq.service.submitting import backroom_of, read_spec

router = APIRouter(prefix="/api/v1", tags=["submissions"])

Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        pattern=r"^[!-~]{1,128}$",
        description="Of the client's making. The same one again gives the same study, however often it is sent.",
    ),
]
Number = Annotated[int, Path(ge=0, le=2**31 - 1, description="A trial's number.")]
_AGAIN: dict[int | str, dict[str, Any]] = {
    200: {"model": StudyAnswer, "description": "The study that was submitted under this key before"}
}


@router.post("/studies", response_model=StudyAnswer, status_code=201, responses=_AGAIN, dependencies=[WAKES])
async def submit_study(
    request: Request, settings: Configured, asker: Asks, body: SubmitBody, key: Key = None
) -> Response:
    """Queue a study. It is checked against the model and the target first, as `autoq search` does."""
    if body.priority > 0 and asker.role != "admin":
        raise Refusal(403, "priority: only an admin's studies go before others")
    spec = read_spec(body, asker, settings)
    submissions = request.app.state.submissions
    study, fresh = await submissions.submit(backroom_of(request), asker, spec, key, body.priority)
    return answer(study.to_json(), 201 if fresh else 200)


@router.post("/specs:check", response_model=CheckAnswer)
async def check_spec(request: Request, settings: Configured, asker: Asks, body: CheckBody) -> Response:
    """Whether a spec is valid, in the words that a submission would be refused with."""
    told: dict[str, Any] = {"ok": True, "message": None, "field": None, "spec": None, "facts": None}
    told["checked"] = "model" if body.deep else "spec"
    try:
        spec = read_spec(body, asker, settings)
        told["spec"] = spec.model_dump(mode="json")
        if body.deep:
            told["facts"] = dict((await backroom_of(request).prepare(spec)).facts)
    except (Refusal, StoreError, GaveUp, Unavailable, LimitReached):
        raise  # it says nothing of the spec
    except AutoQError as problem:
        told |= {"ok": False, "message": str(problem), "field": field_of(problem)}
    return answer(told)


@router.post("/studies/{study}/cancel", response_model=StudyAnswer, dependencies=[WAKES])
def cancel_study(store: Stored, study: Visible) -> Response:
    """End a study: at once while it waits, after the trials that are out while it runs. 409 where it has ended."""
    return answer(store.queue.cancel(study.id).to_json())


@router.delete("/studies/{study}", response_model=RemovalAnswer, dependencies=[WAKES])
def remove_study(store: Stored, study: Visible, asker: Asks) -> Response:
    """Remove a study with all its trials, for good. 409 while it is queued or at work."""
    return answer(store.queue.remove(study.id, asker.user).to_json())


@router.post("/studies/{study}/resume", response_model=StudyAnswer, dependencies=[WAKES])
def resume_study(store: Stored, settings: Configured, study: Visible, body: ResumeBody | None = None) -> Response:
    """Queue a study that has ended: to the end of its budget, or to more trials."""
    trials = None if body is None else body.trials
    return answer(store.queue.enqueue(study.id, trials, limit=settings.limits.waiting_studies).to_json())


@router.post("/studies/{study}/refine", response_model=StudyAnswer, dependencies=[WAKES])
def refine_study(store: Stored, settings: Configured, study: Visible, body: RefineBody) -> Response:
    """Queue up to `n` trials of what the study's model offers within limits."""
    limit = settings.limits.waiting_studies
    return answer(jobs.refine(store, study.id, body.max, body.min, body.n, body.best, limit).to_json())


@router.post("/studies/{study}/trials/{number}/sequential", response_model=StudyAnswer, dependencies=[WAKES])
def sequence_trial(store: Stored, settings: Configured, study: Visible, number: Number) -> Response:
    """Queue a trial's layers to be quantized once more, in sequence: a new trial of the same bytes. 409 where that was
    done before; the message names the trial."""
    limit = settings.limits.waiting_studies
    return answer(jobs.sequential(store, study.id, number, limit).to_json())


@router.post("/studies/{study}/trials/{number}/recover", response_model=StudyAnswer, dependencies=[WAKES])
def recover_trial(store: Stored, settings: Configured, study: Visible, number: Number, body: RecoverBody) -> Response:
    """Queue a trial to be trained: a new trial of the same bytes."""
    limit = settings.limits.waiting_studies
    return answer(jobs.recover(store, study.id, number, body.model_dump(), limit).to_json())


@router.get("/studies/{study}/offer", response_model=OfferAnswer)
async def get_offer(
    request: Request,
    study: Visible,
    maximum: Annotated[list[str] | None, Query(alias="max", max_length=16)] = None,
    minimum: Annotated[list[str] | None, Query(alias="min", max_length=16)] = None,
    best: Annotated[str | None, Query(max_length=128)] = None,
) -> Response:
    """What the study's model would have within limits, with the interval of its prediction; nothing is measured."""
    upper, lower = documents.pairs(maximum or (), "max"), documents.pairs(minimum or (), "min")
    store = request.app.state.store
    await to_thread.run_sync(_check_limits, store, study.id, upper, lower, best)
    found = await backroom_of(request).offer(study.id, upper, lower, best)
    return answer({"study": study.name} | {name: found[name] for name in ("predicted", "assignment", "trial")})


def _check_limits(store: Any, study_id: int, upper: Any, lower: Any, best: str | None) -> None:
    from autoq.study import bounds

    record = store.study(study_id)
    bounds(record, upper, lower)
    names = [objective.name for objective in record.objectives]
    if best is not None and best not in names:
        raise BadInput(f"best: must be an objective of this study: {', '.join(names)} (got {best[:80]!r})")
