"""Trials: pages of them, one, its assignment, the values behind a measurement, and what is noted on it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request, Response

from autoq import documents
from autoq.errors import BadInput, NotFound
from autoq.service.answers import JSON, answer, tagged
from autoq.service.context import Asks, Stored, Visible
from autoq.service.requests import RemarkBody
from autoq.service.schemas import (
    Part,
    RemarksAnswer,
    RemarkShape,
    TrialsAnswer,
    TrialShape,
    TrialStateName,
    ValuesAnswer,
)

router = APIRouter(prefix="/api/v1/studies/{study}", tags=["trials"])

Number = Annotated[int, Path(ge=0, le=2**31 - 1, description="A trial's number.")]
_UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "What the client has is still so"}}
_YAML: dict[int | str, dict[str, Any]] = {
    200: {"content": {JSON: {"schema": {"type": "object"}}, "application/yaml": {"schema": {"type": "string"}}}}
}


@router.get("/trials", response_model=TrialsAnswer, responses=_UNCHANGED)
def list_trials(
    request: Request,
    store: Stored,
    study: Visible,
    state: Annotated[list[TrialStateName] | None, Query(description="Only those in one of these states.")] = None,
    after: Annotated[int | None, Query(ge=-1, le=2**31 - 1, description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    assignments: bool = False,
    parent: Annotated[
        int | None, Query(ge=0, le=2**31 - 1, description="Only what was made of this trial: trained, in sequence.")
    ] = None,
) -> Response:
    """A page of trials in the order of their numbers."""

    def make() -> dict[str, Any]:
        found = store.trials(
            study.id, state or None, with_assignments=assignments, after=after, limit=limit + 1, parent=parent
        )
        shown = found[:limit]
        following = shown[-1].number if len(found) > limit else None
        return documents.document(store.study(study.id), shown) | {"next": following}

    return tagged(request, (study.id, study.changes), make)


@router.get("/trials/{number}", response_model=TrialShape, responses=_UNCHANGED)
def get_trial(request: Request, store: Stored, study: Visible, number: Number) -> Response:
    """One trial with its assignment."""
    return tagged(request, (study.id, study.changes), lambda: store.trial(study.id, number).to_json())


@router.get("/trials/{number}/assignment", response_class=Response, responses=_UNCHANGED | _YAML)
def get_assignment(
    request: Request,
    store: Stored,
    study: Visible,
    number: Number,
    form: Annotated[Literal["json", "yaml"], Query(alias="format")] = "json",
) -> Response:
    """Layer name -> scheme, as JSON or YAML; a trained layer's entry has its digest."""

    def make() -> Any:
        assignment = store.trial(study.id, number).assignment
        assert assignment is not None
        if form == "json":
            return assignment.to_dict()
        import yaml

        return yaml.safe_dump(assignment.to_dict(), sort_keys=False, width=1000)

    return tagged(request, (study.id, study.changes), make, JSON if form == "json" else "application/yaml")


@router.get("/trials/{number}/values", response_model=ValuesAnswer, responses=_UNCHANGED)
def get_values(
    request: Request,
    store: Stored,
    study: Visible,
    number: Number,
    objective: Annotated[str, Query(min_length=1, max_length=128)],
    part: Part = "search",
) -> Response:
    """The numbers per token whose mean a measurement is; 404 where none are stored."""
    if "\0" in objective:
        raise BadInput("objective: must have no NUL in it")

    def make() -> dict[str, Any]:
        store.trial(study.id, number, with_assignments=False)
        values = store.token_values(study.id, number, objective, part)
        if values is None:
            raise NotFound(f"trial {number} of study {study.name!r} has no values of {objective[:80]!r} ({part} part)")
        rows = [[value if value - value == 0 else None for value in row] for row in values.tolist()]
        named = {"study": study.name, "number": number, "objective": objective, "part": part}
        return {**named, "values": rows}

    return tagged(request, (study.id, study.changes), make)


@router.get("/trials/{number}/remark", response_model=RemarkShape, responses=_UNCHANGED)
def get_remark(request: Request, store: Stored, study: Visible, number: Number) -> Response:
    """What is noted on a trial; nothing yet is an empty note."""

    def make() -> dict[str, Any]:
        store.trial(study.id, number, with_assignments=False)
        found = store.remarks.of(study.id, number)
        empty = {"trial": number, "note": "", "tags": [], "user": None, "changed_at": None}
        return found[0].to_json() if found else empty

    return tagged(request, (study.id, study.changes), make)


@router.put("/trials/{number}/remark", response_model=RemarkShape)
def put_remark(store: Stored, study: Visible, asker: Asks, number: Number, body: RemarkBody) -> Response:
    """Note something on a trial, instead of what was noted before."""
    tags = list(dict.fromkeys(body.tags))
    return answer(store.remarks.put(study.id, number, body.note, tags, asker.user).to_json())


@router.get("/remarks", response_model=RemarksAnswer, responses=_UNCHANGED)
def list_remarks(request: Request, store: Stored, study: Visible) -> Response:
    """All that is noted on a study's trials."""

    def make() -> dict[str, Any]:
        return {"study": study.name, "remarks": [remark.to_json() for remark in store.remarks.of(study.id)]}

    return tagged(request, (study.id, study.changes), make)
