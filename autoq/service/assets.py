"""Static files: under an address that holds their content's hash, compressed once, kept by browsers for good.

Our own files share one hash, so that a module's relative import stays within its version. Plotly's JavaScript comes
from the installed `plotly` package, which is found without being imported.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from autoq.errors import AutoQError, NotFound

PLOTLY = "plotly.min.js"
_TYPES = {".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
FOREVER = "public, max-age=31536000, immutable"


@dataclass(frozen=True)
class Asset:
    """One static file: its media type, its content, and the same compressed."""

    media_type: str
    body: bytes
    compressed: bytes


def _asset(name: str, body: bytes) -> Asset:
    # No time stamp: the same content is the same bytes on every server.
    return Asset(_TYPES[Path(name).suffix], body, gzip.compress(body, 9, mtime=0))


@functools.cache
def _own() -> dict[str, Asset]:
    folder = resources.files("autoq.dashboards") / "static"
    files = sorted((file for file in folder.iterdir() if Path(file.name).suffix in _TYPES), key=lambda f: f.name)
    return {file.name: _asset(file.name, file.read_bytes()) for file in files}


@functools.cache
def _own_digest() -> str:
    digest = hashlib.sha256()
    for name, asset in _own().items():
        digest.update(f"{name} {len(asset.body)} ".encode() + asset.body)
    return digest.hexdigest()[:16]


@functools.cache
def _plotly_file() -> Path:
    found = importlib.util.find_spec("plotly")
    if found is None or found.origin is None:
        raise AutoQError("plotly is not installed: pip install 'autoq[serve]'")
    return Path(found.origin).parent / "package_data" / PLOTLY


@functools.cache
def _plotly_digest() -> str:
    return hashlib.sha256(_plotly_file().read_bytes()).hexdigest()[:16]


@functools.cache
def _plotly() -> Asset:
    return _asset(PLOTLY, _plotly_file().read_bytes())


def address(name: str) -> str:
    """The path of a static file on the server, for templates."""
    if name == PLOTLY:
        return f"/static/{_plotly_digest()}/{name}"
    assert name in _own(), name
    return f"/static/{_own_digest()}/{name}"


def asset(digest: str, name: str) -> Asset:
    """The file of that name and hash. Raises `NotFound` for any other one."""
    if name == PLOTLY and digest == _plotly_digest():
        return _plotly()
    if name not in _own() or digest != _own_digest():
        raise NotFound(f"no static file {name[:80]!r} of version {digest[:40]!r}; load the page again")
    return _own()[name]
