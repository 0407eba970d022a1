"""The header of a GGUF file: what it says of its tensors, without reading any of them.

Format: ggml's docs/gguf.md, versions 2 and 3, little-endian. Metadata that nobody here asks for is
skipped, and every length is held against what the file has left, so that a damaged file ends in one line.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from autoq.errors import BadInput
from autoq.recipes._files import shown
from autoq.scheme import GGUF_TYPES

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
# Value type -> struct format: u8 i8 u16 i16 u32 i32 f32 bool, u64 i64 f64.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_MAX_NAME = 65535
_MAX_DIMENSIONS = 4
_ALIGNMENT = 32

# Names by the numbers of ggml.h (enum ggml_type): 0 to 23, then those after the plain integers.
_FIRST_TYPES = (
    "f32 f16 q4_0 q4_1 q4_2 q4_3 q5_0 q5_1 q8_0 q8_1 q2_k q3_k q4_k q5_k q6_k q8_k "
    "iq2_xxs iq2_xs iq3_xxs iq1_s iq4_nl iq3_s iq2_s iq4_xs"
)
_LATER_TYPES = {29: "iq1_m", 30: "bf16", 34: "tq1_0", 35: "tq2_0", 39: "mxfp4", 40: "nvfp4"}
_TYPES = dict(enumerate(_FIRST_TYPES.split())) | _LATER_TYPES
_SIZES = {**GGUF_TYPES, "f32": (1, 4)}  # type -> weights and bytes per block, of the types that schemes name


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's name, its shape as (in, out, …), and its type as ggml names it, in lower case."""

    name: str
    shape: tuple[int, ...]
    type: str


@dataclass(frozen=True)
class Header:
    """What a file says of itself. `imatrix` tells that codes were chosen with an importance matrix."""

    architecture: str
    imatrix: bool
    parts: int
    tensors: tuple[TensorInfo, ...]


def read_header(path: Path) -> Header:
    """The header of a GGUF file. Raises `BadInput` for one that is damaged, cut off or of another version."""
    with path.open("rb") as file:
        return _Reader(file, path.stat().st_size).header()


class _Reader:
    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file = file
        self._left = size
        self._size = size

    def header(self) -> Header:
        if self._take(4) != MAGIC:
            raise BadInput("is not a GGUF file")
        version = self._number("I")
        if version not in _VERSIONS:
            raise BadInput(f"is GGUF version {version}; choose a little-endian file of version 2 or 3")
        tensor_count, field_count = self._number("Q"), self._number("Q")
        fields: dict[str, object] = {}
        for _ in range(field_count):
            key = self._text()
            fields[key] = self._value(self._number("I"))
        found = [self._tensor() for _ in range(tensor_count)]
        alignment = _whole(fields, "general.alignment", _ALIGNMENT)
        if alignment < 1:
            raise BadInput(f"is damaged: general.alignment is {alignment}")
        start = -(-(self._size - self._left) // alignment) * alignment
        for info, offset in found:
            self._check_extent(info, start + offset)
        architecture = fields.get("general.architecture")
        if not isinstance(architecture, str):
            raise BadInput("is damaged: it names no general.architecture")
        imatrix = any(key.startswith("quantize.imatrix.") for key in fields)
        parts = _whole(fields, "split.count", 1)
        return Header(architecture, imatrix, parts, tuple(info for info, _ in found))

    def _take(self, count: int) -> bytes:
        self._claim(count)
        return self._file.read(count)

    def _claim(self, count: int) -> None:
        if count > self._left:
            raise BadInput("is cut off or damaged: its header goes beyond its end")
        self._left -= count

    def _number(self, code: str) -> int:
        form = f"<{code}"
        value: int = struct.unpack(form, self._take(struct.calcsize(form)))[0]
        return value

    def _text(self) -> str:
        length = self._number("Q")
        if length > _MAX_NAME:
            raise BadInput(f"is damaged: a name of {length} bytes in its header")
        return self._take(length).decode("utf-8", errors="replace")

    def _skip(self, count: int) -> None:
        self._claim(count)
        self._file.seek(count, 1)

    def _value(self, kind: int) -> object:
        """A scalar or a short text; None for an array or a long text, which is skipped."""
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            length = self._number("Q")
            if length <= _MAX_NAME:
                return self._take(length).decode("utf-8", errors="replace")
            self._skip(length)
            return None
        if kind != _ARRAY:
            raise BadInput(f"is damaged: metadata of the unknown type {kind}")
        element, count = self._number("I"), self._number("Q")
        if element in _SCALARS:
            self._skip(count * struct.calcsize(f"<{_SCALARS[element]}"))
        elif element == _STRING:
            for _ in range(count):
                self._skip(self._number("Q"))
        else:
            raise BadInput(f"is damaged: an array of the unknown type {element}")
        return None

    def _tensor(self) -> tuple[TensorInfo, int]:
        name = self._text()
        dimensions = self._number("I")
        if dimensions > _MAX_DIMENSIONS:
            raise BadInput(f"is damaged: tensor {shown(name)} has {dimensions} dimensions")
        shape = tuple(self._number("Q") for _ in range(dimensions))
        number, offset = self._number("I"), self._number("Q")
        return TensorInfo(name, shape, _TYPES.get(number, f"number {number}")), offset

    def _check_extent(self, info: TensorInfo, offset: int) -> None:
        weights = 1
        for length in info.shape:
            weights *= length
        block, size = _SIZES.get(info.type, (1, 0))
        if offset + weights // block * size > self._size:
            raise BadInput(f"is cut off: tensor {shown(info.name)} ends beyond its {self._size} bytes")


def _whole(fields: Mapping[str, object], key: str, default: int) -> int:
    value = fields.get(key, default)
    return value if isinstance(value, int) else default
