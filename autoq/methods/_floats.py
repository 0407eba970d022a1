"""Rounding to floating-point codes: FP8 (E4M3), MXFP4 and NVFP4 (E2M1 under shared scales).

Every weight takes the code nearest to w/s, ties to the even code, where s is the scale as it ships:

    fp8     s = max|w| / 448, rounded to bfloat16, per row or for the whole weight
    mxfp4   s = 2^(e-2), where 2^e is max|w| of 32 inputs rounded to a power of two: down, unless
            max|w| >= 1.75 * 2^e, from where on the largest E2M1 number, 6 = 1.5 * 2^2, is nearer to the
            next octave's 4. So compressed-tensors; the OCP Microscaling specification v1.0, section 6.3,
            always rounds down and clips up to a quarter of the largest weight.
    nvfp4   s = c g, where c is max|w| / (6 g) of 16 inputs, rounded to E4M3, and g the tensor's scale

Where we differ: g is a power of two, the least with which no c exceeds 448, where compressed-tensors
takes g = max|w| / (6 * 448). An E4M3 number is as precise wherever in its range it lies, so nothing is
lost, and layers that a runtime merges can be brought to one common g by moving exponents, exactly.
No scale is zero: a group of zeros takes the least scale of its format.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoq.methods._float_weight import FloatWeight, power_of_two
from autoq.methods._uniform import MIN_SCALE, stored
from autoq.methods._weights import row_blocks
from autoq.scheme import Float, PerGroup, PerTensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max  # 448
E4M3_LEAST = 2.0**-9  # the smallest subnormal
E2M1_MAX = 6.0
_E2M1_TOP_EXPONENT = 2  # 6 = 1.5 * 2^2
_MANTISSA_BITS = 23  # of float32
# Midpoints between neighbouring E2M1 magnitudes. `bucketize` gives a tie to the lower code; below an odd
# code's successor the bound lies one float lower, so that the tie goes up, to the even one.
_MIDPOINTS = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_BOUNDS = _MIDPOINTS.clone()
_BOUNDS[1::2] = torch.nextafter(_MIDPOINTS[1::2], torch.zeros(3))
# g and 1/g are normal float32 numbers, and so is g times the least E4M3 number.
_LEAST_EXPONENT, _LARGEST_EXPONENT = -117, 126


def quantize(weight: Tensor, scheme: Float) -> FloatWeight:
    """`weight` (out, in), finite, rounded to `scheme`, whose group size divides its rows."""
    rows, columns = weight.shape
    if scheme.format == "fp8":
        tensors = _fp8(weight, per_tensor=isinstance(scheme.granularity, PerTensor))
    else:
        assert isinstance(scheme.granularity, PerGroup)
        tensors = _fp4(weight, columns // scheme.granularity.size, scheme.format == "nvfp4")
    return FloatWeight(scheme, (rows, columns), tensors)


def _fp8(weight: Tensor, per_tensor: bool) -> dict[str, Tensor]:
    low, high = torch.aminmax(weight) if per_tensor else torch.aminmax(weight, dim=1, keepdim=True)
    largest = torch.maximum(-low.float(), high.float()).view(-1, 1)
    scales = stored(largest / E4M3_MAX).clamp_min_(MIN_SCALE)
    codes = torch.empty(weight.shape, dtype=E4M3)
    for block in row_blocks(*weight.shape):
        scale = scales if per_tensor else scales[block]
        codes[block] = (weight[block].float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(E4M3)
    return {"codes": codes, "scales": scales.to(torch.bfloat16)}


def _fp4(weight: Tensor, groups: int, nvidia: bool) -> dict[str, Tensor]:
    rows, columns = weight.shape
    global_scale = _global_scale(weight) if nvidia else 1.0
    codes = torch.empty(rows, columns // 2, dtype=torch.uint8)
    scales = torch.empty(rows, groups, dtype=E4M3 if nvidia else torch.uint8)
    for block in row_blocks(rows, columns):
        grouped = weight[block].float().reshape(-1, groups, columns // groups)
        largest = grouped.abs().amax(-1)
        if nvidia:
            scales[block] = (largest / E2M1_MAX / global_scale).clamp_(E4M3_LEAST, E4M3_MAX).to(E4M3)
            scale = scales[block].float() * global_scale
        else:
            scales[block] = _exponents(largest)
            scale = power_of_two(scales[block])
        found = encode_e2m1(grouped / scale[..., None]).view(-1, columns)
        codes[block] = found[:, 0::2] | found[:, 1::2] << 4
    tensors = {"codes": codes, "scales": scales}
    return tensors | ({"global_scale": torch.tensor([global_scale])} if nvidia else {})


def encode_e2m1(values: Tensor) -> Tensor:
    """The E2M1 codes nearest to `values` float32, ties to even, as uint8 below 16; zero has no sign."""
    magnitude = torch.bucketize(values.abs(), _BOUNDS).to(torch.uint8)
    return magnitude | ((values < 0) & (magnitude > 0)).to(torch.uint8) << 3


def _exponents(largest: Tensor) -> Tensor:
    """E8M0 codes of the groups whose largest magnitude is `largest` float32."""
    # A quarter of the mantissa added carries into the exponent from 1.75 on.
    octave = (largest.view(torch.int32) + (1 << (_MANTISSA_BITS - 2))) >> _MANTISSA_BITS
    return (octave - _E2M1_TOP_EXPONENT).clamp_(0, 254).to(torch.uint8)


def _global_scale(weight: Tensor) -> float:
    largest = max(abs(float(end)) for end in torch.aminmax(weight))
    mantissa, exponent = math.frexp(largest / (E2M1_MAX * E4M3_MAX))
    exponent -= mantissa == 0.5
    return math.ldexp(1.0, min(max(exponent, _LEAST_EXPONENT), _LARGEST_EXPONENT) if largest else 0)
