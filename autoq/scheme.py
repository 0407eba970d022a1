"""Schemes: how one layer is represented.

A scheme is a small frozen value, one class per kind, with a text form that is its identity in specs,
databases and file names:

    keep                          the layer as it is
    rtn-int4-g64                  4 bits, groups of 64 inputs, a scale and an integer zero point each
    rtn-int4-g64-sym              the same without zero points (symmetric)
    hqq-int3-g64-rz               a real-valued zero point, as HQQ defines it
    rtn-int8-channel-sym          one scale per output row
    rtn-int8-channel-sym-a8dyn    and activations quantized to 8 bits on the fly
    rtn-int8-channel-sym-a8static and activations quantized to 8 bits by a calibrated range, the whole one
    rtn-int8-channel-sym-a8pct    the same with the range of a percentile; a8mse: with the least squared
                                  error; a8ent: with the least divergence (entropy)
    kmeans4-channel               16 centroids per output row; kmeans4-tensor shares them
    nf4-g64, log4-g64             16 levels that nobody needs to ship, times a scale per group
    awq-int4-g64                  a scale per input too, by which the input is divided
    awq-int4-g64-fold             such scales, powers of two, folded into what makes the inputs: none ships
    rtn-fp8-channel-a8dyn         8-bit floats (E4M3) on both sides
    rtn-fp8-b128x128              8-bit floats, a scale per block of 128 outputs by 128 inputs
    rtn-fp8_e5m2-g128, rtn-fp4-g64  other elements (E5M2, E2M1) under bfloat16 scales
    rtn-mxfp8-g32, rtn-mxfp6_e2m3-g32, rtn-mxfp4-g32, rtn-nvfp4-g16  blocks that share a scale of 8 bits
    gguf-q4_k, gguf-q4_k-im       a block format of llama.cpp, without and with an importance matrix
    wanda24, magnitude50          pruned: 2 of every 4 inputs left, or 50 % of every row; what is left stays as it is
    wanda24-int4-g64              pruned, and what is left in 4 bits: rtn's integers

The text form is canonical: `parse_scheme(str(s)) == s`. Sizes are exact: every code, scale, zero
point and codebook entry that ships. Unless a format says otherwise, scales, real zero points and
centroids are 16 bits wide (bfloat16); codes and integer zero points are packed as a bit stream per
row, each row padded to a byte. Where weights are pruned, one bit per weight, packed alike, says which
are left. This module knows no torch.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from autoq.errors import BadInput
from autoq.granularity import Granularity as Granularity
from autoq.granularity import PerBlock as PerBlock
from autoq.granularity import PerChannel as PerChannel
from autoq.granularity import PerGroup as PerGroup
from autoq.granularity import PerTensor as PerTensor
from autoq.granularity import groups_per_row, parse_block, parse_granularity
from autoq.sparsity import Pattern, parse_pattern

ZeroPoint = Literal["none", "integer", "real"]
# Inputs in 8 bits too: by a range found while running (whose, the target says), or by a calibrated one.
Activation = Literal["a8dyn", "a8static", "a8pct", "a8mse", "a8ent"]
# What a kernel can tell apart: a calibrated range is one number to it, whoever found it.
KernelActivation = Literal["a8dyn", "a8static"]
FloatFormat = Literal[
    "fp8", "fp8_e5m2", "fp4", "mxfp8", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "nvfp4"
]  # fmt: skip

# Calibrated activations -> the observer (a file of autoq/calibration/observers) that finds their range.
OBSERVERS: Mapping[Activation, str] = {
    "a8static": "minmax",
    "a8pct": "percentile",
    "a8mse": "mse",
    "a8ent": "entropy",
}

PARAMETER_BITS = 16  # a scale, a real zero point, a centroid: bfloat16
MIN_BITS, MAX_BITS = 2, 8
# Methods whose integers have a scale per input, bfloat16, that the layer's input is divided by.
INPUT_SCALING = frozenset({"awq", "smooth"})


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
    """Uniform integer levels: weight = (code - zero) * scale per group, channel or tensor.

    By the method's name it `scales_inputs`: then weight = (code - zero) * scale / input scale. These scales ship with
    the layer, or are `folded` into what makes its inputs: then they are powers of two, and nothing of them ships.
    """

    method: str
    bits: int
    granularity: Granularity
    zero: ZeroPoint = "integer"
    activation: Activation | None = None
    folded: bool = False

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        if self.folded and not self.scales_inputs:
            raise BadInput(f"{self.method} has no scales of inputs to fold; {', '.join(sorted(INPUT_SCALING))} have")

    def __str__(self) -> str:
        text = f"{self.method}-int{self.bits}-{self.granularity}"
        text += {"none": "-sym", "integer": "", "real": "-rz"}[self.zero]
        return text + (f"-{self.activation}" if self.activation else "") + ("-fold" if self.folded else "")

    @property
    def scales_inputs(self) -> bool:
        """Whether the weight is that of inputs over scales of their own."""
        return self.method in INPUT_SCALING

    @property
    def ships_input_scales(self) -> bool:
        """Whether a scale per input ships beside the weight, which the kernel must divide the input by."""
        return self.scales_inputs and not self.folded

    def nbytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """Bytes that ship for a weight of shape (out, in): codes, scales, zero points and scales of inputs."""
        codes = out_features * _packed_row_bytes(in_features, self.bits)
        return codes + self.parameter_bytes(out_features, in_features)

    def parameter_bytes(self, out_features: int, in_features: int) -> int:
        """Bytes of the scales and zero points, of scales of inputs, and of a calibrated range."""
        if isinstance(self.granularity, PerTensor):
            rows, groups = 1, 1
        else:
            rows, groups = out_features, groups_per_row(self.granularity, in_features)
        scales = rows * groups * PARAMETER_BITS // 8
        zeros = {
            "none": 0,
            "integer": rows * _packed_row_bytes(groups, self.bits),
            "real": rows * groups * PARAMETER_BITS // 8,
        }[self.zero]
        inputs = in_features * PARAMETER_BITS // 8 if self.ships_input_scales else 0
        return scales + zeros + inputs + _static_scale_bytes(self.activation)


# The methods whose levels are fixed by their width. `nf4-g64` and `kmeans4-g64` have one form, and this tells
# them apart; it is the one place beside the method's file that knows of it.
FIXED_LEVELS = ("log", "nf")


@dataclass(frozen=True)
class Levels:
    """Fixed non-uniform levels times a scale: weight = scale * level[code], by a table of 2**bits numbers.

    A bfloat16 scale per group, channel or tensor; the table belongs to the method and does not ship.
    """

    method: str
    bits: int
    granularity: Granularity

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        if self.method not in FIXED_LEVELS:
            raise BadInput(f"{self.method!r:.40} has no fixed levels; choose from {', '.join(FIXED_LEVELS)}")

    def __str__(self) -> str:
        return f"{self.method}{self.bits}-{self.granularity}"

    def nbytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """Bytes that ship for a weight of shape (out, in): codes and scales."""
        scales = 1
        if not isinstance(self.granularity, PerTensor):
            scales = out_features * groups_per_row(self.granularity, in_features)
        return out_features * _packed_row_bytes(in_features, self.bits) + scales * PARAMETER_BITS // 8


@dataclass(frozen=True)
class Codebook:
    """Non-uniform levels: weight = centroid[code], 2**bits centroids per group, channel or tensor."""

    method: str
    bits: int
    granularity: Granularity

    def __post_init__(self) -> None:
        _check_bits(self.bits)
        if self.method in FIXED_LEVELS:
            raise BadInput(f"{self.method} has fixed levels and no codebook")

    def __str__(self) -> str:
        return f"{self.method}{self.bits}-{self.granularity}"

    def nbytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """Bytes that ship for a weight of shape (out, in): codes and centroids."""
        if isinstance(self.granularity, PerTensor):
            books = 1
        else:
            books = out_features * groups_per_row(self.granularity, in_features)
        codes = out_features * _packed_row_bytes(in_features, self.bits)
        return codes + books * (1 << self.bits) * PARAMETER_BITS // 8


@dataclass(frozen=True)
class FloatForm:
    """What a floating-point format is made of: the codes' element, their width, the scales, its own group."""

    element: Literal["e2m1", "e2m3", "e3m2", "e4m3", "e5m2"]
    bits: int
    scale: Literal["bfloat16", "e8m0", "e4m3"]
    group: int | None = None


