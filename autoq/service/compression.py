"""Gzip for answers that are whole: JSON, text, HTML. Streams of events go out as they are.

A compressed answer is another representation, so its entity tag gets a suffix of its own (RFC 9110, 8.8.3).
"""

from __future__ import annotations

import gzip

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SMALLEST = 1024
_KINDS = ("application/json", "text/csv", "text/html", "text/plain", "application/yaml")


class Gzip:
    """Compress what is worth it for those who take it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and "gzip" in Headers(scope=scope).get("accept-encoding", ""):
            send = _Compressing(send)
        await self.app(scope, receive, send)


class _Compressing:
    """Holds the head of an answer back until its body is known to be whole."""

    def __init__(self, send: Send) -> None:
        self.send = send
        self.start: Message | None = None

    async def __call__(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = Headers(raw=message["headers"])
            fit = headers.get("content-type", "").partition(";")[0] in _KINDS and "content-encoding" not in headers
            if fit and message["status"] != 304:
                self.start = message
                return
        elif self.start is not None:
            start, self.start = self.start, None
            if not message.get("more_body", False) and len(message.get("body", b"")) >= SMALLEST:
                start, message = _compressed(start, message)
            await self.send(start)
        await self.send(message)


def _compressed(start: Message, message: Message) -> tuple[Message, Message]:
    body = gzip.compress(message["body"], 5, mtime=0)
    headers = MutableHeaders(scope=start)
    headers["Content-Encoding"] = "gzip"
    headers["Content-Length"] = str(len(body))
    headers.add_vary_header("Accept-Encoding")
    if "etag" in headers:
        headers["ETag"] = headers["etag"].removesuffix('"') + '-gzip"'
    return start, {**message, "body": body}
