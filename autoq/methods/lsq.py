"""Learned step size: each group's scale goes downhill on the error of the layer's output, and codes follow by rounding.

Esser et al., "Learned Step Size Quantization" (2020), equations 1 to 5, here for one layer and the error of its output,
of which the Hessian of the inputs is all that counts:

    E|W x - W' x|² = tr(ΔW H ΔWᵀ)      H = E[x xᵀ]      w' = (q - z) s      q = clamp(round(w/s + z), 0, Q)

    ∂w'/∂s = q - z

    w  weight     s  scale     z  zero     q  codes     Q = 2^b - 1     ΔW = W' - W

Where we differ, and why:

- The paper learns weights and scales of a whole network by its loss. A method makes one layer from its weight and H:
  scales alone are learned, weights stay, and every code is the nearest level's. `autoq recover` does the paper's.
- The paper's derivative has -w/s beside it where no code is clipped: what rounding, taken for the identity, makes of a
  moving scale. Weights that stay do not need it: with it, errors on SmolLM2 were 2 to 4 % greater at the best rate.
- What goes downhill is the logarithm of a row's error, by the logarithms of its scales, with Adam and a cosine: so one
  learning rate means the same share of a scale for every layer. LSQ's factor 1/sqrt(n Q) has no part in it.
- It starts from the grid of `clip`, whose zero points stay, and each row keeps the best of all steps: never worse
  than `clip` by the error of outputs, row by row, and where all rows share a scale, all together.
- s is rounded as it ships before a step is judged.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoq.layer import MOST_HESSIAN_INPUTS
from autoq.methods import QuantizedWeight, Statistics
from autoq.methods._inputs import InputMethod, mean_squares, second_moments
from autoq.methods._search import best_grid, nearest, unit_of
from autoq.methods._uniform import MIN_SCALE, encode, stored
from autoq.methods.clip import clipped_grids
from autoq.scheme import Integer, PerTensor, Scheme

STEPS = 60
RATE = 0.02  # of the first steps, as a share of a scale
BETAS = (0.9, 0.99)
PATIENCE, LEAST_GAIN = 12, 1e-3  # it ends early where so many steps lowered the error by no more than this share
_ROWS = 4096  # at once: rows do not depend on each other
_LEAST = torch.finfo(torch.float32).tiny


class LearnedStepSize(InputMethod):
    """Uniform integers whose scales are learned by the second moments of the inputs."""

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not isinstance(scheme, Integer):
            return "lsq makes integers only"
        if scheme.zero == "real":
            return "lsq keeps the zero points of clip, which are codes; choose from none, integer"
        if shape[1] > MOST_HESSIAN_INPUTS:
            return f"lsq needs the Hessian of the inputs, which is kept for at most {MOST_HESSIAN_INPUTS}"
        return None

    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        assert isinstance(scheme, Integer)
        moments = second_moments(scheme, statistics, weight.shape[1]).float()
        bits, zero = scheme.bits, scheme.zero
        importance = mean_squares(scheme, statistics, weight.shape[1])
        scales, zeros = best_grid(weight, scheme, lambda low, high: clipped_grids(low, high, bits, zero), importance)
        step = len(weight) if isinstance(scheme.granularity, PerTensor) else _ROWS
        unit = unit_of(weight)
        for start in range(0, len(weight), step):
            part = weight[start : start + step].float() * unit
            rows = slice(start, start + step) if len(scales) > 1 else slice(None)
            scales[rows] = learned(part, scales[rows], zeros[rows], moments, bits, unit)
        return nearest(weight, scheme, scales, zeros)


def learned(weight: Tensor, scales: Tensor, zeros: Tensor, moments: Tensor, bits: int, unit: float) -> Tensor:
    """The best scales (rows or 1, groups) on the way from `scales`, for a weight (rows, in).

    `weight` comes multiplied by `unit`, scales do not. Rows that share a scale share what is best.
    """
    first = (scales * unit).clamp_(min=_LEAST)
    shape, rows, groups = first.shape, len(weight), scales.shape[1]
    bounds = max(MIN_SCALE * unit, _LEAST), torch.finfo(torch.bfloat16).max * min(unit, 1.0)
    weight, zeros = weight.view(rows, groups, -1), zeros[..., None]
    exponent, mean, square = torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)
    best, least = first.clone(), torch.full((len(first), 1), math.inf)
    history: list[float] = []
    for count in range(STEPS + 1):
        scale = first if count == 0 else stored(first * exponent.exp()).clamp_(*bounds)
        lever = encode(weight, scale[..., None], zeros, bits).sub_(zeros)
        off = (lever * scale[..., None]).sub_(weight)
        slope = (off.view(rows, -1) @ moments).view_as(off)
        error = (slope * off).sum((1, 2)).view(-1, 1).sum_to_size(len(first), 1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        history.append(float(least.sum()))
        if count == STEPS or (count > PATIENCE and history[-1 - PATIENCE] - history[-1] <= LEAST_GAIN * history[-1]):
            break
        pull = lever.mul_(slope).sum(-1).sum_to_size(shape)
        gradient = pull.mul_(scale).div_(error.clamp(min=_LEAST)).nan_to_num_(0.0, 0.0, 0.0)
        mean.lerp_(gradient, 1 - BETAS[0])
        square.lerp_(gradient.square_(), 1 - BETAS[1])
        norm = math.sqrt(1 - BETAS[1] ** (count + 1)) / (1 - BETAS[0] ** (count + 1))
        rate = RATE * 0.5 * (1 + math.cos(math.pi * count / STEPS))
        exponent -= mean.div(square.sqrt().add_(1e-8)).mul_(rate * norm)
    return torch.where(best == first, scales, best.double().div_(unit).float())
