"""Studies: the list, one of them, and what it has found."""

from __future__ import annotations

import base64
import binascii
import json
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Header, Query, Request, Response

from autoq import documents
from autoq.errors import BadInput, NotFound
from autoq.service.answers import JSON, tagged
from autoq.service.context import Asks, Stored, Visible
from autoq.service.events import EventStream, Hub, seen_of, still_valid
from autoq.service.schemas import (
    BaselinesAnswer,
    DiffAnswer,
    FrontierAnswer,
    FrontierTrialShape,
    LayersAnswer,
    SensitivityAnswer,
    StudyListAnswer,
    StudyStandingAnswer,
    StudyStateName,
)
from autoq.service.views import Views
from autoq.store.feed import StudySort

router = APIRouter(prefix="/api/v1/studies", tags=["studies"])

Text = Annotated[str | None, Query(max_length=128)]
MaxLimits = Annotated[
    list[str] | None, Query(alias="max", max_length=16, description="Upper limits: `size_bytes=90MB`.")
]
MinLimits = Annotated[list[str] | None, Query(alias="min", max_length=16, description="Lower limits.")]
Since = Annotated[int | None, Query(ge=0, le=2**31 - 1, description="The count of changes that was seen.")]
LastEvent = Annotated[str | None, Header(alias="Last-Event-ID", max_length=32)]
_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Server-sent events"}
}
_CSV: dict[int | str, dict[str, Any]] = {200: {"content": {"text/csv": {"schema": {"type": "string"}}}}}
_UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "What the client has is still so"}}


@router.get("", response_model=StudyListAnswer, responses=_UNCHANGED)
def list_studies(
    request: Request,
    store: Stored,
    asker: Asks,
    state: Annotated[list[StudyStateName] | None, Query(description="Only those in one of these states.")] = None,
    owner: Text = None,
    search: Annotated[str | None, Query(max_length=128, description="A part of the name.")] = None,
    sort: StudySort = "-created",
    cursor: Annotated[str | None, Query(max_length=400, description="`next` of the page before.")] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
) -> Response:
    """A page of the studies that the asker may see."""
    after = None if cursor is None else _read_cursor(cursor)
    for name, text in (("owner", owner), ("search", search)):
        if text is not None and "\0" in text:
            raise BadInput(f"{name}: must have no NUL in it")

    def make() -> dict[str, Any]:
        found = store.feed.studies(
            asker.whose, states=state or (), owner=owner, search=search, sort=sort, after=after, limit=limit + 1
        )
        shown = found[:limit]
        tables = store.feed.tables([study.id for study in shown], ("optimism", "sampler_view"))
        return {
            "studies": [
                study.to_json() | {name: tables.get((study.id, name)) for name in ("optimism", "sampler_view")}
                for study in shown
            ],
            "next": _cursor(shown[-1].name, shown[-1].id) if len(found) > limit else None,
        }

    at_work = sorted(store.feed.workers().items())
    return tagged(request, (store.feed.total(asker.whose), at_work, asker.whose), make)


def _cursor(name: str, study_id: int) -> str:
    return base64.urlsafe_b64encode(json.dumps([name, study_id]).encode()).decode()


def _read_cursor(text: str) -> tuple[str, int]:
    try:
        name, study_id = json.loads(base64.b64decode(text, altchars=b"-_", validate=True))
    except (binascii.Error, ValueError, TypeError):
        raise BadInput("cursor: must be `next` of the page before") from None
    if not isinstance(name, str) or not isinstance(study_id, int) or not 0 <= study_id < 2**31 or "\0" in name:
        raise BadInput("cursor: must be `next` of the page before")
    if not name.isascii():  # no study's name is
        raise BadInput("cursor: must be `next` of the page before")
    return name, study_id


@router.get("/{study}", response_model=StudyStandingAnswer, responses=_UNCHANGED)
def get_study(request: Request, store: Stored, study: Visible) -> Response:
    """One study: its spec, where it stands, and how many trials ended how."""

    def make() -> dict[str, Any]:
        summaries = store.feed.summaries([study.id])
        if not summaries:
            raise NotFound(f"no study {study.name!r}")
        told = summaries[0].to_json()
        return store.study(study.id).to_json() | {"trials": told["trials"], "frontier": told["frontier"]}

    return tagged(request, (study.id, study.changes), make)


