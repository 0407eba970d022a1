"""Files that a study names, on machines that lack them: the model, texts, labelled examples, a device description.

The process that runs the study has them. It tells each by size and digest; a worker on another machine takes what is
there already, at the same path (a shared file system) or from an earlier fetch, and asks for the rest in chunks of
`CHUNK_BYTES`, which is all that is in memory of it on either side. Of several workers of a machine one fetches, under
a lock, and the others wait for it. What it fetches is in place once it is whole and its digests are right; of a fetch
that was cut off the finished files are kept, so the next one goes on.

A model's own folder is what is fetched, before any conversion: each machine converts, as it would its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock

from autoq import trained
from autoq.assignment import Assignment
from autoq.cache import cache_dir, write_atomically
from autoq.errors import AutoQError
from autoq.models.sources import PICKLES, resolve
from autoq.spec import DataSpec, StudySpec

CHUNK_BYTES = 16 * 2**20
REMEMBERED_BYTES = 2**20  # digests of files from this size on are kept, by path, size and time
_SHIPPED_TEXT = DataSpec().source


@dataclass(frozen=True)
class Entry:
    """One file of a parcel: its path in the parcel's folder, its size and the hex hash of its bytes."""

    name: str
    size: int
    digest: str


@dataclass(frozen=True)
class Parcel:
    """What one field of a spec names: a file (`single`) or a folder, at `path` on the machine of the study."""

    field: str
    path: str
    single: bool
    files: tuple[Entry, ...]

    @cached_property
    def key(self) -> str:
        """The name of its content."""
        told = json.dumps([asdict(file) for file in self.files])
        return hashlib.blake2b(told.encode(), digest_size=16).hexdigest()

    def within(self, folder: Path) -> Path:
        """What the spec is to name where the files are in `folder`."""
        return folder / self.files[0].name if self.single else folder


@dataclass(frozen=True)
class WantsParcels:
    """Asks for the parcels of the study."""


@dataclass(frozen=True)
class WantsChunk:
    """Asks for at most `CHUNK_BYTES` of a file from an offset on."""

    parcel: int
    file: int
    offset: int


@dataclass(frozen=True)
class WantsTrained:
    """Asks for the content of a trained layer."""

    digest: str


Wants = WantsParcels | WantsChunk | WantsTrained


# -- where the files are ------------------------------------------------------------------------------


def parcels(spec: StudySpec) -> tuple[Parcel, ...]:
    """What the study names of this machine's files. Reads all of them, but for those whose digest is known.

    Raises what `resolve` raises for the model, and `AutoQError` for files that cannot be read.
    """
    found = [("model.id", resolve(spec.model))]
    named = [(f"tasks.{name}.source", task.source) for name, task in spec.tasks.items()]
    if spec.data.source != _SHIPPED_TEXT:
        named.append(("data.source", spec.data.source))
    if spec.target.device is not None:
        named.append(("target.device", spec.target.device))
    found += [(field, path) for field, text in named if (path := Path(text).expanduser()).exists()]
    try:
        return tuple(_parcel(field, path.absolute()) for field, path in found)
    except OSError as problem:
        raise AutoQError(f"a file of the study cannot be read: {problem}") from None


def _parcel(field: str, path: Path) -> Parcel:
    folder, single = (path.parent, True) if path.is_file() else (path, False)
    files = [path] if single else _model_files(path) if field == "model.id" else _all_files(path)
    entries = [Entry(file.relative_to(folder).as_posix(), file.stat().st_size, digest(file)) for file in files]
    return Parcel(field, str(path), single, tuple(entries))


def _model_files(folder: Path) -> list[Path]:
    """What a checkpoint is read from: no pickles, nothing below."""
    return sorted(file for file in folder.iterdir() if file.is_file() and file.suffix not in (*PICKLES, ".gguf"))


def _all_files(folder: Path) -> list[Path]:
    hidden = (file for file in folder.rglob("*") if file.is_file())
    return sorted(file for file in hidden if not any(part[0] == "." for part in file.relative_to(folder).parts))


def digest(file: Path) -> str:
    """The hex hash of a file's bytes; of a large one that has not changed, as it was found before."""
    status = file.stat()
    told = f"{file.resolve()} {status.st_size} {status.st_mtime_ns} {status.st_ino}"
    known = cache_dir() / "digests" / hashlib.blake2b(told.encode(), digest_size=16).hexdigest()
    with contextlib.suppress(OSError):
        if status.st_size >= REMEMBERED_BYTES and re.fullmatch(r"[0-9a-f]{40}", text := known.read_text()):
            return text
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, _hasher).hexdigest()
    if status.st_size >= REMEMBERED_BYTES:
        with contextlib.suppress(OSError):  # a cache that cannot be written costs time only
            known.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(known, found.encode())
    return found


