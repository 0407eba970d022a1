"""AWQ: inputs that matter more get finer steps, by a scale for each input that moves into the weight and out again.

Lin et al., "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration" (2024), equations 4, 5:

    s* ← argmin over s of E|W x - Q(W diag(s)) (x / s)|²        s_j = a_j^α,  a_j = size of the j-th input

The grid of Q is shared by a group of inputs, so a column that is made larger by s_j is rounded to steps that are
smaller by s_j. α is searched, and then each group's range is clipped, as `clip` does it, where that pays.

    W  `weight`   s  `scales`   α  one of EXPONENTS   a_j  √E[x_j²]   W' = Q(W diag(s)) diag(1/s)

The error of one candidate is tr((W - W') H (W - W')ᵀ) with H = E[x xᵀ], which is what the authors measure on sampled
inputs, over all of them.

Where we differ, and why:

- a_j is the root mean square of the input, which is at hand; the authors take the mean of its magnitude.
- The authors fold 1/s into what computes x (a norm, or the layer before) and so must share s among q, k and v, and
  leave out layers whose input nobody can fold into. Here s ships with the layer, as bfloat16, and each layer has its
  own best one: the kernel divides x by it. It is rounded before W is scaled, and only ratios count: the largest is 1,
  so that W diag(s) never overflows; the least is `LEAST`.
- For kernels that divide nothing (`awq-int4-g64-fold`) s is folded as the authors do it, and is then one of powers of
two,
  so that folding rounds nothing. α is searched for all layers that share s together: W is the weights `together`, one
  below the other. Inputs that are one channel of what is scaled, in heads that share values, get one s, by the mean of
  their E[x²]. Not never worse than rtn, row by row: only all of them together.
- An input that was always zero counts as one of the middle (the geometric mean of the others).
- Each row is clipped only if that lowers its error by H. α = 0 without clipping is rtn: never worse than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.layer import MOST_HESSIAN_INPUTS
from autoq.methods import QuantizedWeight, Statistics
from autoq.methods._inputs import ScalingMethod, input_scales, second_moments, shared, together
from autoq.methods._search import best_grid, nearest, plain_grid, row_errors, unit_of, values
from autoq.methods.clip import clipped_grids
from autoq.scheme import Integer, PerTensor, Scheme

EXPONENTS = tuple(step / 10 for step in range(11))


class Awq(ScalingMethod):
    """Uniform integers of a weight whose columns were scaled by their inputs, and the scales."""

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not isinstance(scheme, Integer):
            return "awq makes integers only"
        if scheme.zero == "real":
            return "awq rounds its zero point to a code, as rtn does; choose from none, integer"
        if shape[1] > MOST_HESSIAN_INPUTS:
            return f"awq needs the Hessian of the inputs, which is kept for at most {MOST_HESSIAN_INPUTS}"
        return self.folded_rule(scheme)

    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        assert isinstance(scheme, Integer)
        moments = second_moments(scheme, statistics, weight.shape[1]).float()
        weight = weight.float()

        def errors(weight: Tensor, scales: Tensor, grid: tuple[Tensor, Tensor]) -> Tensor:
            """What each row's outputs are off by, squared, (out,)."""
            found = values(weight * scales, scheme, *grid).div_(scales)
            return row_errors(found.mul_(unit).sub_(weight, alpha=unit), moments)

        everyone = together(weight, scheme, statistics)
        unit = unit_of(everyone)
        sizes = shared(moments.diagonal(), scheme, statistics, "mean").sqrt()
        best, least_sum = torch.ones(len(moments)), torch.inf
        for exponent in EXPONENTS:
            scales = input_scales(sizes**exponent, scheme.folded)
            error_sum = float(errors(everyone, scales, plain_grid(everyone * scales, scheme)).sum())
            if error_sum < least_sum:
                best, least_sum = scales, error_sum
        grid = plain_grid(weight * best, scheme)
        least = errors(weight, best, grid)
        wanted = moments.diagonal() / best.square()
        bits, zero = scheme.bits, scheme.zero
        clipped = best_grid(weight * best, scheme, lambda low, high: clipped_grids(low, high, bits, zero), wanted)
        pays = errors(weight, best, clipped) < least
        if isinstance(scheme.granularity, PerTensor):
            pays = (errors(weight, best, clipped).sum() < least.sum()).view(1)
        scales, zeros = (torch.where(pays[:, None], new, old) for new, old in zip(clipped, grid, strict=True))
        return nearest(weight * best, scheme, scales, zeros, best)
