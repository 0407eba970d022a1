"""GPTQ: columns are rounded one after the other, and those still to come make up for each one's error.

Frantar, Ashkboos, Hoefler & Alistarh, "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained
Transformers" (2023), algorithm 1. It looks for codes with a small error of the layer's output on its inputs,

    E|W x - W' x|² = tr(ΔW H ΔWᵀ)        H = E[x xᵀ]

With U the upper Cholesky factor of the inverse, (H + λI)⁻¹ = Uᵀ U, and for each column j in turn

    w'_j ← nearest level to w_j          e ← (w_j - w'_j) / U_jj          w_k ← w_k - U_jk e   for all k after j

which is what least squares asks of the columns to come. Updates of columns beyond the current `BLOCK` are
gathered and done as one product ("lazy batch updates").

    W  `work`, transposed: (in, out), so that a column is contiguous     e  `errors`     U  `factor`
    H  `hessian`      λ  DAMPING times the mean of H's diagonal

Where we differ, and why:

- Grids are fixed before the first column ("static groups"), so that columns can be taken in any order while groups
  stay contiguous and the scheme ships no permutation. The order is that of H's diagonal, greatest first ("act-order"
  in the authors' code): inputs that matter most are rounded while all others can still make up for them. Without
  groups it is the same order; there grids are fixed in the paper, too.
- The grids are those of `clip`, where the authors take the whole range of each group (their code's `mse` clips by plain
  squares). Each input counts by what an error of its weights costs once those to come have made up for it: the sum that
  the codes end with is Σ_j e_j², so an error of w_j counts 1 / U_jj². By H_jj instead, one input that is nearly always
  the same decides the grid of its group, although others make up for all its errors. On layers of SmolLM2 the error on
  other text is 0.91 of that on whole ranges at 4 bits, 0.83 at 3 and 0.63 at 2; by H_jj 1.04, 0.89 and 0.65.
- λ is 0.1 of the diagonal's mean, not 0.01: codes are chosen less for the accidents of a few thousand tokens.
- The factor is formed from the Cholesky factor of H in reversed order, whose inverse it is: two triangular
  steps instead of an inverse between two factorizations, and none of them meets a matrix of squared condition.
- An input that was always zero (H_jj = 0) gets plain rounding and takes no part, as in the authors' code, but its
  weights are kept, not set to zero: other text may read them. λ doubles until the factorization succeeds, so a
  Hessian of any rank will do; of rank 0 the result is rtn's.
- Each row keeps rtn's grid and codes where theirs is the smaller error by H: never worse than rtn, row by row; where
  all rows share a grid, all together.
- The row is scaled by a power of two, so that nothing overflows that the weight itself holds.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.layer import MOST_HESSIAN_INPUTS
from autoq.methods import QuantizedWeight, Statistics
from autoq.methods._inputs import InputMethod, second_moments
from autoq.methods._search import best_grid, plain_grid, row_errors, unit_of
from autoq.methods._uniform import encode
from autoq.methods._weights import IntegerWeight
from autoq.methods.clip import clipped_grids
from autoq.scheme import Integer, PerTensor, Scheme

DAMPING = 0.1
BLOCK = 64
_LEAST = torch.finfo(torch.float32).tiny
_ROWS = 4096  # at once: rows do not depend on each other, and a block of columns of so many stays in a cache


class Gptq(InputMethod):
    """Uniform integers on clip's grids, with codes that make up for each other's errors."""

    version = 2

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not isinstance(scheme, Integer):
            return "gptq makes integers only"
        if shape[1] > MOST_HESSIAN_INPUTS:
            return f"gptq needs the Hessian of the inputs, which is kept for at most {MOST_HESSIAN_INPUTS}"
        return None

    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        assert isinstance(scheme, Integer)
        return corrected(weight, scheme, second_moments(scheme, statistics, weight.shape[1]))


def corrected(weight: Tensor, scheme: Integer, hessian: Tensor) -> IntegerWeight:
    """A weight (out, in) by its inputs' second moments (in, in), float64, whose diagonal has the mean 1 or is zero."""
    rows, columns = weight.shape
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    factor = inverse_factor(hessian[order][:, order], DAMPING).float()
    moments = hessian.float()
    weight = weight.float()
    costs = torch.empty(columns)
    costs[order] = factor.diagonal().reciprocal().square_()
    costs[hessian.diagonal() <= 0] = 0.0  # as no error of theirs shows
    costs /= costs.mean().clamp(min=_LEAST)
    bits, origin = scheme.bits, scheme.zero
    clipped = best_grid(weight, scheme, lambda low, high: clipped_grids(low, high, bits, origin), costs)
    grids = [clipped, plain_grid(weight, scheme)]
    together = isinstance(scheme.granularity, PerTensor)  # all rows have one grid: no row chooses by itself
    unit = unit_of(weight)
    group_of = torch.arange(columns) // (columns // grids[0][0].shape[1])
    codes = [torch.empty(rows, columns, dtype=torch.uint8) for _ in grids]
    errors = [torch.empty(rows) for _ in grids]
    for start in range(0, rows, _ROWS):
        part = slice(start, min(start + _ROWS, rows))
        # In units in which the largest weight is near 1, so that no sum of others overflows.
        own = weight[part] * unit
        for index, (scales, zeros) in enumerate(grids):
            shared = slice(None) if together else part
            scale = (scales[shared] * unit).clamp_(min=_LEAST)[:, group_of]
            zero = zeros[shared][:, group_of]
            if index == 0:
                found = torch.empty_like(own)
                turned = [matrix[:, order].t().contiguous().expand(-1, len(own)) for matrix in (own, scale, zero)]
                found[:, order] = solve(turned[0], turned[1], turned[2], factor, scheme.bits).t()
            else:
                found = encode(own, scale, zero, scheme.bits)
            errors[index][part] = row_errors(own - (found - zero) * scale, moments)
            codes[index][part] = found
    if together:
        errors = [each.sum(0, keepdim=True) for each in errors]
    better = (errors[0] < errors[1])[:, None]
    (scales, zeros), (plain_scales, plain_zeros) = grids
    scales, zeros = torch.where(better, scales, plain_scales), torch.where(better, zeros, plain_zeros)
    return IntegerWeight.of(scheme, torch.where(better, codes[0], codes[1]), scales, zeros)


