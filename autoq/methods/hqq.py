"""Half-quadratic quantization: min/max steps, and zero points that minimize a sparse norm of the error.

Badri & Shaji, "Half-Quadratic Quantization of Large Machine Learning Models" (2023). Needs no data.
With the scale fixed, it looks for the zero point z of each group that minimizes φ(w - (q - z) s), where
φ is the l_p norm, p < 1, whose minimum lets a few weights be far off so that most are close. Half-quadratic
splitting adds a variable e for the error and alternates, with β growing by κ,

    e ← shrink_p(w - (q - z)s, β),   shrink_p(x, β) = sign(x) max(0, |x| - |x|^(p-1)/β)
    z ← mean over the group of (q - (w - e)/s),   q = clamp(round(w/s + z), 0, 2^b - 1)

    w  weight / `coded` (w/s)    s  `scale`    z  `zero`    q  `codes`    e  `shrunk`    p  NORM    β  BETA    κ  KAPPA

Where we differ from the authors' code (hqq 0.2.8), and why:

- Errors are measured in steps (w/s instead of w). With p < 1 the shrinkage depends on the unit; in the
  weights' own unit and β = 10 it is zero for every error below 0.17, that is for all of them in a
  language model, and the solver becomes plain averaging. In steps, one β serves every layer, and the
  result scales with the weight. β = 3, κ = 1.1 were the best of a sweep over SmolLM2's layers at 4, 3, 2 bits.
- Each group keeps the best zero point that it met, by mean absolute error (the authors' stopping rule, but
  they apply it to the whole layer). A block of rows stops when
  its groups together hardly get better.
- z is rounded to the bfloat16 that ships within the loop, s before it.
- An integer zero point is the solution rounded to a code, or the min/max one where that is better, so that
  a group is never worse than under rtn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.methods import QuantizedWeight
from autoq.methods._ruled import RuledMethod
from autoq.methods._uniform import minmax_grid, stored
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
    """Uniform integers with optimized zero points, per group or channel."""

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not isinstance(scheme, Integer):
            return "hqq makes integers only"
        if scheme.zero == "none":
            return "hqq optimizes zero points and symmetric has none; choose from integer, real"
        if isinstance(scheme.granularity, PerTensor):
            return "hqq works per channel or per group, not per tensor"
        return None

    def make(self, weight: Tensor, scheme: Scheme) -> QuantizedWeight:
        assert isinstance(scheme, Integer)
        rows, columns = weight.shape
        _, groups = grid_shape(scheme.granularity, (rows, columns))
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        scales, zeros = torch.empty(rows, groups), torch.empty(rows, groups)
        for block in row_blocks(rows, columns):
            grouped = weight[block].float().reshape(-1, groups, columns // groups)
            low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
            scale, start = minmax_grid(low, high, scheme.bits, scheme.zero)
            coded = grouped / scale
            zero = _solve(coded, start, scheme.bits, scheme.zero)
            codes[block] = _codes(coded, zero, scheme.bits).view(-1, columns)
            scales[block], zeros[block] = scale.squeeze(-1), zero.squeeze(-1)
        return IntegerWeight.of(scheme, codes, scales, zeros)


def _codes(coded: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (coded + zero).round_().clamp_(0, 2**bits - 1)


def _solve(coded: Tensor, start: Tensor, bits: int, kind: ZeroPoint) -> Tensor:
    """The best zero point found for each group, (rows, groups, 1), as it ships.

    `coded` (rows, groups, group size) is the weight in steps; `start` is the min/max zero point.
    """
    best = _descend(coded, start, bits)
    if kind == "real":
        return best
    rounded = best.round_().clamp_(0, 2**bits - 1)
    better = _mean_error(coded, rounded, bits) < _mean_error(coded, start, bits)
    return torch.where(better, rounded, start)


def _mean_error(coded: Tensor, zero: Tensor, bits: int) -> Tensor:
    return (_codes(coded, zero, bits) - zero).sub_(coded).abs_().mean(-1, keepdim=True)


def _descend(coded: Tensor, start: Tensor, bits: int) -> Tensor:
    """Half-quadratic splitting from `start`; the zero points with the least mean absolute errors met."""
    zero, best = start, start
    best_error = torch.full_like(start, torch.inf)
    reached = torch.inf
    beta = BETA
    for _ in range(ITERATIONS):
        offset = _codes(coded, zero, bits).sub_(coded)  # q - w/s
        error = zero - offset  # w/s - (q - z)
        size = error.abs()
        mean_error = size.mean(-1, keepdim=True)
        better = mean_error < best_error
        best, best_error = torch.where(better, zero, best), torch.where(better, mean_error, best_error)
        total = best_error.sum().item()
        if not total < reached * (1 - _TOLERANCE):
            break
        reached = total
        size.clamp_min_(_LEAST_ERROR)
        shrunk = torch.copysign(size.sub_(size.pow(NORM - 1).div_(beta)).clamp_min_(0), error)
        zero = stored(offset.add_(shrunk).mean(-1, keepdim=True))
        beta *= KAPPA
    return best
