"""Which of ONNX Runtime's CPU kernels runs a scheme on a layer, or the rule by which none does. No torch.

    float         `MatMul`, `Gather` in float32
    int8-unpacked 8-bit weights, multiplied out to float32 once when the session starts: a quarter of the
                  bytes on disk at float32's speed; any granularity, zero points too. A lookup multiplies
                  out only the rows that it reads
    int8-dynamic  `DynamicQuantizeLinear`, `MatMulInteger`: inputs quantized on the fly to 8 bits, one affine
                  range per tensor; one symmetric scale per output row or for all of them
    int8-static   `QuantizeLinear`, `DequantizeLinear`, `MatMul`, fused when the session starts: the same by a
                  calibrated range
    nbits         `MatMulNBits` at accuracy level 1: 4-bit weights in blocks of B = 16, 32, 64, 128 or 256
                  inputs, each with a scale and maybe an integer zero point; float32 inputs
    nbits-a8      `MatMulNBits` at accuracy level 4: 2, 4 or 8 bits; inputs quantized on the fly to 8 bits,
                  one symmetric scale per block of B inputs of each row; 2 bits in blocks of 32, 64 or 128

What else `MatMulNBits` takes (2 and 8 bits with float32 inputs, 2 bits in other blocks, real zero points)
unpacks the whole weight at every call, which was measured 20 to 100 times slower than float32 on one row: refused.

A coarser symmetric granularity runs exactly on blocks by repeating its scale. Zero points are packed
as they ship, so a run of inputs that shares one must be a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autoq.layer import Layer
from autoq.scheme import OBSERVERS, Integer, Keep, PerGroup, PerTensor, Scheme

# Bits -> the blocks of inputs that MatMulNBits has kernels for, the largest first.
BLOCKS = {2: (128, 64, 32), 4: (256, 128, 64, 32, 16), 8: (256, 128, 64, 32, 16)}


@dataclass(frozen=True)
class Kernel:
    """One kernel; `bits` and `block` are those of `MatMulNBits`, `zeros` whether it reads zero points."""

    name: Literal["float", "int8-unpacked", "int8-dynamic", "int8-static", "nbits", "nbits-a8"]
    bits: int = 0
    block: int = 0
    zeros: bool = False

    def __str__(self) -> str:
        if not self.block:
            return self.name
        return f"{self.name}-int{self.bits}-b{self.block}" + ("" if self.zeros else "-sym")


FLOAT = Kernel("float")


def block_of(scheme: Integer, in_features: int) -> int | None:
    """The largest block of inputs that divides a run of inputs with one scale, or None."""
    run = run_of(scheme, in_features)
    return next((size for size in BLOCKS[scheme.bits] if run % size == 0), None)


def run_of(scheme: Integer, in_features: int) -> int:
    """How many consecutive inputs of a row share a scale."""
    return scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else in_features


def is_rowwise(scheme: Integer) -> bool:
    """8 bits, symmetric, with one scale per output row or for all of them."""
    return scheme.bits == 8 and scheme.zero == "none" and not isinstance(scheme.granularity, PerGroup)


def scale_shape(scheme: Integer, out_features: int, in_features: int) -> tuple[int, int]:
    """(rows, groups) of the scales that ship."""
    if isinstance(scheme.granularity, PerTensor):
        return 1, 1
    return out_features, in_features // run_of(scheme, in_features)


def kernel_for(layer: Layer, scheme: Scheme) -> Kernel | str:
    """The kernel that runs `scheme` on `layer`, or the rule (one clause) by which none does."""
    if isinstance(scheme, Keep):
        return FLOAT
    if not isinstance(scheme, Integer):
        return f"there is no kernel for {scheme}"
    if scheme.ships_input_scales:
        return f"the graph has no place for scales that a layer's input is divided by, as {scheme.method} needs"
    shape = f"shape ({layer.out_features}, {layer.in_features})"
    if layer.in_features % (run := run_of(scheme, layer.in_features)):
        return f"group size {run} does not divide the {layer.in_features} inputs of {shape}"
    if scheme.zero == "real":
        return "a real zero point makes MatMulNBits unpack the whole weight at every call; choose none or integer"
    if layer.kind == "embedding" or layer.tied:
        if scheme.bits == 8 and scheme.activation is None:
            return Kernel("int8-unpacked")
        return "rows of an embedding are looked up, which needs 8-bit weights and no 8-bit inputs"
    if scheme.activation in OBSERVERS:
        if is_rowwise(scheme):
            return Kernel("int8-static")
        return "calibrated 8-bit inputs run with 8-bit symmetric weights per channel or tensor only"
    if scheme.activation == "a8dyn":
        return Kernel("int8-dynamic") if is_rowwise(scheme) else _blocks(layer, scheme)
    if scheme.bits == 8:
        return Kernel("int8-unpacked")
    if scheme.bits == 2:
        return "with float32 inputs, MatMulNBits unpacks the whole 2-bit weight at every call; choose a8dyn"
    return _blocks(layer, scheme)


def _blocks(layer: Layer, scheme: Integer) -> Kernel | str:
    if scheme.bits not in BLOCKS:
        return f"there is no {scheme.bits}-bit kernel; choose 2 (with a8dyn), 4 or 8 bits"
    run, zeros = run_of(scheme, layer.in_features), scheme.zero == "integer"
    sizes = sorted(BLOCKS[scheme.bits])
    block = block_of(scheme, layer.in_features)
    if block is None:
        return (
            f"MatMulNBits with {scheme.bits} bits needs scales shared by multiples of {sizes[0]} inputs, not by {run} "
            f"of shape ({layer.out_features}, {layer.in_features})"
        )
    if zeros and block != run:
        listed = ", ".join(map(str, sizes))
        return f"MatMulNBits with {scheme.bits} bits needs zero points shared by {listed} inputs, not by {run}"
    return Kernel("nbits" if scheme.activation is None else "nbits-a8", scheme.bits, block, zeros)
