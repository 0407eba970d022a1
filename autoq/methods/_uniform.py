"""Uniform grids in the numbers that ship: scales and real zero points are bfloat16 before use.

A grid of b bits has the levels (q - z)*s for q = 0 … 2^b - 1. Codes are always chosen against the
rounded s and z, so that the weight that is evaluated is the weight that is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.scheme import ZeroPoint

# The least scale: bfloat16's smallest normal number. A group smaller than that is zero to within
# half of it, and no division overflows.
MIN_SCALE = torch.finfo(torch.bfloat16).tiny
_LARGEST = torch.finfo(torch.bfloat16).max


def stored(parameters: Tensor) -> Tensor:
    """`parameters` rounded to the bfloat16 that ships (never to infinity), as float32."""
    return parameters.clamp(-_LARGEST, _LARGEST).to(torch.bfloat16).float()


def minmax_grid(low: Tensor, high: Tensor, bits: int, zero: ZeroPoint) -> tuple[Tensor, Tensor]:
    """(scale, zero) of the grid that covers [low, high], elementwise; float32, in stored precision.

    none     s = max|w| / ((2^b - 1)/2), z = 2^(b-1): as compressed-tensors; the most positive weight
             lies half a step above the last level
    integer  the range is widened to hold 0; s = range / (2^b - 1), z = round(-low/s)
    real     s = range / (2^b - 1), z = -low/s
    """
    top = 2**bits - 1
    if zero == "none":
        scale = stored(torch.maximum(-low, high) / (top / 2)).clamp_min_(MIN_SCALE)
        return scale, torch.full_like(scale, float(2 ** (bits - 1)))
    if zero == "integer":
        low, high = low.clamp_max(0), high.clamp_min(0)
    # Divided before subtracting: the range of finite numbers need not be finite.
    scale = high / top - low / top
    if zero == "real":
        # A range far narrower than the numbers in it would need a zero point beyond all precision.
        scale = torch.maximum(scale, torch.maximum(low.abs(), high.abs()) * 2.0**-16)
    scale = stored(scale).clamp_min_(MIN_SCALE)
    if zero == "integer":
        return scale, torch.round(-low / scale).clamp_(0, top)
    return scale, stored(-low / scale)


def encode(weight: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """The codes of the levels nearest to `weight`, float32 whole numbers; shapes broadcast."""
    return (weight / scale).add_(zero).round_().clamp_(0, 2**bits - 1)
