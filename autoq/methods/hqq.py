"""Half-quadratic quantization: a zero point (or a step) per group that minimizes a sparse norm of the error.

Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). Needs no data.
With the scale s fixed, it looks for the zero point z of each group that minimizes φ(w - (q - z)s), where
φ is the l_p norm, p < 1, whose minimum lets a few weights be far off so that most are close. Half-quadratic
splitting adds a variable e for the error and alternates, with β growing by κ,

    e ← shrink(w - (q - z)s),   shrink(x) = sign(x) max(0, |x| - |x|^(p-1)/β)
    z ← mean over the group of q - (w - e)/s,   q = clamp(round(w/s + z), 0, 2^b - 1)

With r = (w - e)/s - (q - z), what is left of the error in steps, that is z ← z - mean(r).

    w  `weight`   s  `scale`   z  `zero`   q - z  `levels`   e/s  `shrunk`   r  `rest`   p  NORM   β  BETA   κ  KAPPA

Where we differ from the paper and the authors' code (hqq 0.2.8), and why:

- Errors are measured in steps. With p < 1 shrinkage depends on the unit; in the weights' own unit and with
  β = 10, every error below 0.17 shrinks to zero, which is every error in a language model, and the solver
  becomes plain averaging. In steps one β serves every layer, and the result scales with the weight. β = 3 and
  κ = 1.1 were the best of a sweep over SmolLM2-135M's layers at 4, 3 and 2 bits.
- An integer zero point has no room to move: rounded after or within the iterations it changes nothing. There
  the scale is what is solved for, by the same splitting: s ← s (1 + Σ r(q - z) / Σ (q - z)²), from rtn's grid.
- Each group keeps the best that it met, by mean absolute error, so a group is never worse than it started
  (the authors stop by the same error, of the whole layer). A block of rows stops when its groups together
  hardly get better.
- s and real z are rounded to the bfloat16 that ships within the loop, so the error is that of what is stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.methods import QuantizedWeight, Statistics
from autoq.methods._ruled import RuledMethod
from autoq.methods._uniform import MIN_SCALE, encode, minmax_grid, stored
from autoq.methods._weights import IntegerWeight, grid_shape, row_blocks
from autoq.scheme import Integer, PerTensor, Scheme, ZeroPoint

NORM = 0.7
BETA, KAPPA = 3.0, 1.1
ITERATIONS = 20
# Errors below this many steps count as this: x^(p-1) has no value at 0, and shrinks to 0 there anyway.
_LEAST_ERROR = 1e-4
# A block of rows is done when an iteration lowers its mean error by less than this fraction.
_TOLERANCE = 1e-4


class HalfQuadratic(RuledMethod):
    """Uniform integers with optimized parameters, per group or channel."""

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not isinstance(scheme, Integer):
            return "hqq makes integers only"
        if scheme.zero == "none":
            return "hqq optimizes zero points and symmetric has none; choose from integer, real"
        if isinstance(scheme.granularity, PerTensor):
            return "hqq works per channel or per group, not per tensor"
        return None

    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        assert isinstance(scheme, Integer)
        rows, columns = weight.shape
        _, groups = grid_shape(scheme.granularity, (rows, columns))
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        scales, zeros = torch.empty(rows, groups), torch.empty(rows, groups)
        for block in row_blocks(rows, columns):
            grouped = weight[block].float().reshape(-1, groups, columns // groups)
            low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
            start = minmax_grid(low, high, scheme.bits, scheme.zero)
            scale, zero = _solve(grouped, *start, scheme.bits, scheme.zero)
            codes[block] = encode(grouped, scale, zero, scheme.bits).view(-1, columns)
            scales[block], zeros[block] = scale.squeeze(-1), zero.squeeze(-1)
        return IntegerWeight.of(scheme, codes, scales, zeros)


def _solve(weight: Tensor, scale: Tensor, zero: Tensor, bits: int, kind: ZeroPoint) -> tuple[Tensor, Tensor]:
    """The (scale, zero) with the least mean absolute error met on the way down from those given.

    `weight` is (rows, groups, group size), the parameters (rows, groups, 1), all float32.
    """
    best_scale, best_zero, best_error = scale, zero, torch.full_like(scale, torch.inf)
    reached, beta = float("inf"), BETA
    for _ in range(ITERATIONS):
        coded = weight / scale
        levels = (coded + zero).round_().clamp_(0, 2**bits - 1).sub_(zero)
        error = coded.sub_(levels)
        size = error.abs()
        mean_error = size.mean(-1, keepdim=True).mul_(scale)
        better = mean_error < best_error
        best_error = torch.where(better, mean_error, best_error)
        best_scale, best_zero = torch.where(better, scale, best_scale), torch.where(better, zero, best_zero)
        # In float64, where sums of the largest float32 stay finite.
        total = best_error.sum(dtype=torch.float64).item()
        if not total < reached * (1 - _TOLERANCE):
            break
        reached = total
        size.clamp_min_(_LEAST_ERROR)
        shrunk = size.sub_(size.pow(NORM - 1).div_(beta)).clamp_min_(0).copysign_(error)
        rest = error.sub_(shrunk)
        if kind == "real":
            zero = stored(zero - rest.mean(-1, keepdim=True))
        else:
            along = rest.mul_(levels).sum(-1, keepdim=True)
            length = levels.square_().sum(-1, keepdim=True).clamp_min_(1)  # whole numbers; all zero moves nothing
            scale = stored(scale * (1 + along / length)).clamp_min_(MIN_SCALE)
        beta *= KAPPA
    return best_scale, best_zero
