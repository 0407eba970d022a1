"""Which requests are believed, and what browsers may do with an answer. Pure ASGI, so that streams stream.

**Host.** A page of somebody else's may have its own name point at this machine (DNS rebinding) and then read what a
server on loopback gives to everybody. So a request must call the server by one of its names.

**Origin.** A foreign page can send requests that change something with the user's cookie, or on loopback with no
credential at all. What browsers send with every such request (`Origin`, `Sec-Fetch-Site`) must say that it is our
own page; a program sends neither, and is let through.

**Content-Security-Policy.** Scripts, styles and data come from this server alone, none of them inline, nothing may
frame it, no form leads away, and no text is run as code. plotly.js is brought to that by `dashboards/static/plot.css`
and `plot.js`. It makes images of `data:` and `blob:` addresses when a figure is saved.
"""

from __future__ import annotations

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from autoq.service.errors import error_response
from autoq.service.settings import Settings

SAFE = frozenset({"GET", "HEAD", "OPTIONS", "TRACE"})
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "font-src 'self'",
        "connect-src 'self'",
        "form-action 'self'",
        "base-uri 'none'",
        "frame-ancestors 'none'",
        "object-src 'none'",
    )
)
SECURITY = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(), payment=(), usb=()",
}


class Secured:
    """Put the security headers on every answer."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.headers = dict(SECURITY)
        if settings.tls:
            self.headers["Strict-Transport-Security"] = "max-age=31536000"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in self.headers.items():
                    headers.setdefault(name, value)
            await send(message)

        await self.app(scope, receive, marked)


class Believed:
    """Refuse requests that call the server by another's name, and those that another's page sends."""

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app = app
        self.hosts = settings.allowed_hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        problem = self._foreign_host(headers) or _foreign_page(scope["method"], headers)
        if problem is not None:
            status, message = problem
            await error_response(status, message)(scope, receive, send)
            return
        await self.app(scope, receive, send)

    def _foreign_host(self, headers: Headers) -> tuple[int, str] | None:
        hosts = headers.getlist("host")
        name = _without_port(hosts[0]) if len(hosts) == 1 else ""
        if name in self.hosts or (name and "*" in self.hosts):
            return None
        return 400, f"this server is not called {name[:80]!r}; start it with --allow-host to give it that name"


def _foreign_page(method: str, headers: Headers) -> tuple[int, str] | None:
    if method in SAFE:
        return None
    site = headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        return 403, "another site's page may not change anything here"
    origin = headers.get("origin")
    if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
        return 403, "another site's page may not change anything here"
    return None


def _without_port(host: str) -> str:
    host = host.strip().lower()
    if host.startswith("["):
        return host.partition("]")[0] + "]"
    return host.rpartition(":")[0] if ":" in host else host
