"""Quantizing the input of a layer to 8 bits: symmetric, round half to even, one scale per token or for all.

For int8 scale = amax / 127, for fp8 (E4M3) scale = amax / 448; amax is a token's own (`a8dyn`) or a
calibrated one (`a8static`, or whichever observer is named instead). What CUDA's int8 and fp8 kernels are fed
with, and what is assumed of a device of which only the description is known.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from autoq.calibration.observers import FP8, SYMMETRIC_INT8, input_range
from autoq.scheme import OBSERVERS, Float, Integer

FP8_MAX = 448.0
INT8_MAX = 127.0


def encode(x: Tensor, fp8: bool, largest: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Codes (…, in) and scales (…, 1) float32 of an input (…, in): float8_e4m3fn or int8 codes.

    `largest` () is the calibrated largest magnitude, beyond which inputs are cut off; None: each row's own.
    A row of zeros has the scale 1.
    """
    wide = x.float()
    limit = FP8_MAX if fp8 else INT8_MAX
    top = wide.abs().amax(-1, keepdim=True) if largest is None else largest.float().expand(*x.shape[:-1], 1)
    scales = torch.where(top > 0, top / limit, 1.0)
    levels = wide / scales
    if fp8:
        return levels.clamp(-limit, limit).to(torch.float8_e4m3fn), scales
    return levels.round().clamp(-limit, limit).to(torch.int8), scales


def activation(scheme: Integer | Float, statistics: Mapping[str, Tensor] | None) -> Callable[[Tensor], Tensor]:
    """The function that rounds an input as `scheme`, which quantizes activations, says; shape and dtype stay.

    `statistics` are the layer's, given where the scheme is calibrated. Raises `SchemeRefused` where its range is
    missing.
    """
    fp8 = isinstance(scheme, Float)
    largest: Tensor | None = None
    if scheme.activation in OBSERVERS:
        largest = input_range(scheme, statistics or {}, FP8 if fp8 else SYMMETRIC_INT8).abs().max()

    def rounded(x: Tensor) -> Tensor:
        codes, scales = encode(x, fp8, None if largest is None else largest.to(x.device))
        values: Tensor = codes.float() * scales
        # Codes cannot hold NaN or infinity; such an input stays what it is, and its outcome is seen.
        return torch.where(torch.isfinite(x), values, x.float()).to(x.dtype)

    return rounded