FLOAT_FORMATS: dict[FloatFormat, FloatForm] = {
    "fp8": FloatForm("e4m3", 8, "bfloat16"),
    "fp8_e5m2": FloatForm("e5m2", 8, "bfloat16"),
    "fp4": FloatForm("e2m1", 4, "bfloat16"),
    "mxfp8": FloatForm("e4m3", 8, "e8m0", 32),
    "mxfp8_e5m2": FloatForm("e5m2", 8, "e8m0", 32),
    "mxfp6_e2m3": FloatForm("e2m3", 6, "e8m0", 32),
    "mxfp6_e3m2": FloatForm("e3m2", 6, "e8m0", 32),
    "mxfp4": FloatForm("e2m1", 4, "e8m0", 32),
    "nvfp4": FloatForm("e2m1", 4, "e4m3", 16),
}


@dataclass(frozen=True)
class Float:
    """Floating-point levels times a scale: weight = scale * float code.

    fp8, fp8_e5m2  E4M3 or E5M2 codes (OCP 8-bit floating point, 2023), a bfloat16 scale per channel, tensor,
                   group or block; blocks of 128x128 are DeepSeek-V3's
    fp4            E2M1 codes, a bfloat16 scale per channel, tensor or group
    mxfp8, mxfp8_e5m2, mxfp6_e2m3, mxfp6_e3m2, mxfp4
                   E4M3, E5M2, E2M3, E3M2, E2M1 codes, a power-of-two scale (E8M0, one byte) per 32 inputs
                   (OCP Microscaling v1.0)
    nvfp4          E2M1 codes, an E4M3 scale per 16 inputs, and one float32 scale for the whole tensor
    """

    method: str
    format: FloatFormat
    granularity: Granularity | PerBlock
    activation: Activation | None = None

    def __post_init__(self) -> None:
        own = self.form.group
        if own is not None and self.granularity != PerGroup(own):
            raise BadInput(f"{self.format} has its own granularity, {PerGroup(own)}, not {self.granularity}")
        if isinstance(self.granularity, PerBlock) and self.bits != 8:
            raise BadInput(f"{self.format} has a scale per channel, tensor or group, not per {self.granularity}")
        if self.activation is not None and self.format != "fp8":
            raise BadInput(f"{self.format} is a weight-only format here; leave {self.activation} out")
        if self.activation is not None and isinstance(self.granularity, PerGroup | PerBlock):
            raise BadInput(f"{self.activation} goes with a scale per channel or tensor, not per {self.granularity}")

    def __str__(self) -> str:
        text = f"{self.method}-{self.format}-{self.granularity}"
        return text + (f"-{self.activation}" if self.activation else "")

    @property
    def form(self) -> FloatForm:
        """What the format is made of."""
        return FLOAT_FORMATS[self.format]

    @property
    def bits(self) -> int:
        """Width of one code."""
        return self.form.bits

    def scale_grid(self, out_features: int, in_features: int) -> tuple[int, int]:
        """(rows, groups per row) of the scales that ship for a weight of shape (out, in)."""
        match self.granularity:
            case PerTensor():
                return 1, 1
            case PerBlock(rows, columns):
                return -(-out_features // rows), -(-in_features // columns)
            case granularity:
                return out_features, groups_per_row(granularity, in_features)

    def nbytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """Bytes that ship for a weight of shape (out, in): codes and scales."""
        codes = out_features * _packed_row_bytes(in_features, self.bits)
        rows, groups = self.scale_grid(out_features, in_features)
        scales = rows * groups * (PARAMETER_BITS // 8 if self.form.scale == "bfloat16" else 1)
        return codes + scales + (4 if self.format == "nvfp4" else 0) + _static_scale_bytes(self.activation)


def _static_scale_bytes(activation: Activation | None) -> int:
    """A calibrated range ships as one scale."""
    return PARAMETER_BITS // 8 if activation in OBSERVERS else 0


# Block formats of llama.cpp: type -> (weights per block, bytes per block), from ggml-common.h.
GGUF_TYPES: dict[str, tuple[int, int]] = {
    "f16": (1, 2),
    "bf16": (1, 2),
    "q8_0": (32, 34),
    "q6_k": (256, 210),
    "q5_k": (256, 176),
    "q5_1": (32, 24),
    "q5_0": (32, 22),
    "q4_k": (256, 144),
    "q4_1": (32, 20),
    "q4_0": (32, 18),
    "iq4_nl": (32, 18),
    "iq4_xs": (256, 136),
    "mxfp4": (32, 17),
    "q3_k": (256, 110),
    "iq3_s": (256, 110),
    "iq3_xxs": (256, 98),
    "q2_k": (256, 84),
}


@dataclass(frozen=True)
class Gguf:
    """A tensor type of llama.cpp: blocks of consecutive inputs of a row, each with scales of its own.

    `importance` says that the codes were chosen with an importance matrix: the second moment of each
    input, by which errors are weighted.
    """

    type: str
    importance: bool = False
    method = "gguf"

    def __post_init__(self) -> None:
        if self.type not in GGUF_TYPES:
            raise BadInput(f"no GGUF type {self.type[:40]!r}; choose from {', '.join(sorted(GGUF_TYPES))}")

    def __str__(self) -> str:
        return f"gguf-{self.type}" + ("-im" if self.importance else "")

    @property
    def block(self) -> int:
        """Weights per block; it must divide a row."""
        return GGUF_TYPES[self.type][0]

    @property
    def bits(self) -> int:
        """Nominal width of one code: the digit in the type's name."""
        found = re.search(r"\d+", self.type)
        assert found is not None
        return int(found[0])

    def nbytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """Bytes that ship for a weight of shape (out, in)."""
        block, size = GGUF_TYPES[self.type]
        assert in_features % block == 0, (self, in_features)
        return out_features * (in_features // block) * size


@dataclass(frozen=True)
class Sparse:
    """A pruned weight: what is left as it is in the model, or as rtn's integers if `inner` says which.

    A row always has the same number of weights left, so sizes follow from shapes alone. Groups are of
    consecutive inputs, pruned ones included. A zero must be a code, so `inner` has no real zero point.
    """

    method: str
    pattern: Pattern
    inner: Integer | None = None

    def __post_init__(self) -> None:
        if self.inner is None:
            return
        if self.inner.method != "rtn" or self.inner.zero == "real" or self.inner.activation is not None:
            raise BadInput(f"pruned weights are quantized by rtn, weights alone, with zero as a code; not {self.inner}")

    def __str__(self) -> str:
        text = f"{self.method}{self.pattern}"
        return text if self.inner is None else text + str(self.inner).removeprefix("rtn")

    @property
    def bits(self) -> int | None:
        """Width of one code; None where what is left stays in the model's dtype."""
        return None if self.inner is None else self.inner.bits

    @property
    def granularity(self) -> Granularity | None:
        """What shares a scale; None where there is none."""
        return None if self.inner is None else self.inner.granularity

    def nbytes(self, out_features: int, in_features: int, dtype_bytes: int) -> int:
        """Bytes that ship for a weight of shape (out, in): what is left, its scales, and a bit per weight."""
        mask = out_features * _packed_row_bytes(in_features, 1)
        kept = self.pattern.kept(in_features)
        if self.inner is None:
            return mask + out_features * kept * dtype_bytes
        codes = out_features * _packed_row_bytes(kept, self.inner.bits)
        return mask + codes + self.inner.parameter_bytes(out_features, in_features)


Scheme = Keep | Integer | Levels | Codebook | Float | Gguf | Sparse

_ACTIVATION = "(?:-(?P<activation>" + "|".join(get_args(Activation)) + "))?"
_INTEGER = re.compile(
    r"(?P<method>[a-z][a-z_]*)-int(?P<bits>\d)-(?P<granularity>tensor|channel|g\d{1,6})"
    r"(?P<zero>-sym|-rz)?" + _ACTIVATION + "(?P<folded>-fold)?",
    re.ASCII,
)
_FLOAT = re.compile(
    rf"(?P<method>[a-z][a-z_]*)-(?P<format>{'|'.join(FLOAT_FORMATS)})"
    r"-(?P<granularity>tensor|channel|g\d{1,6}|b[1-9]\d{0,4}x[1-9]\d{0,4})" + _ACTIVATION,
    re.ASCII,
)
_FLOAT_LIKE = re.compile(r"[a-z_]+-(?P<format>(?:mx|nv)?fp\d[a-z0-9_]*)-.*", re.ASCII)
_GGUF = re.compile(r"gguf-(?P<type>[a-z][a-z0-9_]*)(?P<importance>-im)?", re.ASCII)
_CODEBOOK = re.compile(r"(?P<method>[a-z][a-z_]*)(?P<bits>\d)-(?P<granularity>tensor|channel|g\d{1,6})", re.ASCII)
_SPARSE = re.compile(r"(?P<method>[a-z][a-z_]*)(?P<pattern>\d\d)(?P<inner>-int\d-.*)?", re.ASCII)
_FORMS = (
    "keep, M-intB-G[-sym|-rz][-A][-fold], MB-G, M-FLOAT-G[-A], gguf-TYPE[-im] or MP[-intB-G[-sym]]; M is a method, G "
    f"gSIZE, channel, tensor or bROWSxCOLUMNS, P 24 or 10 to 95, A {', '.join(get_args(Activation))}"
)


def _check_bits(bits: int) -> None:
    if not MIN_BITS <= bits <= MAX_BITS:
        raise BadInput(f"{bits} bits is out of range; choose from {MIN_BITS} to {MAX_BITS}")


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
        activation: Activation | None = found["activation"]  # type: ignore[assignment]
        granularity, folded = parse_granularity(found["granularity"]), found["folded"] is not None
        return Integer(found["method"], int(found["bits"]), granularity, zero, activation, folded)
    if found := _FLOAT.fullmatch(text):
        return Float(
            found["method"],
            found["format"],  # type: ignore[arg-type]
            parse_block(found["granularity"]) or parse_granularity(found["granularity"]),
            found["activation"],  # type: ignore[arg-type]
        )
    if found := _GGUF.fullmatch(text):
        return Gguf(found["type"], found["importance"] is not None)
    if found := _CODEBOOK.fullmatch(text):
        kind = Levels if found["method"] in FIXED_LEVELS else Codebook
        return kind(found["method"], int(found["bits"]), parse_granularity(found["granularity"]))
    if (found := _FLOAT_LIKE.fullmatch(text)) and found["format"] not in FLOAT_FORMATS:
        raise BadInput(f"no floating-point format {found['format'][:40]!r}; choose from {', '.join(FLOAT_FORMATS)}")
    found = _SPARSE.fullmatch(text)
    inner = found and found["inner"] and _INTEGER.fullmatch("rtn" + found["inner"])
    if found and (inner or not found["inner"]):
        integers = parse_scheme("rtn" + found["inner"]) if inner else None
        assert integers is None or isinstance(integers, Integer)
        return Sparse(found["method"], parse_pattern(found["pattern"]), integers)
    raise BadInput(f"scheme {text!r:.50} is not of a known form: {_FORMS}")


def kernel_activation(scheme: Scheme) -> KernelActivation | None:
    """What the kernel of `scheme` does to its inputs: `a8static` whichever observer found the range."""
    activation: Activation | None = getattr(scheme, "activation", None)
    if activation in OBSERVERS:
        return "a8static"
    return None if activation is None else "a8dyn"


def code_bits(scheme: Scheme, dtype_bits: int = 16) -> int:
    """Width of one code in bits; the width of the model's own numbers for those that stay as they are."""
    return dtype_bits if isinstance(scheme, Keep) or scheme.bits is None else scheme.bits
