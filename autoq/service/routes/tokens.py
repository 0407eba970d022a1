"""Tokens, for admins; and the session of a browser that has one."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response

from autoq.service.answers import answer
from autoq.service.auth import Asker, asker_of, set_cookie
from autoq.service.context import Admin, Configured, Stored
from autoq.service.errors import Refusal
from autoq.service.requests import SessionBody, TokenBody
from autoq.service.schemas import NewTokenAnswer, SessionAnswer, TokensAnswer, TokenShape

router = APIRouter(prefix="/api/v1", tags=["accounts"])

_NOBODY = {"user": None, "role": None, "open": False}


@router.get("/tokens", response_model=TokensAnswer)
def list_tokens(store: Stored, _: Admin) -> Response:
    """All tokens, those too that open nothing any more."""
    return answer({"tokens": [token.to_json() for token in store.accounts.list()]})


@router.post("/tokens", response_model=NewTokenAnswer, status_code=201)
def create_token(store: Stored, _: Admin, body: TokenBody) -> Response:
    """A new token. This answer is the only one that has it. The first one of a database closes its server."""
    lasting = None if body.days is None else timedelta(days=body.days)
    secret, record = store.accounts.create(body.name, body.user, body.role, lasting)
    return answer(record.to_json() | {"token": secret}, 201)


@router.delete("/tokens/{token}", response_model=TokenShape)
def revoke_token(store: Stored, _: Admin, token: Annotated[int, Path(ge=0, le=2**31 - 1)]) -> Response:
    """Let a token open nothing from now on."""
    return answer(store.accounts.revoke(token).to_json())


@router.get("/session", response_model=SessionAnswer)
def get_session(request: Request) -> Response:
    """Who asks; nobody where no valid token came along."""
    asker = asker_of(request.scope)
    return answer(_NOBODY if asker is None else asker.to_json())


@router.post("/session", response_model=SessionAnswer)
def begin_session(store: Stored, settings: Configured, body: SessionBody) -> Response:
    """Take a token for a browser, which sends it from now on in a cookie that no script reads."""
    token = store.accounts.find(body.token)
    if token is None:
        raise Refusal(401, "token: is not valid", {"WWW-Authenticate": 'Bearer realm="autoq"'})
    left = None if token.expires_at is None else int((token.expires_at - datetime.now(UTC)).total_seconds())
    response = answer(Asker(token.user, token.role, token.id).to_json())
    response.headers["Set-Cookie"] = set_cookie(settings, body.token, left)
    return response


@router.delete("/session", response_model=SessionAnswer)
def end_session(settings: Configured) -> Response:
    """Let the browser forget its token."""
    response = answer(_NOBODY)
    response.headers["Set-Cookie"] = set_cookie(settings, "", 0)
    return response
