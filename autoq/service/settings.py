"""How a server is run: where it listens, whom it believes, and what it takes at most."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Limits:
    """What one client may send. Rates are per token, or per address where there is none.

    `burst` requests may come at once, then `requests_per_second`; two hundred submissions at a time are meant to pass.
    `event_streams` may be open at a time, and `event_streams_each` with one token.
    """

    body_bytes: int = 1_000_000
    body_seconds: float = 30.0
    json_depth: int = 32
    requests_per_second: float = 50.0
    burst: int = 600
    event_streams: int = 500
    event_streams_each: int = 200
    waiting_studies: int | None = 256
    waiting_exports: int | None = 16


@dataclass(frozen=True)
class Sources:
    """Which models and texts those may name who are no admins: folders below these roots, and the hub or not; and
    how many workers they may ask of Ray (0: none)."""

    models: tuple[Path, ...] = ()
    data: tuple[Path, ...] = ()
    hub: bool = False
    ray_workers: int = 0


@dataclass(frozen=True)
class Settings:
    """One server. `hosts` are the names that a request may call it by, besides its own; `tls` says that clients
    reach it over TLS, by itself or by a proxy in front; `root_path` is where that proxy has put it."""

    host: str = "127.0.0.1"
    port: int = 8800
    hosts: tuple[str, ...] = ()
    tls: bool = False
    root_path: str = ""
    limits: Limits = field(default_factory=Limits)
    sources: Sources = field(default_factory=Sources)
    exports: Path | None = None

    @property
    def loopback(self) -> bool:
        """Whether nobody but this machine reaches it."""
        return is_loopback(self.host)

    @property
    def allowed_hosts(self) -> frozenset[str]:
        """The names of this server, in lower case and without a port; `*` stands for any."""
        own = {"localhost", "127.0.0.1", "[::1]"}
        if not self.loopback:
            own |= {socket.gethostname(), socket.getfqdn(), _bracketed(self.host)}
        return frozenset(name.lower() for name in (*own, *self.hosts))

    @property
    def url(self) -> str:
        """Where a browser on this machine finds it."""
        shown = "127.0.0.1" if self.host in ("0.0.0.0", "::") else _bracketed(self.host)  # noqa: S104 - compared
        return f"http://{shown}:{self.port}/"


def is_loopback(host: str) -> bool:
    """Whether an address or `localhost` is this machine alone. Other names are taken for reachable ones."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host and not host.startswith("[") else host
