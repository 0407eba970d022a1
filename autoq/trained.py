"""Trained layers as files on this node, each named by the digest of its tensors.

Their home is the study's database, from which the one who has a job to give puts them here, where workers find
them. The folder is a copy that may be deleted at any time: what is missing is put again. This module knows no torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from autoq.assignment import Assignment
from autoq.cache import cache_dir, write_atomically
from autoq.errors import AutoQError
from autoq.scheme import Codebook, Integer, Scheme

Fetch = Callable[[Iterable[str]], Mapping[str, bytes]]
LIMIT_BYTES = 10 * 10**9  # of copies that nobody has asked for lately


def trainable(scheme: Scheme) -> bool:
    """Whether layers of this scheme can be trained: integers and codebooks.

    Not where inputs are scaled: there the levels are those of other coordinates than the weight's.
    """
    return isinstance(scheme, Codebook) or (isinstance(scheme, Integer) and not scheme.scales_inputs)


def path_of(digest: str) -> Path:
    """Where a layer's file is, or would be."""
    return cache_dir() / "trained" / f"{digest}.safetensors"


def missing(assignment: Assignment) -> list[str]:
    """The digests of the assignment's trained layers that are not on this node."""
    return [digest for digest in sorted(set(assignment.trained.values())) if not path_of(digest).is_file()]


def place(assignment: Assignment, fetch: Fetch) -> None:
    """Put the assignment's trained layers on this node; `fetch` gives the content of those that are not yet.

    Raises what `fetch` raises, and `AutoQError` where the folder cannot be written.
    """
    digests = set(assignment.trained.values())
    if not digests:
        return
    wanted = missing(assignment)
    try:
        path_of("").parent.mkdir(parents=True, exist_ok=True)
        for digest, content in (fetch(wanted) if wanted else {}).items():
            write_atomically(path_of(digest), content)
        for digest in digests:
            path_of(digest).touch()
        _bound(path_of("").parent, {path_of(digest).name for digest in digests})
    except OSError as problem:
        raise AutoQError(f"trained layers cannot be written to the cache: {problem}") from problem


def _bound(folder: Path, needed: set[str]) -> None:
    """Remove files, those used longest ago first, until they take at most `LIMIT_BYTES`; none that is `needed`."""
    files = []
    for path in folder.iterdir():
        with contextlib.suppress(OSError):  # removed by another process meanwhile
            status = path.stat()
            files.append((status.st_mtime_ns, status.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= LIMIT_BYTES:
            return
        if path.name not in needed:
            with contextlib.suppress(OSError):
                path.unlink()
            total -= size
