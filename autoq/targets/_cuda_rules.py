"""Which of PyTorch's CUDA kernels runs a scheme on a layer, or why none does. No torch.

The kernels, with what their sources demand:

    int4-gG  `_weight_int4pack_mm` (tinygemm, aten/src/ATen/native/cuda/int4mm.cu): bfloat16 activations,
             compute capability 8.0; per group of G = 32, 64, 128 or 256 inputs a bfloat16 scale and
             offset; outputs in multiples of 8; inputs in multiples of 16 times the inner k-tiles (2, 4, 8)
    int8     `_int_mm` (`_int_mm_out_cuda`, aten/src/ATen/native/cuda/Blas.cpp): int8 on both sides, more
             than 16 rows (fewer are padded), inputs and outputs in multiples of 8; one scale per output
             row and one per token
    fp8      `_scaled_mm` (`_scaled_mm_out_cuda`, same file; row-wise scales): E4M3 on both sides, inputs
             and outputs in multiples of 16, bfloat16 out, compute capability 8.9
    as-is    the model's own module

Embeddings and what is tied to them are looked up, which none of these does: they are kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from autoq.layer import Layer
from autoq.scheme import OBSERVERS, Float, Integer, Keep, PerGroup, Scheme

INT4_GROUPS = (256, 128, 64, 32)
INT4_K_TILES = (8, 4, 2)
K_TILE = 16
# compute capability that a kernel needs
CAPABILITY = {"int4": (8, 0), "int8": (7, 5), "fp8": (8, 9)}


@dataclass(frozen=True)
class Kernel:
    """One kernel; `group` is the number of inputs that share a scale inside the int4 kernel."""

    name: Literal["as-is", "int4", "int8", "fp8"]
    group: int | None = None

    def __str__(self) -> str:
        return self.name if self.group is None else f"{self.name}-g{self.group}"


def k_tiles(in_features: int) -> int | None:
    """The most inner k-tiles that the packed int4 weight of so many inputs can have, or None."""
    return next((tiles for tiles in INT4_K_TILES if in_features % (tiles * K_TILE) == 0), None)


def kernel_for(layer: Layer, scheme: Scheme) -> Kernel | str:
    """The kernel that runs `scheme` on `layer`, or the rule (one clause) by which none does."""
    if isinstance(scheme, Keep):
        return Kernel("as-is")
    shape = f"shape ({layer.out_features}, {layer.in_features})"
    if not isinstance(scheme, Integer | Float):
        return f"there is no kernel for {scheme}"
    if layer.kind == "router":
        return "a router does more than a linear map, which is all that a kernel replaces"
    if layer.kind == "embedding" or layer.tied:
        return "rows of an embedding are looked up, which no quantized kernel does"
    if isinstance(scheme, Integer) and scheme.ships_input_scales:
        return f"the kernels take inputs as they are, and {scheme.method} divides them by scales"
    if layer.dtype_bytes != 2:
        return "the kernels give bfloat16, and the model has another dtype"
    if isinstance(scheme.granularity, PerGroup) and layer.in_features % scheme.granularity.size:
        return f"group size {scheme.granularity.size} does not divide the {layer.in_features} inputs of {shape}"
    if scheme.activation in OBSERVERS:
        return "the 8-bit kernels find the range of each token themselves (a8dyn)"
    if isinstance(scheme, Float):
        return _fp8(layer, scheme, shape)
    if scheme.activation == "a8dyn":
        return _int8(layer, scheme, shape)
    return _int4(layer, scheme, shape)


def _multiple(layer: Layer, name: str, of: int, shape: str) -> str | None:
    if layer.in_features % of or layer.out_features % of:
        return f"the {name} kernel needs inputs and outputs in multiples of {of}, and the layer has {shape}"
    return None


def _fp8(layer: Layer, scheme: Float, shape: str) -> Kernel | str:
    if scheme.format != "fp8" or scheme.activation is None:
        return f"floats run as fp8 with 8-bit activations (fp8-channel-a8dyn) only, not as {scheme}"
    return _multiple(layer, "fp8", 16, shape) or Kernel("fp8")


def _int8(layer: Layer, scheme: Integer, shape: str) -> Kernel | str:
    if scheme.bits != 8 or scheme.zero != "none" or isinstance(scheme.granularity, PerGroup):
        return "8-bit activations run with int8-channel-sym weights only"
    return _multiple(layer, "int8", 8, shape) or Kernel("int8")


def _int4(layer: Layer, scheme: Integer, shape: str) -> Kernel | str:
    if scheme.bits != 4:
        return f"there is no {scheme.bits}-bit kernel for unquantized activations; choose 4 bits, or 8 with a8dyn"
    run = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else layer.in_features
    group = next((size for size in INT4_GROUPS if run % size == 0), None)
    if group is None:
        return f"the 4-bit kernel needs scales shared by multiples of {INT4_GROUPS[-1]} inputs, not by {run} of {shape}"
    if layer.out_features % 8:
        return f"the 4-bit kernel needs outputs in multiples of 8, and the layer has {shape}"
    assert k_tiles(layer.in_features) is not None  # a multiple of 32 by now
    return Kernel("int4", group)
