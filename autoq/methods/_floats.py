"""Rounding to floating-point codes: FP8, FP4, microscaling (MX) formats and NVFP4.

Every weight takes the code nearest to w/s, ties to the even code, numbers beyond the largest code m taking
that one, and a weight that becomes zero keeps its sign, as IEEE 754 has it. s is the scale as it ships:

    fp8, fp4   s = max|w| / m, rounded to bfloat16, per row, group or block, or for the whole weight
    mxfp8, 6   s = 2^(floor(log2 max|w|) - log2 of m's octave) of 32 inputs: OCP Microscaling v1.0, section 6.3
    mxfp4      s = 2^(e-2), where 2^e is max|w| of 32 inputs rounded to a power of two: down, unless
               max|w| >= 1.75 * 2^e, from where on the largest E2M1 number, 6 = 1.5 * 2^2, is nearer to the
               next octave's 4. So compressed-tensors; the specification would round down here too and clip up
               to a quarter of the largest weight. What it clips of the wider elements is less: an eighth of it for
               E4M3, E5M2 and E3M2, a sixteenth for E2M3.
    nvfp4      s = c g, where c is max|w| / (6 g) of 16 inputs, rounded to E4M3, and g the tensor's scale

    m  448 (E4M3), 57344 (E5M2), 7.5 (E2M3), 28 (E3M2), 6 (E2M1)

Where we differ: g is a power of two, the least with which no c exceeds 448, where compressed-tensors
takes g = max|w| / (6 * 448). An E4M3 number is as precise wherever in its range it lies, so nothing is
lost, and layers that a runtime merges can be brought to one common g by moving exponents, exactly.
No scale is zero: a group of zeros takes the least scale of its format. DeepSeek-V3 ships the scales of its
blocks of 128x128 in float32; ours are bfloat16, as compressed-tensors stores them for such a model.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from autoq.methods._float_weight import DTYPES, FloatWeight, magnitudes, multipliers
from autoq.methods._packing import pack_rows
from autoq.methods._uniform import MIN_SCALE, stored
from autoq.methods._weights import row_blocks
from autoq.scheme import Float, PerBlock, PerGroup, PerTensor

E4M3 = torch.float8_e4m3fn
E4M3_MAX = torch.finfo(E4M3).max  # 448
E4M3_LEAST = 2.0**-9  # the smallest subnormal
_MANTISSA_BITS = 23  # of float32
# g and 1/g are normal float32 numbers, and so is g times the least E4M3 number.
_LEAST_EXPONENT, _LARGEST_EXPONENT = -117, 126


def quantize(weight: Tensor, scheme: Float) -> FloatWeight:
    """`weight` (out, in), finite, rounded to `scheme`, whose group size divides its rows."""
    shape = rows, columns = weight.shape[0], weight.shape[1]
    element = scheme.form.element
    tensors = _scales(_largest(weight, scheme), scheme)
    scales = multipliers(scheme, shape, tensors)
    codes = torch.empty(shape, dtype=DTYPES.get(element, torch.uint8))
    for block in row_blocks(rows, columns):
        grouped = weight[block].float().view(-1, scales.shape[1], columns // scales.shape[1])
        codes[block] = encode(grouped / scales[block, :, None], element).view(-1, columns)
    packed = codes if element in DTYPES else pack_rows(codes, scheme.bits)
    return FloatWeight(scheme, shape, {"codes": packed, **tensors})


def encode(values: Tensor, element: str) -> Tensor:
    """The codes nearest to `values` float32, ties to even, saturating: a float8 dtype, or uint8 of few bits."""
    if element in DTYPES:
        limit = torch.finfo(DTYPES[element]).max
        return values.clamp(-limit, limit).to(DTYPES[element])
    bounds = _bounds(element)
    codes = torch.bucketize(values.abs(), bounds).to(torch.uint8)
    return codes | torch.signbit(values).to(torch.uint8) * (len(bounds) + 1)


@functools.cache
def _bounds(element: str) -> Tensor:
    """Midpoints between neighbouring magnitudes.

    `bucketize` gives a tie to the lower code; after an odd code the bound lies one float lower, so that
    the tie goes up, to the even one.
    """
    numbers = magnitudes(element)
    bounds = (numbers[1:] + numbers[:-1]) / 2
    bounds[1::2] = torch.nextafter(bounds[1::2], torch.zeros(()))
    return bounds


def _largest(weight: Tensor, scheme: Float) -> Tensor:
    """The largest magnitude under each scale, as `Float.scale_grid` arranges them; float32."""
    rows, columns = weight.shape
    granularity = scheme.granularity
    wide = columns
    if isinstance(granularity, PerGroup | PerBlock):
        wide = granularity.size if isinstance(granularity, PerGroup) else granularity.columns
    largest = torch.empty(rows, -(-columns // wide))
    pad = torch.nn.functional.pad
    for block in row_blocks(rows, columns):
        values = weight[block].float().abs()
        largest[block] = pad(values, (0, -columns % wide)).view(-1, largest.shape[1], wide).amax(-1)
    if isinstance(granularity, PerTensor):
        return largest.amax().view(1, 1)
    if isinstance(granularity, PerBlock):
        padded = pad(largest, (0, 0, 0, -rows % granularity.rows))
        return padded.view(-1, granularity.rows, largest.shape[1]).amax(1)
    return largest


def _scales(largest: Tensor, scheme: Float) -> dict[str, Tensor]:
    """The scales as they ship, `scales` and maybe `global_scale`, from what lies under them."""
    form = scheme.form
    top = torch.finfo(DTYPES[form.element]).max if form.element in DTYPES else float(magnitudes(form.element)[-1])
    if form.scale == "bfloat16":
        return {"scales": stored(largest / top).clamp_min_(MIN_SCALE).to(torch.bfloat16)}
    if form.scale == "e8m0":
        return {"scales": _exponents(largest, math.frexp(top)[1] - 1, to_nearest=form.element == "e2m1")}
    global_scale = _global_scale(largest, top)
    scales = (largest / top / global_scale).clamp_(E4M3_LEAST, E4M3_MAX).to(E4M3)
    return {"scales": scales, "global_scale": torch.tensor([global_scale])}


def _exponents(largest: Tensor, top_exponent: int, to_nearest: bool) -> Tensor:
    """E8M0 codes of the groups whose largest magnitude is `largest` float32; `top_exponent` is of the largest code."""
    # A quarter of the mantissa added carries into the exponent from 1.75 on.
    carry = 1 << (_MANTISSA_BITS - 2) if to_nearest else 0
    octave = (largest.view(torch.int32) + carry) >> _MANTISSA_BITS
    return (octave - top_exponent).clamp_(0, 254).to(torch.uint8)


def _global_scale(largest: Tensor, top: float) -> float:
    everywhere = float(largest.max())
    mantissa, exponent = math.frexp(everywhere / (top * E4M3_MAX))
    exponent -= mantissa == 0.5
    return math.ldexp(1.0, min(max(exponent, _LEAST_EXPONENT), _LARGEST_EXPONENT) if everywhere else 0)
