"""Errors as answers: one JSON shape, one line, and nothing of this machine in it.

    {"error": {"message": "model.id: is required", "field": "model.id"}}

Whatever a user can cause is an `AutoQError` with a message that is meant for users; it goes out as it is. Anything else
is a bug: it is logged here and answered by a sentence that says nothing of it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoq.errors import AutoQError, BadInput, Conflict, GaveUp, LimitReached, NotFound, StoreError, Unavailable
from autoq.spec_errors import field_path, line_of

log = logging.getLogger("autoq.service")
_STATUS: tuple[tuple[type[AutoQError], int], ...] = (
    (NotFound, 404),
    (Conflict, 409),
    (LimitReached, 429),
    (StoreError, 503),
    (Unavailable, 503),
    (GaveUp, 504),
    (BadInput, 422),
    (AutoQError, 409),  # asked for well, and what is stored does not have it
)
_FIELD = re.compile(r"([A-Za-z_]\w*(?:\.[\w*:%-]+)*): ")
_UNREACHABLE = "the database cannot be used at the moment"
_SAID = {400: "the request cannot be read", 404: "there is nothing here", 405: "this address does not take {method}"}


class Refusal(AutoQError):
    """The request is refused."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})


def error_response(
    status: int, message: str, field: str | None = None, headers: Mapping[str, str] | None = None
) -> Response:
    """The one shape of every error."""
    told = {"message": message} | ({} if field is None else {"field": field})
    # ASCII: a message may quote a lone surrogate, which no encoding has.
    body = json.dumps({"error": told}).encode()
    return Response(body, status, {**(headers or {}), "Cache-Control": "no-store"}, "application/json")


def status_of(problem: AutoQError) -> int:
    """The HTTP status that an error is answered with."""
    if isinstance(problem, Refusal):
        return problem.status
    return next(status for kind, status in _STATUS if isinstance(problem, kind))


def field_of(problem: AutoQError) -> str | None:
    """The field that an error is about: as it says, or as its message begins with one."""
    found = _FIELD.match(str(problem))
    return problem.field if problem.field is not None else found[1] if found else None


def _answer(request: Request, status: int, message: str, field: str | None, headers: Mapping[str, str]) -> Response:
    page = getattr(request.app.state, "error_page", None)
    wants_page = "text/html" in request.headers.get("accept", "") and not request.url.path.startswith("/api/")
    if page is not None and wants_page:
        shown: Response = page(request, status, message)
        return shown
    return error_response(status, message, field, headers)


async def _autoq(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, AutoQError)
    status, message, headers = _told(problem, request.app.state.metrics)
    return _answer(request, status, message, field_of(problem), headers)


def _told(problem: AutoQError, metrics: Any) -> tuple[int, str, dict[str, str]]:
    """Status, message and headers of an error. What a database says is for the log: it names hosts and files."""
    status, headers = status_of(problem), dict(getattr(problem, "headers", {}))
    if status in (429, 503, 504):
        headers.setdefault("Retry-After", "5" if status == 503 else "30")
    if not isinstance(problem, StoreError):
        return status, str(problem), headers
    log.warning("%s", problem)
    metrics.database_errors.inc()
    return status, _UNREACHABLE, headers


async def _invalid(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, RequestValidationError)
    errors = []
    for error in problem.errors():
        place, *path = error["loc"]
        # Where the whole body is wrong, it has no name but this one.
        errors.append({**error, "loc": tuple(path) or (place,)})
    message = line_of(errors, _body_of(request) if problem.errors()[0]["loc"][0] == "body" else None)
    return _answer(request, 422, message, field_path(errors[0]["loc"]), {})


def _body_of(request: Request) -> type[BaseModel] | None:
    """The model of the body that the route takes, whose fields a message may name."""
    field = getattr(request.scope.get("route"), "body_field", None)
    model = getattr(getattr(field, "field_info", None), "annotation", None)
    return model if isinstance(model, type) and issubclass(model, BaseModel) else None


async def _http(request: Request, problem: Exception) -> Response:
    assert isinstance(problem, HTTPException)
    said = _SAID.get(problem.status_code, str(problem.detail)).format(method=request.method)
    return _answer(request, problem.status_code, said, None, problem.headers or {})


def install(app: FastAPI) -> None:
    """Answer errors in this shape."""
    app.add_exception_handler(AutoQError, _autoq)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)


class Bugs:
    """Middleware: what nobody expected is logged, and answered with 500 and no word of it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        begun = False

        async def watched(message: Message) -> None:
            nonlocal begun
            begun = begun or message["type"] == "http.response.start"
            await send(message)

        try:
            await self.app(scope, receive, watched)
        except AutoQError as problem:  # of a middleware: handlers answer those of routes
            if begun:
                raise
            status, message, headers = _told(problem, scope["app"].state.metrics)
            answer = error_response(status, message, field_of(problem), headers)
            await answer(scope, receive, send)
        except Exception:
            log.exception("a request failed: %s", scope.get("method"))
            if begun:
                raise
            await error_response(500, "an internal error; the server's log has it")(scope, receive, send)


def as_json(document: Any) -> bytes:
    """A JSON document as an answer's body. Numbers are finite."""
    return json.dumps(document, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode("utf-8", "replace")
