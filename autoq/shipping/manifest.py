"""The manifest of an export: what it is, what was measured, and the hash of every file. No torch.

Whoever reads one trusts nothing in it: names of files must lie in the folder, sizes of what is parsed
are bounded, and every field has its type.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from autoq.assignment import Assignment
from autoq.errors import AutoQError, BadInput, ExportBroken
from autoq.spec_errors import one_line

MANIFEST, ASSIGNMENT, CARD, PICTURE = "autoq.json", "assignment.json", "README.md", "frontier.svg"
_LIMIT_BYTES = 64 << 20  # a manifest or assignment larger than this is none
_CHUNK = 1 << 20

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class FileEntry(_Part):
    """One file of the export: its bytes and its SHA-256."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class Promise(_Part):
    """One measurement of the exported trial, as the store holds it."""

    value: float
    stderr: float | None
    unit: str
    kind: Literal["measured", "predicted", "computed"]
    part: Literal["search", "report"]
    n: int
    device: str
    detail: dict[str, Any]


class Manifest(_Part):
    """Everything about an export but its tensors.

    `files` are all files of the folder but the manifest; `weights` those whose bytes are the
    checkpoint's size. `spec` is the study's, with `target` for the runtime that the files are for.
    `searched_on` is the target of the study, whose kernels the latencies are of. `report_tokens` is
    the SHA-256 of the token ids that quality was reported on.
    """

    format: Literal[1] = 1
    autoq: str
    created: str
    study: str
    trial: int
    target: str
    searched_on: str
    runtime: str
    written_as: str
    run: str
    spec: dict[str, Any]
    hash: str
    size_bytes: float
    other_bytes: int
    measurements: dict[str, Promise]
    weights: tuple[str, ...]
    report_tokens: Sha256
    versions: dict[str, str]
    noise: dict[str, float]
    files: dict[str, FileEntry]


def digest(path: Path) -> FileEntry:
    """Size and hash of one file."""
    sha256, size = hashlib.sha256(), 0
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            size += len(chunk)
    return FileEntry(bytes=size, sha256=sha256.hexdigest())


def files_of(folder: Path) -> dict[str, Path]:
    """Every file below `folder` but the manifest, by its relative name. Raises `ExportBroken` for a link or
    anything that is neither a file nor a folder: what it leads to is not what was written."""
    found = {}
    for root, _, names in os.walk(folder):
        for name in names:
            path = Path(root) / name
            relative = path.relative_to(folder).as_posix()
            if not stat.S_ISREG(path.lstat().st_mode):
                raise ExportBroken(f"{relative} is not a plain file")
            if relative != MANIFEST:
                found[relative] = path
    return found


def write(folder: Path, manifest: Manifest) -> None:
    """Put the manifest into its folder, as the last file."""
    (folder / MANIFEST).write_text(json.dumps(manifest.model_dump(), indent=1, ensure_ascii=False), encoding="utf-8")


def _read_json(folder: Path, name: str) -> Any:
    path = folder / name
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise ExportBroken(f"{name} is not a plain file")
        if path.stat().st_size > _LIMIT_BYTES:
            raise ExportBroken(f"{name} has {path.stat().st_size} bytes; it cannot be one of AutoQ's")
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as problem:
        raise ExportBroken(f"{name} cannot be read: {problem}") from None


def read(folder: Path) -> Manifest:
    """The manifest of an export. Raises `BadInput` where `folder` is none, `ExportBroken` where its manifest
    is not whole or names files outside."""
    if not (folder / MANIFEST).is_file():
        raise BadInput(f"{str(folder)!r} is not an export of AutoQ: it has no {MANIFEST}")
    try:
        manifest = Manifest.model_validate(_read_json(folder, MANIFEST))
    except ValidationError as problem:
        raise ExportBroken(f"{MANIFEST} is not a manifest: {one_line(problem, Manifest)}") from None
    for name in (*manifest.files, *manifest.weights):
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name or name in ("", ".", MANIFEST):
            raise ExportBroken(f"{MANIFEST} names a file outside of the export: {name[:80]!r}")
    return manifest


def read_assignment(folder: Path, manifest: Manifest) -> Assignment:
    """The exported assignment. Raises `ExportBroken` where it is not the one of the manifest."""
    tree = _read_json(folder, ASSIGNMENT)
    try:
        assignment = Assignment.from_dict(tree)
    except (AutoQError, AttributeError, TypeError, ValueError) as problem:
        raise ExportBroken(f"{ASSIGNMENT} is not an assignment: {problem}") from None
    if assignment.hash != manifest.hash:
        raise ExportBroken(f"{ASSIGNMENT} is not the assignment that {MANIFEST} names")
    return assignment


def changed_files(folder: Path, expected: Mapping[str, FileEntry]) -> list[str]:
    """Files that are missing, shorter or longer, changed, or not of the export; one line each."""
    lines, found = [], files_of(folder)
    for name, entry in sorted(expected.items()):
        if name not in found:
            lines.append(f"{name} is missing")
        elif (size := found[name].stat().st_size) != entry.bytes:
            lines.append(f"{name} has {size} bytes, not {entry.bytes}")
        elif digest(found[name]) != entry:
            lines.append(f"{name} was changed: another SHA-256")
    return lines + [f"{name} is not of this export" for name in sorted(set(found) - set(expected))]
