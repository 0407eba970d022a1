"""Events of the list of studies; those of one study are beside it."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response

from autoq.service.context import Asks, Stored
from autoq.service.events import EventStream, Hub, seen_of, still_valid

router = APIRouter(tags=["studies"])

_EVENTS: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {"schema": {"type": "string"}}}, "description": "Server-sent events"}
}


@router.get("/api/v1/events", response_class=Response, responses=_EVENTS)
def follow_studies(
    request: Request,
    store: Stored,
    asker: Asks,
    since: Annotated[int | None, Query(ge=0, le=2**31 - 1)] = None,
    last: Annotated[str | None, Header(alias="Last-Event-ID", max_length=32)] = None,
) -> Response:
    """The studies that the asker may see, then those that change."""
    hub: Hub = request.app.state.hub
    return EventStream(hub.studies(asker.whose, seen_of(last, since), asker.token_id), still_valid(store, asker))
