"""The bank: quantized layers on disk, made once and shared by all workers of a node.

An entry is a safetensors file named after what determines its content: the weight's hash, the scheme, the
calibration and the method's version. Entries are never changed, so writers cannot disagree: each writes a
temporary file and moves it into place. A reader checks an entry's checksum, and drops and rebuilds what does
not hold. Nothing is ever unpickled.

The folder holds at most `disk_bytes`. What was used longest ago goes first, by modification time, which each
use sets. The folder is listed only when this process has written a sixteenth of the limit since it last
looked, and is then brought down to three quarters: so one to four writers stay within the limit, and each
writer more may exceed it by a sixteenth for a moment.

Where a study's workers are on several machines, their banks are *neighbours*: what one has made another fetches, if
making it takes more than `ASK_SECONDS` by what this process has seen of the scheme's method.

An instance serves one thread.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from autoq import plugins
from autoq.cache import entry_path, write_atomically
from autoq.errors import AutoQError, SchemeRefused
from autoq.methods import Method, QuantizedWeight, Statistics
from autoq.methods._weights import restore
from autoq.scheme import Keep, Scheme

_SUFFIX = ".safetensors"
ASK_SECONDS = 0.05  # a layer that is made faster than that is not worth a question
_LEFTOVER_SECONDS = 3600.0  # a temporary file older than this belongs to a writer that died
_BROKEN = (SafetensorError, SchemeRefused, ValueError, KeyError, TypeError)
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def weight_hash(weight: Tensor) -> str:
    """Hex hash of a weight's numbers, shape and dtype, whatever its strides."""
    digest = _hasher()
    digest.update(f"{weight.dtype} {tuple(weight.shape)}".encode())
    digest.update(_bytes(weight))
    return digest.hexdigest()


def key(weight_hash: str, scheme: Scheme, calibration: str, version: int) -> str:
    """The name of the entry for these inputs; `version` is the method's."""
    return _hasher("\n".join((weight_hash, str(scheme), calibration, str(version))).encode()).hexdigest()


class Neighbours(Protocol):
    """The banks of other machines."""

    def fetch(self, name: str) -> bytes | None:
        """The content of an entry, once another machine has it. None: none has or makes it, so it is made here."""

    def has(self, name: str) -> None:
        """This bank has an entry."""

    def failed(self, name: str) -> None:
        """An entry that was to be made here was not, or not stored."""


