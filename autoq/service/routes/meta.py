"""What there is to choose from, and how the server is."""

from __future__ import annotations

import functools
from typing import Any

from fastapi import APIRouter, Request, Response

from autoq import documents
from autoq.errors import StoreError
from autoq.service.answers import answer, tagged
from autoq.service.context import Stored
from autoq.service.schemas import (
    HealthAnswer,
    MethodsAnswer,
    ObjectivesAnswer,
    ReadyAnswer,
    SamplersAnswer,
    TargetsAnswer,
)
from autoq.store.models import SCHEMA

router = APIRouter(tags=["server"])

_UNCHANGED: dict[int | str, dict[str, Any]] = {304: {"description": "What the client has is still so"}}
_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.get("/healthz", response_model=HealthAnswer)
async def healthz() -> Response:
    """The process is alive and answers."""
    return answer({"status": "ok"})


@router.get("/readyz", response_model=ReadyAnswer, responses={503: {"model": ReadyAnswer}})
def readyz(request: Request, store: Stored) -> Response:
    """Whether the database answers, has this version's schema, and the scheduler lives."""
    database = current = False
    try:
        current = store.feed.ping() == SCHEMA
        database = True
    except StoreError:
        request.app.state.metrics.database_errors.inc()
    scheduler = request.app.state.scheduler
    alive = scheduler is not None and scheduler.alive
    told = {"database": database, "schema_current": current, "scheduler": alive}
    ready = all(told.values())
    return answer({"ready": ready, **told}, 200 if ready else 503)


@router.get("/metrics", response_class=Response, responses=_TEXT)
def metrics(request: Request) -> Response:
    """For Prometheus."""
    told = request.app.state.metrics
    return Response(told.text(), 200, {"Cache-Control": "no-store"}, told.media_type)


@router.get("/api/v1/methods", response_model=MethodsAnswer, responses=_UNCHANGED)
def list_methods(request: Request) -> Response:
    """The quantization methods."""
    return tagged(request, (), lambda: {"methods": documents.methods()})


@router.get("/api/v1/objectives", response_model=ObjectivesAnswer, responses=_UNCHANGED)
def list_objectives(request: Request) -> Response:
    """What can be measured."""
    return tagged(request, (), lambda: {"objectives": documents.choices("objectives")})


@router.get("/api/v1/samplers", response_model=SamplersAnswer, responses=_UNCHANGED)
def list_samplers(request: Request) -> Response:
    """What can propose assignments."""
    return tagged(request, (), lambda: {"samplers": documents.choices("search.samplers")})


@router.get("/api/v1/targets", response_model=TargetsAnswer, responses=_UNCHANGED)
def list_targets(request: Request) -> Response:
    """The deployment runtimes: what each times and exports, and whether it can measure on this machine."""
    return tagged(request, (), lambda: {"targets": _targets()})


_targets = functools.cache(documents.targets)
