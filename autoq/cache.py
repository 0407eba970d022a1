"""The user's cache folder: things fetched or converted once and used by every process after that.

It may be deleted at any time when no study runs. This module knows no torch.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from autoq.errors import AutoQError


def cache_dir() -> Path:
    """`AUTOQ_CACHE` if set, else `autoq` in `XDG_CACHE_HOME` or in `~/.cache`. Not created here."""
    if own := os.environ.get("AUTOQ_CACHE"):
        return Path(own).expanduser()
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        return Path(xdg).expanduser() / "autoq"
    return Path.home() / ".cache" / "autoq"


def entry_path(root: Path, name: str) -> Path:
    """Where the bank in `root` keeps the entry `name`."""
    return root / name[:2] / f"{name}.safetensors"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that is there whole or not at all, into a folder that is there. Raises `OSError`."""
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(partial).replace(path)
    except BaseException:
        Path(partial).unlink(missing_ok=True)
        raise


def write_out(path: Path, content: bytes) -> None:
    """Write a file that somebody asked for: whole, or what was there before stays. Raises `AutoQError`."""
    try:
        if path.exists() and not path.is_file():  # a pipe, a terminal
            path.write_bytes(content)
            return
        partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
        try:
            partial.write_bytes(content)
            partial.replace(path)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    except OSError as problem:
        raise AutoQError(f"cannot write {str(path)!r}: {problem.strerror or problem}") from None


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache, filled by `build(folder)` if it is not there yet.

    `name` must tell everything that the content depends on. Of several processes that ask at once,
    one builds and the others wait. A folder appears under its name only when it is complete: a build
    that fails or is killed leaves nothing that would be taken for one. What `build` raises comes
    through; a cache that cannot be written is an `AutoQError`.
    """
    target = cache_dir() / name
    if target.is_dir():
        return target
    partial = target.with_name(f".{target.name}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{target.name}.lock")):
            if target.is_dir():
                return target
            # Whoever left this behind held the lock that is ours now, so it is dead.
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            try:
                build(partial)
                partial.rename(target)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as problem:
        raise AutoQError(
            f"the cache folder {str(cache_dir())!r} cannot be used: {problem}; set AUTOQ_CACHE to another one"
        ) from None
    return target