class Bank:
    """Quantized weights by content in the folder `root`, and dequantized ones in this process.

    `hits` counts entries read from disk, `misses` those that were not there or did not hold, `made` weights
    quantized here, `fetched` those that came from `neighbours`, `evicted` entries that this process removed for
    room, `corrupt` those that failed their check. `disk_full` counts entries that were not stored because the
    disk or the limit had no room.
    Raises `AutoQError` where the folder cannot be made.
    """

    key = staticmethod(key)
    weight_hash = staticmethod(weight_hash)

    def __init__(self, root: Path, disk_bytes: int, memory_bytes: int) -> None:
        self._root, self._disk_bytes, self._memory_bytes = Path(root), disk_bytes, memory_bytes
        self.hits = self.misses = self.made = self.fetched = self.evicted = self.corrupt = self.disk_full = 0
        self.neighbours: Neighbours | None = None
        self.ask_seconds = ASK_SECONDS
        self._paces: dict[str, float] = {}  # method -> seconds per weight, of the last one made
        # As if all was written here already: the first write looks at what others left.
        self._written = disk_bytes
        self._memory: OrderedDict[tuple[str, torch.dtype, torch.device], Tensor] = OrderedDict()
        self._memory_used = 0
        try:
            self._root.mkdir(parents=True, exist_ok=True)
        except OSError as problem:
            raise AutoQError(f"the bank's folder {str(root)!r} cannot be made: {problem.strerror}") from None

    def quantized(
        self,
        weight: Tensor,
        weight_hash: str,
        scheme: Scheme,
        statistics: Callable[[], Statistics] | None = None,
        calibration: str = "",
    ) -> QuantizedWeight:
        """`weight` (out, in) under `scheme`: from disk, or made by the scheme's method and stored.

        `statistics` gives what the method uses beside the weight; `calibration` is what that is known by.

        Raises what the method raises: `UnknownName`, `SchemeRefused`, `NotFinite`.
        """
        method = plugins.load("methods", scheme.method, Method)
        if isinstance(scheme, Keep):
            return method.quantize(weight, scheme)  # the model has it; a copy would cost and save nothing
        name = self.key(weight_hash, scheme, calibration, method.version)
        shape = (weight.shape[0], weight.shape[1])
        dear = self._paces.get(scheme.method, float("inf")) * weight.numel() > self.ask_seconds
        neighbours = self.neighbours if dear else None
        found = self._read(self._path(name), scheme, shape)
        if found is not None:
            self.hits += 1
            if neighbours is not None:
                neighbours.has(name)
            return found
        self.misses += 1
        if neighbours is not None and (found := self._fetch(neighbours, name, scheme, shape)) is not None:
            return found
        start, stored = time.perf_counter(), False
        try:
            result = method.quantize(weight, scheme, statistics() if statistics is not None else None)
            self.made += 1
            self._paces[scheme.method] = (time.perf_counter() - start) / weight.numel()
            stored = self._write(self._path(name), pack(result))
        finally:
            if neighbours is not None:
                (neighbours.has if stored else neighbours.failed)(name)
        return result

    def _fetch(
        self, neighbours: Neighbours, name: str, scheme: Scheme, shape: tuple[int, int]
    ) -> QuantizedWeight | None:
        """The entry of another machine, which is then here too; None where it is to be made, or does not hold."""
        content = neighbours.fetch(name)
        if content is None:
            return None
        try:
            found = _parse(content, scheme, shape)
        except _BROKEN:
            self.corrupt += 1
            return None
        self.fetched += 1
        if self._write(self._path(name), content):
            neighbours.has(name)
        return found

    def dequantized(
        self,
        weight: Tensor,
        weight_hash: str,
        scheme: Scheme,
        dtype: torch.dtype,
        statistics: Callable[[], Statistics] | None = None,
        calibration: str = "",
    ) -> Tensor:
        """The numbers of `weight` under `scheme`, (out, in), on the weight's device; not to be written to.

        The most recent ones, up to `memory_bytes`, are kept: asking again for one of them costs nothing.
        """
        if isinstance(scheme, Keep):
            return self.quantized(weight, weight_hash, scheme).dequantize(dtype).to(weight.device)
        version = plugins.load("methods", scheme.method, Method).version
        name = (self.key(weight_hash, scheme, calibration, version), dtype, weight.device)
        if (kept := self._memory.get(name)) is not None:
            self._memory.move_to_end(name)
            return kept
        quantized = self.quantized(weight, weight_hash, scheme, statistics, calibration)
        values = quantized.dequantize(dtype).to(weight.device)
        if values.nbytes <= self._memory_bytes:
            self._memory[name] = values
            self._memory_used += values.nbytes
            while self._memory_used > self._memory_bytes:
                _, oldest = self._memory.popitem(last=False)
                self._memory_used -= oldest.nbytes
        return values

    def _path(self, name: str) -> Path:
        return entry_path(self._root, name)

    def _read(self, path: Path, scheme: Scheme, shape: tuple[int, int]) -> QuantizedWeight | None:
        """The entry at `path`, or None where there is none that holds; one that does not is removed."""
        try:
            # Read, not mapped: a mapped file that is cut short underneath would kill the process.
            result = _parse(path.read_bytes(), scheme, shape)
        except FileNotFoundError:
            return None
        except (OSError, *_BROKEN):
            self.corrupt += 1
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        with contextlib.suppress(OSError):  # evicted by another worker, or a disk that cannot be written
            os.utime(path)
        return result

    def _write(self, path: Path, content: bytes) -> bool:
        """Store an entry, and whether there was room. A full disk is counted, not raised: the result is at hand."""
        try:
            if not self._make_room(len(content)):
                self.disk_full += 1
                return False
            path.parent.mkdir(exist_ok=True)
            write_atomically(path, content)
        except FileNotFoundError:
            return False  # another process took our temporary file for a leftover: its clock is ahead
        except OSError as problem:
            if problem.errno not in _FULL:
                raise AutoQError(f"the bank cannot write to {str(self._root)!r}: {problem.strerror}") from problem
            self.disk_full += 1
            return False
        self._written += len(content)
        return True

    def _make_room(self, size: int) -> bool:
        """Whether `size` more bytes fit, after removing what was used longest ago if need be."""
        if size > self._disk_bytes * 3 // 4:
            return False
        if self._written + size > self._disk_bytes // 16:
            self._evict(self._disk_bytes * 3 // 4 - size)
            self._written = 0
        return True

    def _evict(self, limit: int) -> None:
        """Remove entries, those used longest ago first, until they take at most `limit` bytes."""
        entries: list[tuple[float, int, str]] = []
        abandoned = time.time() - _LEFTOVER_SECONDS
        for folder in self._root.glob("[0-9a-f][0-9a-f]"):
            with contextlib.suppress(OSError), os.scandir(folder) as files:
                for file in files:
                    with contextlib.suppress(OSError):  # removed by another worker meanwhile
                        status = file.stat()
                        if file.name.endswith(_SUFFIX):
                            entries.append((status.st_mtime, status.st_size, file.path))
                        elif file.name.endswith(".tmp") and status.st_mtime < abandoned:
                            Path(file.path).unlink()
        total = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if total <= limit:
                break
            with contextlib.suppress(OSError):
                Path(path).unlink()
                self.evicted += 1
            total -= size


def digest(weight: QuantizedWeight) -> str:
    """What names a quantized weight that no method makes again: the hex hash of its scheme, shape and tensors."""
    return _checksum(weight.scheme, weight.shape, weight.tensors)


def pack(weight: QuantizedWeight) -> bytes:
    """A quantized weight as the content of a safetensors file."""
    metadata = {"scheme": str(weight.scheme), "shape": json.dumps(weight.shape), "checksum": digest(weight)}
    content: bytes = safetensors.torch.save(dict(weight.tensors), metadata)
    return content


def unpack(content: bytes, scheme: Scheme, shape: tuple[int, int], expected: str) -> QuantizedWeight:
    """The inverse of `pack`, for the weight whose digest is `expected`. Raises `AutoQError` for anything else."""
    try:
        found = _parse(content, scheme, shape)
    except _BROKEN as problem:
        line = " ".join(str(problem).split())[:300]  # it quotes them
        raise AutoQError(f"trained weights {expected[:12]}… as {scheme} are damaged: {line}") from problem
    if digest(found) != expected:
        raise AutoQError(f"trained weights {expected[:12]}… as {scheme} are damaged: they are others")
    return found


def _parse(content: bytes, scheme: Scheme, shape: tuple[int, int]) -> QuantizedWeight:
    """The quantized weight in an entry's bytes. Raises one of `_BROKEN` where they are not what was written."""
    tensors = safetensors.torch.load(content)
    length = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + length])["__metadata__"]
    if metadata["checksum"] != _checksum(scheme, shape, tensors):
        raise ValueError("the checksum does not match")
    return restore(scheme, shape, tensors)


def _checksum(scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> str:
    """Hex hash of all that an entry says: scheme, shape, and each tensor's name, dtype, shape and bytes."""
    digest = _hasher(f"{scheme} {tuple(shape)}".encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    """A tensor's bytes in row order, without a copy if it is contiguous and on the CPU."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().data


def _hasher(start: bytes = b"") -> hashlib.blake2b:
    return hashlib.blake2b(start, digest_size=20)