def inverse_factor(hessian: Tensor, damping: float) -> Tensor:
    """The upper U of (H + λI)⁻¹ = Uᵀ U, float64, for H (in, in) whose diagonal has the mean 1; λ is at least `damping`.

    Inputs that were always zero are unrelated to all others in it.
    """
    damped = hessian.clone()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1.0
    while True:
        # H = R Rᵀ with R upper is a Cholesky factorization of H in reversed order, and then U = R⁻¹.
        reverse = (damped + damping * torch.eye(len(damped), dtype=damped.dtype)).flip(0, 1)
        lower, failed = torch.linalg.cholesky_ex(reverse)
        if not failed:
            break
        damping *= 2
    root = lower.flip(0, 1)
    factor: Tensor = torch.linalg.solve_triangular(root, torch.eye(len(root), dtype=root.dtype), upper=True)
    return factor


def solve(weight: Tensor, scale: Tensor, zero: Tensor, factor: Tensor, bits: int) -> Tensor:
    """Codes (in, rows), float32 whole numbers, for `weight`, `scale` and `zero` (in, rows) in the factor's order."""
    work = weight.clone()
    codes = torch.empty_like(work)
    inverse = factor.diagonal().reciprocal()
    columns, top = len(work), 2**bits - 1
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.empty(end - start, work.shape[1])
        for column in range(start, end):
            own, step, origin = work[column], scale[column], zero[column]
            code = torch.div(own, step, out=codes[column]).add_(origin).round_().clamp_(0, top)
            error = torch.sub(own, (code - origin).mul_(step), out=errors[column - start]).mul_(inverse[column])
            if column + 1 < end:
                work[column + 1 : end].addr_(factor[column, column + 1 : end], error, alpha=-1)
        if end < columns:
            work[end:].addmm_(factor[start:end, end:].t(), errors, alpha=-1)
    return codes
