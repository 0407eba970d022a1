"""Schemes: how one layer is represented.

A scheme is a small frozen value, one class per kind, with a text form that is its identity in specs,
databases and file names:

    keep                          the layer as it is
    rtn-int4-g64                  4 bits, groups of 64 inputs, a scale and an integer zero point each
    rtn-int4-g64-sym              the same without zero points (symmetric)
    hqq-int3-g64-rz               a real-valued zero point, as HQQ defines it
    rtn-int8-channel-sym          one scale per output row
    rtn-int8-channel-sym-a8dyn    and activations quantized to 8 bits on the fly
    kmeans4-channel               16 centroids per output row; kmeans4-tensor shares them

The text form is canonical: `parse_scheme(str(s)) == s`. Sizes are exact: every code, scale, zero
point and codebook entry that ships. Scales, real zero points and centroids are 16 bits wide
(bfloat16); codes and integer zero points are packed as a bit stream per row, each row padded to a
byte. This module knows no torch.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Literal

from autoq.errors import BadInput

ZeroPoint = Literal["none", "integer", "real"]
Activation = Literal["a8dyn"]

PARAMETER_BITS = 16  # a scale, a real zero point, a centroid: bfloat16
MIN_BITS, MAX_BITS = 2, 8


@dataclass(frozen=True, order=True)
class PerTensor:
    """One set of parameters for the whole weight."""

    def __str__(self) -> str:
        return "tensor"


@dataclass(frozen=True, order=True)
class PerChannel:
    """One set of parameters per output row."""

    def __str__(self) -> str:
        return "channel"


@dataclass(frozen=True, order=True)
class PerGroup:
    """One set of parameters per `size` consecutive inputs of an output row."""

    size: int

    def __post_init__(self) -> None:
        if self.size < 2:
            raise BadInput(f"group size {self.size} is too small; the least is 2")

    def __str__(self) -> str:
        return f"g{self.size}"


Granularity = PerTensor | PerChannel | PerGroup


def _groups_per_row(granularity: Granularity, in_features: int) -> int:
    """Parameter sets per row. A group size must divide the row; who asks has checked that."""
    if isinstance(granularity, PerGroup):
        assert in_features % granularity.size == 0, (granularity, in_features)
        return in_features // granularity.size
    return 1


def _packed_row_bytes(count: int, bits: int) -> int:
    """Bytes of `count` codes of `bits` bits, packed and padded to a byte."""
    return (count * bits + 7) // 8


@dataclass(frozen=True)
class Keep:
    """The layer stays as it is in the model."""

    method = "keep"

    def __str__(self) -> str:
        return "keep"

    def nbytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """Bytes that ship for a weight of shape (out, in) that has `dtype_bytes` per element."""
        return out_features * in_features * dtype_bytes


@dataclass(frozen=True)
class Integer:
    """Uniform integer levels: weight = (code - zero) * scale per group, channel or tensor."""

    method: str
    bits: int
    granularity: Granularity
    zero: ZeroPoint = "integer"
    activation: Activation | None = None

    def __post_init__(self) -> None:
        _check_bits(self.bits)

    def __str__(self) -> str:
        text = f"{self.method}-int{self.bits}-{self.granularity}"
        text += {"none": "-sym", "integer": "", "real": "-rz"}[self.zero]
        return text + (f"-{self.activation}" if self.activation else "")

    def nbytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """Bytes that ship for a weight of shape (out, in): codes, scales and zero points."""
        if isinstance(self.granularity, PerTensor):
            rows, groups = 1, 1
        else:
            rows, groups = out_features, _groups_per_row(self.granularity, in_features)
        codes = out_features * _packed_row_bytes(in_features, self.bits)
        scales = rows * groups * PARAMETER_BITS // 8
        zeros = {
            "none": 0,
            "integer": rows * _packed_row_bytes(groups, self.bits),
            "real": rows * groups * PARAMETER_BITS // 8,
        }[self.zero]
        return codes + scales + zeros


@dataclass(frozen=True)
class Codebook:
    """Non-uniform levels: weight = centroid[code], 2**bits centroids per group, channel or tensor."""

    method: str
    bits: int
    granularity: Granularity

    def __post_init__(self) -> None:
        _check_bits(self.bits)

    def __str__(self) -> str:
        return f"{self.method}{self.bits}-{self.granularity}"

    def nbytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """Bytes that ship for a weight of shape (out, in): codes and centroids."""
        if isinstance(self.granularity, PerTensor):
            books = 1
        else:
            books = out_features * _groups_per_row(self.granularity, in_features)
        codes = out_features * _packed_row_bytes(in_features, self.bits)
        return codes + books * (1 << self.bits) * PARAMETER_BITS // 8


Scheme = Keep | Integer | Codebook

_INTEGER = re.compile(
    r"(?P<method>[a-z][a-z_]*)-int(?P<bits>\d)-(?P<granularity>tensor|channel|g\d{1,6})"
    r"(?P<zero>-sym|-rz)?(?:-(?P<activation>a8dyn))?",
    re.ASCII,
)
_CODEBOOK = re.compile(r"(?P<method>[a-z][a-z_]*)(?P<bits>\d)-(?P<granularity>tensor|channel|g\d{1,6})", re.ASCII)
_FORMS = "keep, METHOD-intB-G[-sym|-rz][-a8dyn] or METHODB-G, where G is gSIZE, channel or tensor"


def _check_bits(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise BadInput(f"{bits} bits is out of range; choose from {MIN_BITS} to {MAX_BITS}")


def _granularity(text: str) -> Granularity:
    if text == "tensor":
        return PerTensor()
    if text == "channel":
        return PerChannel()
    if text.startswith("g0"):
        raise BadInput(f"group size in {text!r} must not start with 0")
    return PerGroup(int(text[1:]))


@functools.lru_cache(maxsize=4096)
def parse_scheme(text: str) -> Scheme:
    """The scheme that `text` names.

    Raises `BadInput` for a text that is not of a known form. Whether the method exists is not asked
    here; `autoq.spec` does that.
    """
    if text == "keep":
        return Keep()
    if found := _INTEGER.fullmatch(text):
        zero: ZeroPoint = {"-sym": "none", "-rz": "real"}.get(found["zero"] or "", "integer")  # type: ignore[assignment]
        activation: Activation | None = "a8dyn" if found["activation"] else None
        return Integer(found["method"], int(found["bits"]), _granularity(found["granularity"]), zero, activation)
    if found := _CODEBOOK.fullmatch(text):
        return Codebook(found["method"], int(found["bits"]), _granularity(found["granularity"]))
    raise BadInput(f"scheme {text[:80]!r} is not of a known form: {_FORMS}")


def code_bits(scheme: Scheme, dtype_bits: int = 16) -> int:
    """Width of one code in bits; the width of the model's own numbers for `keep`."""
    return dtype_bits if isinstance(scheme, Keep) else scheme.bits
