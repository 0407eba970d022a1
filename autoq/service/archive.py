"""A folder as one tar file, sent while it is read: nothing is packed on disk or in memory."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import Path

_CHUNK = 1 << 20
_BLOCK = 512


def plan(folder: Path, name: str) -> list[tuple[Path, bytes, int]]:
    """The regular files below a folder, each with its header under `name/` and its bytes; links are left out."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_symlink() or not path.is_file():
            continue
        status = path.stat()
        entry = tarfile.TarInfo(f"{name}/{path.relative_to(folder).as_posix()}")
        entry.size, entry.mtime, entry.mode = status.st_size, int(status.st_mtime), 0o644
        found.append((path, entry.tobuf(tarfile.PAX_FORMAT), status.st_size))
    return found


def length(files: list[tuple[Path, bytes, int]]) -> int:
    """How long the tar file will be."""
    return sum(len(header) + -(-size // _BLOCK) * _BLOCK for _, header, size in files) + 2 * _BLOCK


def content(files: list[tuple[Path, bytes, int]]) -> Iterator[bytes]:
    """The tar file in pieces. A file that has become shorter meanwhile breaks it off."""
    for path, header, size in files:
        yield header
        left = size
        with path.open("rb") as file:
            while left and (piece := file.read(min(left, _CHUNK))):
                left -= len(piece)
                yield piece
        if left:
            raise OSError(f"{path.name} has become shorter")
        yield b"\0" * (-size % _BLOCK)
    yield b"\0" * (2 * _BLOCK)
