"""Who asks: bearer tokens, a session cookie for browsers, and what each role may.

| role | sees | may change |
|---|---|---|
| viewer | the studies of its user | nothing |
| submitter | the studies of its user | those: submit, cancel, remove, resume, refine, improve, export, remark |
| admin | every study | every study, and the tokens |

Another user's study is answered as one that is not there. A server on loopback whose database never had a token is
open, to everybody who is on the machine; where several people are, it needs a token. One token, and it asks everybody
for one.

Every address is closed but for those in `PUBLIC`; a request that changes something is closed to viewers. Both are
decided here, before any route is looked at, so a new route is closed until somebody opens it.

The cookie holds the token itself, where no script reads it, and is sent to our own pages alone (`SameSite=Strict`);
so a token that is revoked ends its sessions with it. Neither is ever written to a log.
"""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from typing import Any, Literal
from urllib.parse import quote

from starlette.datastructures import Headers
from starlette.responses import RedirectResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from autoq.service.errors import error_response
from autoq.service.headers import SAFE
from autoq.service.settings import Settings
from autoq.store import Store
from autoq.store.accounts import Role
from autoq.store.feed import Whose

SESSION = "/api/v1/session"
LOGIN = "/login"
PUBLIC = frozenset({"/healthz", "/readyz", LOGIN, SESSION})
PUBLIC_BELOW = ("/static/",)
_CHALLENGE = {"WWW-Authenticate": 'Bearer realm="autoq"'}
_LOOKUPS = 8  # tokens that are looked up at once; routes that wait for the database must not hold them up


@dataclass(frozen=True)
class Asker:
    """Who asks. `user` and `token_id` are None on an open server, where everything is allowed."""

    user: str | None
    role: Role
    token_id: int | None

    def sees(self, owner: str | None) -> bool:
        """Whether a study of that owner is there for this one."""
        return self.role == "admin" or (owner is not None and owner == self.user)

    @property
    def whose(self) -> Whose:
        """Which studies are there for this one."""
        return Whose(self.role == "admin", self.user)

    def to_json(self) -> dict[str, Any]:
        """`{"user", "role", "open"}`."""
        return {"user": self.user, "role": self.role, "open": self.token_id is None}


OPEN = Asker(None, "admin", None)


def asker_of(scope: Scope) -> Asker | None:
    """Who asks, as `Authenticate` found; None: nobody that is known."""
    asker: Asker | None = scope.get("state", {}).get("asker")
    return asker


def cookie_name(settings: Settings) -> str:
    """The session's cookie; over TLS its name binds it to this host."""
    return "__Host-autoq" if settings.tls else "autoq"


def set_cookie(settings: Settings, secret: str, seconds: int | None) -> str:
    """The header that begins a session, or with an empty secret ends one."""
    parts = [f"{cookie_name(settings)}={secret}", "Path=/", "HttpOnly", "SameSite=Strict"]
    parts += ["Secure"] if settings.tls else []
    parts += [] if seconds is None else [f"Max-Age={seconds}"]
    return "; ".join(parts)


class Authenticate:
    """Find out who asks, by the token in the request."""

    def __init__(self, app: ASGIApp, settings: Settings, store: Store) -> None:
        self.app, self.settings, self.store = app, settings, store
        self.closed = not settings.loopback
        self._threads = ThreadPoolExecutor(_LOOKUPS, thread_name_prefix="tokens")
        self._lock = threading.Lock()
        self._looking: set[str | None] = set()
        self._next: dict[str | None, Future[Asker | None]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            secret = secret_of(Headers(scope=scope), self.settings)
            # Both tell how the server is, also where the database does not.
            needless = scope["path"] in ("/healthz", "/readyz") or scope["path"].startswith(PUBLIC_BELOW)
            asker = None if needless else await self.ask(secret)
            scope.setdefault("state", {})["asker"] = asker
        await self.app(scope, receive, send)

    async def ask(self, secret: str | None) -> Asker | None:
        """`find`, where those who ask at the same moment share one look at the database.

        It begins after each of them has come, so a token that was revoked before a request lets nobody in.
        """
        with self._lock:
            if (future := self._next.get(secret)) is None:
                future = self._next[secret] = Future()
                if secret not in self._looking:
                    self._looking.add(secret)
                    self._threads.submit(self._look, secret)
        return await asyncio.shield(asyncio.wrap_future(future))  # who goes away ends the wait of nobody else

    def _look(self, secret: str | None) -> None:
        with self._lock:
            future = self._next.pop(secret)  # who comes from now on is for the next look
        try:
            future.set_result(self.find(secret))
        except BaseException as problem:
            future.set_exception(problem)
        with self._lock:
            if secret in self._next:
                self._threads.submit(self._look, secret)  # behind those of others
            else:
                self._looking.discard(secret)

    def find(self, secret: str | None) -> Asker | None:
        """Who has that token. Without any token in the database, on loopback: everybody is `OPEN`."""
        accounts = self.store.accounts
        if not self.closed:
            if not accounts.any():
                return OPEN
            self.closed = True
        token = None if secret is None else accounts.find(secret)
        return None if token is None else Asker(token.user, token.role, token.id)


def secret_of(headers: Headers, settings: Settings) -> str | None:
    """The token that a request brings along, in its header or in its cookie."""
    kind, _, secret = headers.get("authorization", "").partition(" ")
    if kind:
        return secret.strip() if kind.lower() == "bearer" else ""
    cookies: SimpleCookie = SimpleCookie()
    try:
        cookies.load(headers.get("cookie", ""))
    except CookieError:
        return None
    found = cookies.get(cookie_name(settings))
    return None if found is None else found.value


class Guard:
    """Let nobody in who is not known, and no viewer change anything."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and (refusal := _refusal(scope)) is not None:
            headers = Headers(scope=scope)
            page = "text/html" in headers.get("accept", "") and not scope["path"].startswith("/api/")
            if refusal == 401 and page and scope["method"] == "GET":
                query = scope.get("query_string", b"").decode("latin-1")
                there = quote(scope["path"] + (f"?{query}" if query else ""), safe="/")
                answer: Any = RedirectResponse(f"{scope.get('root_path', '')}{LOGIN}?next={there}", 303)
            elif refusal == 401:
                answer = error_response(401, "a valid token is needed: Authorization: Bearer …", None, _CHALLENGE)
            else:
                answer = error_response(403, "a viewer's token changes nothing; ask for a submitter's")
            await answer(scope, receive, send)
            return
        await self.app(scope, receive, send)


def _refusal(scope: Scope) -> Literal[401, 403] | None:
    path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
    if path in PUBLIC or path.startswith(PUBLIC_BELOW):
        return None
    asker = asker_of(scope)
    if asker is None:
        return 401
    return 403 if asker.role == "viewer" and scope["method"] not in SAFE else None
