"""What llama.cpp's CPU kernels do to the input of a matrix product, which depends on the weight's type.

ggml multiplies a row of blocks with a row of the same block length, so it first converts the input to the
weight type's partner (`vec_dot_type` in ggml-cpu.c): integers of 8 bits with one scale d for each block,

    Q8_0, Q8_1   32 inputs,   codes round(127 x / amax),  d = amax / 127 in float16
    Q8_K        256 inputs,   codes round(127 x / -peak), d = -peak / 127 in float32

where amax is the greatest magnitude of the block and peak the number that has it (quantize_row_q8_0 and
quantize_row_q8_1 in arch/x86/quants.c, quantize_row_q8_K_ref in ggml-quants.c). Repacked weights and the
tiled and llamafile kernels convert by the same rules. Q8_1 also holds the block's sum, for types with a
minimum; that sum is rounded to float16, which no change of the input can express: it stays out, and costs
agreement in the fourth digit. Weights in float16 meet their input in float16, those in bfloat16 in
bfloat16. All that follows the product is in float32 there as here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_LEVELS = 127.0


def _rounded(dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def function(x: Tensor) -> Tensor:
        return x.to(dtype).to(x.dtype) if x.is_floating_point() else x

    return function


def blocks_of_32(x: Tensor) -> Tensor:
    """Inputs (…, in) as Q8_0 and Q8_1 hold them; token ids, which are looked up, as they are."""
    if not x.is_floating_point():
        return x
    blocks = x.float().reshape(*x.shape[:-1], -1, 32)
    most = blocks.abs().amax(-1, keepdim=True)
    codes = (blocks * torch.where(most > 0, _LEVELS / most, 0.0)).round()
    return (codes * (most / _LEVELS).half().float()).view(x.shape).to(x.dtype)


def blocks_of_256(x: Tensor) -> Tensor:
    """Inputs (…, in) as Q8_K holds them; token ids, which are looked up, as they are."""
    if not x.is_floating_point():
        return x
    blocks = x.float().reshape(*x.shape[:-1], -1, 256)
    peak = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = torch.where(peak != 0, -_LEVELS / peak, 0.0)
    codes = (blocks * scale).round().clamp(max=_LEVELS)
    return (codes * torch.where(peak != 0, 1 / scale, 0.0)).view(x.shape).to(x.dtype)


ROUNDED = {"f16": _rounded(torch.float16), "bf16": _rounded(torch.bfloat16)}
