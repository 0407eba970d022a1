"""Answers that cost nothing where nothing is new: strong entity tags from a study's count of changes.

A tag is made of what an answer depends on: the study and its count of changes, the address with its query, the format,
and the version of AutoQ. So whether a client has the answer already is known before any of it is read. What was built
last is kept, a bounded number of bytes of it, for the next who asks for the same.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from fastapi import Request, Response

import autoq
from autoq.service.errors import as_json

JSON = "application/json"


class Kept:
    """Bodies by tag, the last ones used, `limit` bytes of them."""

    def __init__(self, limit: int = 32_000_000) -> None:
        self.limit = limit
        self._size = 0
        self._bodies: OrderedDict[str, bytes] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, tag: str) -> bytes | None:
        """The body of that tag, if it is still here."""
        with self._lock:
            if tag in self._bodies:
                self._bodies.move_to_end(tag)
            return self._bodies.get(tag)

    def put(self, tag: str, body: bytes) -> None:
        """Keep a body, and forget those that were not asked for the longest."""
        with self._lock:
            if tag in self._bodies or len(body) > self.limit // 4:
                return
            self._bodies[tag] = body
            self._size += len(body)
            while self._size > self.limit:
                self._size -= len(self._bodies.popitem(last=False)[1])


def answer(document: Any, status: int = 200) -> Response:
    """A JSON document that is not to be kept by anybody."""
    return Response(as_json(document), status, {"Cache-Control": "no-store"}, JSON)


def tagged(
    request: Request, depends: tuple[Any, ...], make: Callable[[], Any], media_type: str = JSON, keep: bool = False
) -> Response:
    """The document that `make` gives (text where it is no JSON), under a tag of `depends`; 304 to whom has it."""
    source = (autoq.__version__, *depends, request.url.path, request.url.query, media_type)
    tag = hashlib.sha256(repr(source).encode()).hexdigest()[:32]
    headers = {"ETag": f'"{tag}"', "Cache-Control": "private, no-cache", "Vary": "Accept, Authorization, Cookie"}
    if _has(request.headers.get("if-none-match", ""), tag):
        return Response(None, 304, headers)
    kept: Kept = request.app.state.kept
    body = kept.get(tag) if keep else None
    if body is None:
        made = make()
        body = made.encode() if isinstance(made, str) and media_type != JSON else as_json(made)
        if keep:
            kept.put(tag, body)
    return Response(body, 200, headers, media_type)


def _has(given: str, tag: str) -> bool:
    """Whether `If-None-Match` names the tag; one of a compressed answer and a weak one count (RFC 9110, 13.1.2)."""
    known = {part.strip().removeprefix("W/").strip('"').removesuffix("-gzip") for part in given.split(",")}
    return tag in known or given.strip() == "*"
