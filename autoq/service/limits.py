"""What a client may send: so many requests, so many bytes, JSON of so much depth. Pure ASGI.

**Rate.** A token bucket for each client (its token; or its address, of IPv6 the /64, also where its token is wrong):
`burst` requests at once, refilled at `requests_per_second`. Buckets that are full again are forgotten, so that many
clients cost nothing later.

**Body.** A body is read whole before a route sees it, up to `body_bytes` however it is sent, within `body_seconds`. It
must be JSON, of plain finite numbers and text that every database takes, without a key that stands twice.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import math
import re
import time
from collections import Counter
from collections.abc import Iterable
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoq.service.auth import asker_of
from autoq.service.errors import Refusal, error_response
from autoq.service.headers import SAFE
from autoq.service.settings import Limits, Settings

_FORGET = 10_000  # buckets beyond which full ones are forgotten


class Buckets:
    """A token bucket for each client."""

    def __init__(self, rate: float, burst: int) -> None:
        self.rate, self.burst = rate, burst
        self._left: dict[str, tuple[float, float]] = {}  # client -> requests left, at a time
        self._forgotten = -math.inf

    def take(self, client: str, now: float) -> float:
        """Take one request out: 0, or the seconds after which there is one again."""
        if len(self._left) > _FORGET and now - self._forgotten >= 1:  # many that are not full make no request slow
            self._forgotten = now
            self._forget(now)
        left, then = self._left.get(client, (float(self.burst), now))
        left = min(float(self.burst), left + (now - then) * self.rate)
        if left < 1:
            self._left[client] = left, now
            return (1 - left) / self.rate
        self._left[client] = left - 1, now
        return 0.0

    def _forget(self, now: float) -> None:
        self._left = {
            client: (left, then)
            for client, (left, then) in self._left.items()
            if left + (now - then) * self.rate < self.burst
        }


def network_of(address: str) -> str:
    """What one client can ask from as it likes: an address, or the /64 of an IPv6 address."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if found.version == 4 or found.ipv4_mapped is not None:
        return address
    return str(ipaddress.ip_network((found, 64), strict=False))


class Rate:
    """Refuse a client that asks too often, and say when it may ask again."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.buckets = Buckets(settings.limits.requests_per_second, settings.limits.burst)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] != "/healthz":
            asker = asker_of(scope)
            client = network_of((scope.get("client") or ("", 0))[0])
            own = f"token {asker.token_id}" if asker is not None and asker.token_id is not None else f"at {client}"
            if (seconds := self.buckets.take(own, time.monotonic())) > 0:
                after = {"Retry-After": str(math.ceil(seconds))}
                await error_response(429, f"too many requests; try again in {seconds:.1f} s", None, after)(
                    scope, receive, send
                )
                return
        await self.app(scope, receive, send)


class Bodies:
    """Read the body of a request that changes something, and refuse what is too large, too deep, or no JSON."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.limits = settings.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] in SAFE:
            await self.app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self.limits.body_seconds):
                body = await _whole(Headers(scope=scope), receive, self.limits.body_bytes)
        except TimeoutError:
            await error_response(408, "the request's body did not come in time")(scope, receive, send)
            return
        except Refusal as problem:
            await error_response(problem.status, str(problem))(scope, receive, send)
            return
        if body is None:
            return  # the client is gone
        if (refusal := refuse_body(body, Headers(scope=scope).get("content-type"), self.limits)) is not None:
            await error_response(*refusal)(scope, receive, send)
            return
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self.app(scope, replay, send)


async def _whole(headers: Headers, receive: Receive, limit: int) -> bytes | None:
    """The body, None where the client goes away."""
    said = headers.get("content-length", "")
    if said.isdecimal() and int(said[:20]) > limit:
        raise Refusal(413, f"a request may have {limit} bytes")
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise Refusal(413, f"a request may have {limit} bytes")
        if not message.get("more_body", False):
            return b"".join(parts)


def refuse_body(body: bytes, content_type: str | None, limits: Limits) -> tuple[int, str] | None:
    """Why a body is not taken: a status and a line; None if it is."""
    if not body and content_type is None:
        return None
    kind, _, parameters = (content_type or "").partition(";")
    if kind.strip().lower() != "application/json" or "charset" in parameters.lower().replace("charset=utf-8", ""):
        return 415, "a request's body must be application/json"
    if not body:
        return None
    if body.count(b"[") + body.count(b"{") > limits.json_depth and _depth(body) > limits.json_depth:
        return 400, f"the body is nested more than {limits.json_depth} deep"
    try:
        text = body.decode("utf-8")
        tree = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_unique)
    except UnicodeDecodeError:
        return 400, "the body is not UTF-8 text"
    except (ValueError, RecursionError) as problem:
        return 400, f"the body is not valid JSON: {' '.join(str(problem).split())[:200]}"
    if "\\u" in text and (odd := _odd_text(tree)) is not None:  # raw, JSON and UTF-8 allow neither
        return 400, f"the body has text with {odd}, which no database takes"
    return None


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {twice[:80]!r} stands twice")
    return found


# An unclosed text reaches to the end: tried anew at every quote, it would cost the square of its length.
_MARKS = re.compile(rb'"(?:[^"\\]|\\.)*+(?:"|\\?\Z)|[\[{]|[\]}]', re.DOTALL)


def _depth(body: bytes) -> int:
    """How deep brackets nest, those in texts left out; counted before anything recursive sees them."""
    deepest = depth = 0
    for mark in _MARKS.finditer(body):
        first = mark[0][:1]
        if first != b'"':
            depth += 1 if first in b"[{" else -1
            deepest = max(deepest, depth)
    return deepest


def _odd_text(tree: Any) -> str | None:
    for text in _texts(tree):
        if "\0" in text:
            return "a NUL"
        if any("\ud800" <= character <= "\udfff" for character in text):
            return "half a character"
    return None


def _texts(tree: Any) -> Iterable[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            yield key
            yield from _texts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value)