@router.get("/{study}/frontier", response_model=FrontierAnswer, responses=_UNCHANGED | _CSV)
def get_frontier(
    request: Request,
    store: Stored,
    study: Visible,
    maximum: MaxLimits = None,
    minimum: MinLimits = None,
    form: Annotated[Literal["json", "csv"] | None, Query(alias="format")] = None,
    assignments: bool = True,
) -> Response:
    """The trials that no other one beats, within limits; as CSV where `format` or `Accept` says so."""
    upper, lower = documents.pairs(maximum or (), "max"), documents.pairs(minimum or (), "min")
    as_csv = form == "csv" or (form is None and _wants_csv(request))

    def make() -> Any:
        record = store.study(study.id)
        whole = store.frontier(study.id, with_assignments=assignments and not as_csv)
        uniform = documents.baselines(store, record) if upper or lower else []
        points, _ = documents.within(record, whole, uniform, upper, lower)
        if as_csv:
            return documents.to_csv(record, points)
        views: Views = request.app.state.views
        ties, kept = views.ties(study, record.objectives, whole), {trial.number for trial in points}
        shown = {number: [other for other in others if other in kept] for number, others in ties.items()}
        return documents.document(record, points, shown) | views.hindsight(study, record.objectives)

    return tagged(request, (study.id, study.changes), make, "text/csv" if as_csv else JSON, keep=True)


def _wants_csv(request: Request) -> bool:
    """Whether `Accept` names CSV and not JSON before it."""
    accept = request.headers.get("accept", "")
    return "text/csv" in accept and "application/json" not in accept.partition("text/csv")[0]


@router.get("/{study}/baselines", response_model=BaselinesAnswer, responses=_UNCHANGED)
def get_baselines(request: Request, store: Stored, study: Visible) -> Response:
    """The complete uniform baselines."""

    def make() -> dict[str, Any]:
        record = store.study(study.id)
        return documents.document(record, documents.baselines(store, record))

    return tagged(request, (study.id, study.changes), make)


@router.get("/{study}/pick", response_model=FrontierTrialShape, responses=_UNCHANGED)
def pick_trial(
    request: Request,
    store: Stored,
    study: Visible,
    maximum: MaxLimits = None,
    minimum: MinLimits = None,
    best: Annotated[str | None, Query(max_length=128)] = None,
) -> Response:
    """The frontier's best trial within limits, with its assignment and what it is no better than."""
    upper, lower = documents.pairs(maximum or (), "max"), documents.pairs(minimum or (), "min")

    def make() -> dict[str, Any]:
        from autoq.study import pick

        record = store.study(study.id)
        chosen = pick(record, store.frontier(study.id), upper, lower, best)
        others = documents.tied(store, record, chosen, upper, lower)
        return store.trial(study.id, chosen.number).to_json() | {"no_better_than": [t.number for t in others]}

    return tagged(request, (study.id, study.changes), make)


@router.get("/{study}/sensitivity", response_model=SensitivityAnswer, responses=_UNCHANGED)
def get_sensitivity(request: Request, store: Stored, study: Visible) -> Response:
    """What every layer is predicted to lose under every scheme. A study that has not got so far has none: 404."""

    def make() -> dict[str, Any]:
        from autoq.display.compare import quality_objective

        table = store.table(study.id, "sensitivity")
        if table is None:
            raise NotFound(f"study {study.name!r} has no sensitivities yet")
        quality = quality_objective(store.study(study.id).objectives)
        unit = "1-cos" if quality is not None and quality.unit == "1-cos" else "nats/token"
        return {"study": study.name, "kind": "predicted", "unit": unit, "layers": table}

    return tagged(request, (study.id, study.changes), make)


@router.get("/{study}/layers", response_model=LayersAnswer, responses=_UNCHANGED)
def get_layers(request: Request, store: Stored, study: Visible) -> Response:
    """The model's layers. A study that was made before they were stored has none: 404."""

    def make() -> dict[str, Any]:
        table = store.table(study.id, "layers")
        if table is None:
            raise NotFound(f"study {study.name!r} has no table of layers")
        return {"study": study.name, "layers": table}

    return tagged(request, (study.id, study.changes), make)


@router.get("/{study}/diff", response_model=DiffAnswer, responses=_UNCHANGED)
def get_diff(
    request: Request,
    store: Stored,
    study: Visible,
    a: Annotated[str, Query(min_length=1, max_length=128, description="A trial's number, or a baseline's name.")],
    b: Annotated[str, Query(min_length=1, max_length=128, description="The other one.")],
) -> Response:
    """The layers that differ between two trials, and what the difference costs."""

    def make() -> dict[str, Any]:
        from autoq.display import diff

        record = store.study(study.id)
        left, right = documents.named_trial(store, record, a), documents.named_trial(store, record, b)
        caches = store.table(study.id, "caches")
        return diff.document(record, left, right, documents.layers(store, record), caches)

    return tagged(request, (study.id, study.changes), make)


@router.get("/{study}/events", response_class=Response, responses=_EVENTS)
def follow_study(
    request: Request, store: Stored, study: Visible, asker: Asks, since: Since = None, last: LastEvent = None
) -> Response:
    """What changes from now on, or since `Last-Event-ID`; see `autoq.service.events` for the shape of an event."""
    hub: Hub = request.app.state.hub
    return EventStream(hub.study(study.id, seen_of(last, since), asker.token_id), still_valid(store, asker))
