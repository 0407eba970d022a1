"""Which of PyTorch's CPU kernels runs a scheme on a layer, or why none does. No torch.

The kernels, with what their sources demand (aten/src/ATen/native/cpu/int4mm_kernel.cpp and
int8mm_kernel.cpp, aten/src/ATen/native/quantized/cpu/qlinear_dynamic.cpp):

    int4-gG       `_weight_int4pack_mm_for_cpu`: bfloat16 activations, 4-bit codes, per group of
                  G = 32, 64, 128 or 256 inputs a bfloat16 scale and offset; out % 16 = 0, in % G = 0
    int8          `_weight_int8pack_mm`: bfloat16 activations, one scale per output row; it reads 16
                  inputs at a time without looking for the row's end, so in % 16 = 0
    int8-dynamic  `quantized.linear_dynamic`: float32 activations quantized on the fly to 8 bits, one
                  affine range per tensor; any shape; one scale per output row
    as-is         the model's own module

Where a scheme scales inputs, x is divided by those scales before any of the quantized ones (`-scaled`).
A coarser granularity runs exactly on a finer kernel by repeating its scale, so a run of inputs that
share a scale may be any multiple of a kernel's group. The converse would need another scale: refused.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from autoq.layer import Layer
from autoq.scheme import OBSERVERS, Integer, Keep, PerGroup, Scheme

INT4_GROUPS = (256, 128, 64, 32)
INT4_OUT_MULTIPLE = 16
INT8_IN_MULTIPLE = 16
LOOKUP = "int8-channel-sym"


@dataclass(frozen=True)
class Kernel:
    """One kernel; `group` is the number of inputs that share a scale inside the int4 kernel.

    `scaled` says that it is given its input over a scale for each.
    """

    name: Literal["as-is", "int8", "int8-dynamic", "int4"]
    group: int | None = None
    scaled: bool = False

    def __str__(self) -> str:
        text = self.name if self.group is None else f"{self.name}-g{self.group}"
        return f"{text}-scaled" if self.scaled else text


def kernel_for(layer: Layer, scheme: Scheme) -> Kernel | str:
    """The kernel that runs `scheme` on `layer`, or the rule (one clause) by which none does."""
    if not isinstance(scheme, Integer) or not scheme.ships_input_scales:
        return _unscaled(layer, scheme)
    if layer.kind == "embedding" or layer.tied:
        return f"rows of an embedding are looked up, and {scheme.method} needs an input to divide"
    kernel = _unscaled(layer, scheme)
    return kernel if isinstance(kernel, str) else replace(kernel, scaled=True)


def _unscaled(layer: Layer, scheme: Scheme) -> Kernel | str:
    if isinstance(scheme, Keep):
        return Kernel("as-is")
    shape = f"shape ({layer.out_features}, {layer.in_features})"
    if layer.kind == "router":
        return "a router does more than a linear map, which is all that a kernel replaces"
    if not isinstance(scheme, Integer):
        return f"there is no kernel for {scheme}"
    if isinstance(scheme.granularity, PerGroup) and layer.in_features % scheme.granularity.size:
        return f"group size {scheme.granularity.size} does not divide the {layer.in_features} inputs of {shape}"
    if scheme.activation in OBSERVERS:
        return "the 8-bit kernel finds the range of its input itself (a8dyn)"
    rowwise = scheme.bits == 8 and scheme.zero == "none" and not isinstance(scheme.granularity, PerGroup)
    if layer.kind == "embedding" or layer.tied:
        if not rowwise or scheme.activation is not None:
            return f"rows of an embedding are looked up, which only {LOOKUP} can do"
        # A lookup reads whole rows as they are; only a head's matrix product reads 16 inputs at a time.
        if layer.kind == "embedding" and layer.dtype_bytes == 2:
            return Kernel("int8")
    if scheme.activation == "a8dyn":
        return Kernel("int8-dynamic") if rowwise else f"8-bit activations run with {LOOKUP} weights only"
    if layer.dtype_bytes != 2:
        return "weight-only kernels need a bfloat16 model"
    if scheme.bits == 8:
        if not rowwise:
            return "the 8-bit kernels have one scale per output row and no zero point (channel-sym)"
        if layer.in_features % INT8_IN_MULTIPLE:
            return f"the 8-bit kernel needs inputs in multiples of {INT8_IN_MULTIPLE}, and the layer has {shape}"
        return Kernel("int8")
    if scheme.bits == 4:
        return _int4(layer, scheme, shape)
    return f"there is no {scheme.bits}-bit kernel; choose 4 or 8 bits"


def _int4(layer: Layer, scheme: Integer, shape: str) -> Kernel | str:
    run = scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else layer.in_features
    group = next((size for size in INT4_GROUPS if run % size == 0), None)
    if group is None:
        return f"the 4-bit kernel needs scales shared by multiples of {INT4_GROUPS[-1]} inputs, not by {run} of {shape}"
    if layer.out_features % INT4_OUT_MULTIPLE:
        return f"the 4-bit kernel needs outputs in multiples of {INT4_OUT_MULTIPLE}, and the layer has {shape}"
    return Kernel("int4", group)
