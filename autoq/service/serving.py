"""The server process: what it refuses to start with, and how it starts and stops.

It stops within moments of SIGTERM or Ctrl-C: requests are finished, streams of events are ended (their clients come
back to whoever serves next), studies that run go on in their own processes until the scheduler has let go of them.
"""

from __future__ import annotations

import logging
import os
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import uvicorn
from fastapi import FastAPI

from autoq.errors import AutoQError, BadInput
from autoq.service.settings import Settings
from autoq.store import Store

GRACE_SECONDS = 10


class Certificate(NamedTuple):
    """TLS by the server itself."""

    certfile: Path
    keyfile: Path | None


def refuse_exposed(store: Store, settings: Settings) -> list[str]:
    """Warnings about how this server can be reached. Raises `BadInput` where everybody could change everything."""
    if settings.loopback:
        return []
    if not store.accounts.any():
        raise BadInput(
            f"--host {settings.host} is open to other machines, and nobody has a token yet; "
            "make one with: autoq token create NAME --user USER --role admin"
        )
    if not settings.tls:
        warning = (
            f"--host {settings.host} is open to other machines without TLS: tokens can be read on the way; put a "
            "proxy in front and say --tls-terminated, or give --ssl-certfile and --ssl-keyfile"
        )
        return [warning]
    return []


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises `AutoQError` in one line where there can be none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        found = socket.create_server((host.strip("[]"), port), family=family, backlog=2048)
        # Connections take it over. asyncio does not set it on sockets whose protocol is 0, as these are; without it a
        # body waits 40 ms for the client's delayed acknowledgement of the headers.
        found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return found
    except (OSError, OverflowError) as problem:
        number = getattr(problem, "errno", None)
        reason = problem if number is None or number < 0 else os.strerror(number)
        raise AutoQError(f"cannot listen on {host}:{port}: {reason}") from None


class _Server(uvicorn.Server):
    """Says when it is up, and ends the streams before it waits for the rest."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, up: Callable[[], None]) -> None:
        super().__init__(config)
        self.app, self.up = app, up

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not self.should_exit:
            self.up()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.app.state.hub.close()
        await super().shutdown(sockets)


def run(
    app: FastAPI,
    listening: socket.socket,
    up: Callable[[], None],
    certificate: Certificate | None = None,
    proxied: bool = False,
) -> None:
    """Serve until SIGTERM or Ctrl-C. `up` is called once requests are answered; `proxied`: a proxy on this machine
    says who asks."""
    logging.basicConfig(format="autoq: %(message)s", level=logging.WARNING)
    # The memory of this process, and of those that it starts, holds passwords and tokens: a crash leaves no copy of it.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    config = uvicorn.Config(
        app,
        log_config=None,
        log_level="warning",
        access_log=False,  # addresses may hold what is nobody's business, and headers the tokens
        server_header=False,
        proxy_headers=proxied,
        lifespan="off",
        ws="none",
        timeout_graceful_shutdown=GRACE_SECONDS,
        ssl_certfile=None if certificate is None else certificate.certfile,
        ssl_keyfile=None if certificate is None else certificate.keyfile,
    )
    try:
        config.load()
    except OSError as problem:  # ssl.SSLError is one
        raise BadInput(f"--ssl-certfile, --ssl-keyfile: cannot be used: {problem.strerror or problem}") from None
    server = _Server(config, app, up)
    # The server raises the signal again that ended it, once it is done; that is the end then, and no failure.
    former = {number: signal.signal(number, _ended) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        server.run(sockets=[listening])
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def _ended(_signal: int, _frame: object) -> None:
    return
