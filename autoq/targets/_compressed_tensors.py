"""Quantized layers as compressed-tensors stores them, and the rounding of inputs as it computes it.

Per layer, beside its bias (compressed_tensors/compressors, release 0.20):

    pack-quantized    weight_packed (out, in*b/32) int32: codes as a little-endian bit stream per row, as ours;
                      weight_scale (out, groups); weight_shape (2,) int64; with zero points
                      weight_zero_point (out*b/32, groups) int32, packed along the outputs
    int-quantized     weight (out, in) int8, the code minus 128; weight_scale (out, 1) or (1,);
                      input_scale (1,) if calibrated
    float-quantized   weight (out, in) float8_e4m3fn; weight_scale and input_scale as before, or weight_scale
                      (out/128, in/128) for blocks
    mxfp4-pack-…      weight_packed (out, in/2) uint8; weight_scale (out, groups) uint8, E8M0
    nvfp4-pack-…      weight_packed (out, in/2) uint8; weight_scale (out, groups) float8_e4m3fn;
                      weight_global_scale (1,) float32, a divisor
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autoq.calibration.observers import FP8, SYMMETRIC_INT8, input_range
from autoq.errors import AutoQError
from autoq.methods import QuantizedWeight, Statistics
from autoq.methods._float_weight import FloatWeight
from autoq.methods._packing import pack_rows, unpack_rows
from autoq.methods._uniform import MIN_SCALE, stored
from autoq.methods._weights import IntegerWeight
from autoq.scheme import OBSERVERS, Float, Integer, KernelActivation, PerBlock, PerTensor, kernel_activation
from autoq.targets._compressed_tensors_config import storage_format

E4M3 = torch.float8_e4m3fn
_E4M3_MAX = torch.finfo(E4M3).max
# The largest input is this many steps: of a range found per token as compressed-tensors computes it, which
# lets the positive end be clipped by half a step; of a calibrated range so that nothing in it is clipped.
_STEPS: Mapping[KernelActivation | None, float] = {"a8dyn": 127.5, "a8static": 127.0}


def shipped(weight: QuantizedWeight, statistics: Callable[[], Statistics]) -> dict[str, Tensor]:
    """Name within the layer -> tensor, for an integer or float weight."""
    scheme = weight.scheme
    assert isinstance(scheme, Integer | Float), scheme
    if isinstance(weight, FloatWeight):
        tensors = _float(weight)
    else:
        assert isinstance(weight, IntegerWeight)
        tensors = _packed(weight) if storage_format(scheme) == "pack-quantized" else _plain(weight)
    if scheme.activation in OBSERVERS:
        tensors["input_scale"] = input_scale(scheme, statistics()).view(1)
    return tensors


def expected(scheme: Integer | Float, shape: tuple[int, int]) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Name within the layer -> (dtype, shape) of what `shipped` gives for a weight of `shape` (out, in)."""
    rows, columns = shape
    groups = columns // getattr(scheme.granularity, "size", columns)
    scale = (1,) if isinstance(scheme.granularity, PerTensor) else (rows, groups)
    if isinstance(scheme.granularity, PerBlock):
        assert isinstance(scheme, Float)
        scale = scheme.scale_grid(rows, columns)
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    match storage_format(scheme):
        case "pack-quantized":
            found = {
                "weight_packed": (torch.int32, (rows, columns * scheme.bits // 32)),
                "weight_scale": (torch.bfloat16, scale),
                "weight_shape": (torch.int64, (2,)),
            }
            if isinstance(scheme, Integer) and scheme.zero == "integer":
                found["weight_zero_point"] = (torch.int32, ((rows * scheme.bits + 31) // 32, groups))
        case "int-quantized":
            found = {"weight": (torch.int8, shape), "weight_scale": (torch.bfloat16, scale)}
        case "float-quantized":
            found = {"weight": (E4M3, shape), "weight_scale": (torch.bfloat16, scale)}
        case _:
            nvidia = isinstance(scheme, Float) and scheme.format == "nvfp4"
            found = {
                "weight_packed": (torch.uint8, (rows, columns // 2)),
                "weight_scale": (E4M3 if nvidia else torch.uint8, scale),
            }
            if nvidia:
                found["weight_global_scale"] = (torch.float32, (1,))
    if scheme.activation in OBSERVERS:
        found["input_scale"] = (torch.bfloat16, (1,))
    return found


def _packed(weight: IntegerWeight) -> dict[str, Tensor]:
    scheme, tensors = weight.scheme, weight.tensors
    assert isinstance(scheme, Integer)
    found = {
        "weight_packed": _words(tensors["codes"]),
        "weight_scale": tensors["scales"],
        "weight_shape": torch.tensor(weight.shape),
    }
    if scheme.zero == "integer":
        zeros = unpack_rows(tensors["zeros"], scheme.bits, tensors["scales"].shape[1])  # (out, groups)
        along = pack_rows(zeros.t().flatten().view(-1, weight.shape[0]), scheme.bits)
        found["weight_zero_point"] = _words(torch.nn.functional.pad(along, (0, -along.shape[1] % 4))).t().contiguous()
    return found


def _words(packed: Tensor) -> Tensor:
    """Bytes (rows, 4n) as (rows, n) int32; copied, since a mapped file's tensors begin at any byte."""
    return packed.clone(memory_format=torch.contiguous_format).view(torch.int32)


def _plain(weight: IntegerWeight) -> dict[str, Tensor]:
    return {"weight": (weight.codes() ^ 0x80).view(torch.int8), "weight_scale": _scales(weight)}


def _float(weight: FloatWeight) -> dict[str, Tensor]:
    tensors = weight.tensors
    scheme = weight.scheme
    assert isinstance(scheme, Float)
    if scheme.format == "fp8":
        return {"weight": tensors["codes"], "weight_scale": _scales(weight)}
    found = {"weight_packed": tensors["codes"], "weight_scale": tensors["scales"]}
    if scheme.format == "nvfp4":
        divisor = 1 / tensors["global_scale"]
        assert torch.equal(1 / divisor, tensors["global_scale"]), "a global scale must be a power of two"
        found["weight_global_scale"] = divisor
    return found


def _scales(weight: QuantizedWeight) -> Tensor:
    scales = weight.tensors["scales"]
    return scales.view(1) if isinstance(weight.scheme, Integer | Float) and _per_tensor(weight.scheme) else scales


def _per_tensor(scheme: Integer | Float) -> bool:
    return isinstance(scheme.granularity, PerTensor)


def share_global_scales(weights: Mapping[str, FloatWeight]) -> dict[str, FloatWeight]:
    """Layers that run as one, brought to one global scale, the largest: vLLM reads a single one.

    Exact, for global scales are powers of two: the difference moves into the groups' scales. Raises
    `AutoQError` where one of those is too small for that.
    """
    largest = max(float(weight.tensors["global_scale"]) for weight in weights.values())
    found = {}
    for name, weight in weights.items():
        scales = weight.scales().contiguous() / largest
        if not torch.equal(scales.to(E4M3).float(), scales):
            raise AutoQError(
                f"{name} runs as one layer with {', '.join(sorted(set(weights) - {name}))}, whose weights are too "
                f"much larger for one scale of {weight.scheme}; choose another scheme for them"
            )
        tensors = {**weight.tensors, "scales": scales.to(E4M3), "global_scale": torch.tensor([largest])}
        found[name] = FloatWeight(weight.scheme, weight.shape, tensors)
    return found


def input_scale(scheme: Integer | Float, statistics: Statistics) -> Tensor:
    """The calibrated step () of a layer's inputs, bfloat16: the largest that is not cut off takes the largest code.

    Raises `SchemeRefused` where the layer's range is missing.
    """
    levels = FP8 if isinstance(scheme, Float) else SYMMETRIC_INT8
    largest = input_range(scheme, statistics, levels).abs().max()
    steps = _steps(scheme)
    return stored(largest / steps).clamp_min_(MIN_SCALE).to(torch.bfloat16)


def activation(scheme: Integer | Float, statistics: Statistics | None) -> Callable[[Tensor], Tensor]:
    """What transformers does to the input (…, in) of a layer of `scheme`, in the input's own dtype.

    As `compressed_tensors.quantization.lifecycle.forward.fake_quantize` with the scales of
    `compute_dynamic_scales_and_zp` (a8dyn) or the stored `input_scale` (calibrated).
    """
    floating = isinstance(scheme, Float)
    steps = _steps(scheme)
    if scheme.activation in OBSERVERS:
        fixed = input_scale(scheme, statistics or {})
        return lambda x: _rounded(x, fixed.to(x.device, x.dtype), floating)

    def per_token(x: Tensor) -> Tensor:
        scale = x.abs().amax(-1, keepdim=True) / steps
        least = torch.finfo(x.dtype).eps  # of a token of zeros; any step would do
        return _rounded(x, scale.masked_fill_(scale == 0, least), floating)

    return per_token


def _steps(scheme: Integer | Float) -> float:
    return _E4M3_MAX if isinstance(scheme, Float) else _STEPS[kernel_activation(scheme)]


def _rounded(x: Tensor, scale: Tensor, floating: bool) -> Tensor:
    codes = x / scale
    codes = codes.clamp_(-_E4M3_MAX, _E4M3_MAX).to(E4M3).to(x.dtype) if floating else codes.clamp_(-128, 127).round_()
    return codes.mul_(scale)