def supply(wants: WantsChunk | WantsTrained, own: Sequence[Parcel]) -> bytes:
    """What a worker asks for, of this machine's files. Raises `AutoQError` for what cannot be read."""
    try:
        if isinstance(wants, WantsTrained):
            return trained.path_of(wants.digest).read_bytes()
        parcel = own[wants.parcel]
        root = Path(parcel.path).parent if parcel.single else Path(parcel.path)
        with (root / parcel.files[wants.file].name).open("rb") as opened:
            opened.seek(wants.offset)
            return opened.read(CHUNK_BYTES)
    except OSError as problem:
        raise AutoQError(f"a file that a worker on another machine needs cannot be read: {problem}") from None


# -- where they are needed ----------------------------------------------------------------------------


def placed(spec: StudySpec, own: Sequence[Parcel]) -> Generator[Wants, bytes, StudySpec]:
    """`spec` with the paths of this machine, once all files are here; yields what is asked for, is sent what that is.

    Raises `AutoQError` where the cache has no room, and for a file that changes meanwhile.
    """
    for number, parcel in enumerate(own):
        path = yield from _path(number, parcel)
        spec = _naming(spec, parcel.field, str(path))
    return spec


def _naming(spec: StudySpec, field: str, path: str) -> StudySpec:
    section, _, name = field.partition(".")
    if section == "tasks":  # tasks.NAME.source, whose name may have dots
        name = name.removesuffix(".source")
        task = spec.tasks[name].model_copy(update={"source": path})
        return spec.model_copy(update={"tasks": {**spec.tasks, name: task}})
    changed: dict[str, str | None] = {name: path}
    if section == "model":
        changed["revision"] = None
    return spec.model_copy(update={section: getattr(spec, section).model_copy(update=changed)})


def _path(number: int, parcel: Parcel) -> Generator[Wants, bytes, Path]:
    root = Path(parcel.path).parent if parcel.single else Path(parcel.path)
    if _holds(root, parcel):
        return Path(parcel.path)
    target = cache_dir() / "fetched" / parcel.key
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.with_name(f".{parcel.key}.lock")):
            if not _holds(target, parcel):
                shutil.rmtree(target, ignore_errors=True)
                yield from _fetch(number, parcel, target)
    except OSError as problem:
        raise AutoQError(
            f"{parcel.field}: {parcel.path!r} is not on this machine and cannot be put into its cache "
            f"{str(cache_dir())!r}: {problem.strerror or problem}"
        ) from None
    return parcel.within(target)


def _holds(folder: Path, parcel: Parcel) -> bool:
    """Whether the parcel's files are in a folder, byte for byte."""
    try:
        return all((folder / file.name).stat().st_size == file.size for file in parcel.files) and all(
            digest(folder / file.name) == file.digest for file in parcel.files
        )
    except OSError:
        return False


def _fetch(number: int, parcel: Parcel, target: Path) -> Generator[Wants, bytes, None]:
    partial = target.with_name(f".{parcel.key}.partial")
    for place, file in enumerate(parcel.files):
        path = partial / file.name
        if path.is_file():
            continue  # it got its name when it was whole
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(path.name + ".part")
        hasher, offset = _hasher(), 0
        with part.open("wb") as opened:
            while offset < file.size:
                chunk = yield WantsChunk(number, place, offset)
                if not chunk:
                    break
                hasher.update(chunk)
                opened.write(chunk)
                offset += len(chunk)
        if hasher.hexdigest() != file.digest:
            raise AutoQError(f"{parcel.field}: {file.name!r} of {parcel.path!r} changed while it was fetched")
        part.replace(path)
    partial.rename(target)


def trained_layers(assignment: Assignment) -> Generator[Wants, bytes, None]:
    """Have the assignment's trained layers on this machine."""
    if not assignment.trained:
        return
    try:
        trained.path_of("").parent.mkdir(parents=True, exist_ok=True)
        for name in trained.missing(assignment):
            content = yield WantsTrained(name)
            write_atomically(trained.path_of(name), content)  # it is checked by whoever reads it
    except OSError as problem:
        raise AutoQError(f"trained layers cannot be written to the cache: {problem}") from None
    trained.place(assignment, lambda _: {})  # keeps the folder within its bounds


def _hasher() -> Any:
    return hashlib.blake2b(digest_size=20)
