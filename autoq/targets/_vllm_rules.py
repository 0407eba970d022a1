"""Which of vLLM's kernels runs a scheme on a layer, or why none does. No torch.

Read from the sources of vLLM 0.32 (model_executor/layers/quantization/compressed_tensors and
model_executor/kernels/linear). The kernels are those of its CUDA build:

    int4, int8    Marlin (Machete on Hopper): bfloat16 activations; groups of 32, 64 or 128 inputs or one
                  scale per row; zero points in 4 bits only (types `uint4`, `uint4b8`, `uint8b128`).
                  Other widths exist for the optional Humming kernels alone.
    int8-a8       CUTLASS: weights per row or tensor without zero points, inputs in 8 bits per token
                  (a8dyn) or by one calibrated scale (a8static and the other observers)
    fp8           Marlin, weights only; with 8-bit activations CUTLASS on devices with FP8 arithmetic.
                  With one scale per tensor and inputs in 8 bits, vLLM rounds merged layers again to the
                  largest of their scales: not what was measured, so refused for layers that are merged.
                  Weights only they may have a scale per block of 128x128 (`CompressedTensorsW8A16Fp8`), which a
                  merged layer's members must consist of (`validate_fp8_block_shape`).
    mxfp4, nvfp4  Marlin, weights only. For mxfp4 on Blackwell vLLM may choose a kernel that rounds inputs
                  too; `--linear-backend marlin` keeps it from it.

Marlin works on tiles of 16 and pads what lies between 64 and 128; CUTLASS reads 16 bytes at a time;
vLLM's CPU build demands multiples of 32 inputs for int4. It has kernels for int4, int8-a8 and fp8 with
a8dyn only. A quantized head must be of its own: what is tied to an embedding is looked up, and stays.
"""

from __future__ import annotations

import dataclasses

from autoq.layer import Layer
from autoq.scheme import Float, Integer, Keep, PerBlock, PerGroup, PerTensor, Scheme, kernel_activation

GROUP_SIZES = (32, 64, 128)
IN_MULTIPLE = 32
OUT_MULTIPLE = 16
BLOCK = PerBlock(128, 128)


def refusal(layer: Layer, scheme: Scheme) -> str | None:
    """The rule (one clause) by which no kernel runs `scheme` on `layer`, or None."""
    if isinstance(scheme, Keep):
        return None
    if layer.kind == "embedding" or layer.tied:
        return "vLLM looks up rows of an embedding, and of a head tied to one, as they are"
    if layer.kind == "router":
        return "vLLM computes a router as it is"
    if layer.kind == "conv1d":
        return "compressed-tensors holds linear layers, and a Conv1D stores its weight the other way round"
    if layer.dtype_bytes != 2:
        return "scales ship in bfloat16, the dtype that the model must have"
    if isinstance(scheme, Integer) and scheme.ships_input_scales:
        return f"compressed-tensors holds no scales that a layer's input is divided by; fold them: {scheme}-fold"
    if isinstance(scheme, Integer):
        return _integer(scheme) or _shape(layer, scheme)
    if isinstance(scheme, Float):
        return _float(layer, scheme) or _shape(layer, scheme)
    return f"there is no kernel for {scheme}"


def _integer(scheme: Integer) -> str | None:
    if scheme.zero == "real":
        return "zero points are codes (integer) or there are none (sym)"
    if scheme.activation is not None:
        if scheme.bits != 8 or scheme.zero != "none" or isinstance(scheme.granularity, PerGroup):
            return "8-bit activations run with int8-channel-sym or int8-tensor-sym weights only"
        return None
    if scheme.bits not in (4, 8):
        return f"there is no {scheme.bits}-bit kernel; choose 4 or 8 bits"
    if isinstance(scheme.granularity, PerTensor):
        return "weight-only kernels have a scale per group or channel"
    if scheme.bits == 8 and scheme.zero != "none":
        return "zero points run in 4 bits only; 8 bits are symmetric (sym)"
    return None


def _float(layer: Layer, scheme: Float) -> str | None:
    if scheme.format not in ("fp8", "mxfp4", "nvfp4"):
        return f"there is no kernel for {scheme.format}; choose from fp8, mxfp4, nvfp4"
    if isinstance(scheme.granularity, PerBlock) or (
        scheme.format == "fp8" and isinstance(scheme.granularity, PerGroup)
    ):
        if scheme.granularity != BLOCK:
            return f"fp8 runs with a scale per channel, tensor or {BLOCK}, not per {scheme.granularity}"
        if layer.in_features % BLOCK.columns or layer.out_features % BLOCK.rows:
            return (
                f"blocks of {BLOCK.rows}x{BLOCK.columns} must divide the layer, which has shape "
                f"({layer.out_features}, {layer.in_features})"
            )
    if scheme.activation and layer.fusion_group and isinstance(scheme.granularity, PerTensor):
        return (
            f"{layer.fusion_group} run as one layer, whose FP8 codes vLLM would round again to one scale per tensor; "
            "choose fp8-channel"
        )
    return None


def _shape(layer: Layer, scheme: Integer | Float) -> str | None:
    shape = f"shape ({layer.out_features}, {layer.in_features})"
    if isinstance(scheme, Integer) and isinstance(scheme.granularity, PerGroup):
        size = scheme.granularity.size
        if size not in GROUP_SIZES:
            return f"there is no kernel for groups of {size}; choose from {', '.join(map(str, GROUP_SIZES))}, channel"
        if layer.in_features % size:
            return f"group size {size} does not divide the {layer.in_features} inputs of {shape}"
    if layer.in_features % IN_MULTIPLE:
        return f"the kernels need inputs in multiples of {IN_MULTIPLE}, and the layer has {shape}"
    if layer.out_features % OUT_MULTIPLE:
        return f"the kernels need outputs in multiples of {OUT_MULTIPLE}, and the layer has {shape}"
    return None


def fused_differ(layers: dict[str, Layer], schemes: dict[str, Scheme]) -> str | None:
    """The first fusion group whose layers would lie in the files in different ways (one clause), or None."""
    first: dict[str, str] = {}
    for name, scheme in schemes.items():
        group = layers[name].fusion_group
        if group is None:
            continue
        other = first.setdefault(group, name)
        # Layers that run as one get one calibrated scale, the largest, so the observer counts too.
        if _with_observer(schemes[other]) != _with_observer(scheme):
            return (
                f"{other} ({schemes[other]}) and {name} ({scheme}) run as one layer in vLLM and must share one scheme"
            )
    return None


def layout(scheme: Scheme) -> str:
    """A scheme's text without its method and observer: what the files tell of it, as `int4-g64-sym`."""
    if isinstance(scheme, Integer | Float):
        scheme = dataclasses.replace(scheme, activation=kernel_activation(scheme))
    if isinstance(scheme, Integer):
        scheme = dataclasses.replace(scheme, folded=False)
    return _with_observer(scheme)


def _with_observer(scheme: Scheme) -> str:
    return str(scheme).partition("-")[2] or str(scheme)
