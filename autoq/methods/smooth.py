"""SmoothQuant: outliers of the input move into the weight, so that inputs in 8 bits keep the rest.

Xiao et al., "SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models" (2023),
equation 4. The product is unchanged, y = (W diag(s)) (x / s), with

    s_j = max|x_j|^α / max_i|W_ij|^(1-α)

Inputs are rounded with one step Δ for all of them, which the largest decides; over s, they are more alike.

    W  `weight`   s  `scales`   α  one of EXPONENTS   max|x_j|  `peak`   Δ  `step`   W' = Q(W diag(s)) diag(1/s)

Where we differ, and why:

- α is searched per layer (the authors set it for a whole model), by what the product of two rounded factors is off:

      E|W x - W' (x + e)|² ≈ Σ_ij (W - W')_ij² E[x_j²] + Σ_ij W'_ij² s_j² Δ²/12        Δ = 2 max_j(max|x_j| / s_j) / 255

  with e the rounding of the input, uniform within Δ s_j. Without scales (s = 1) is tried first: by this measure
  never worse than rtn.
- The authors fold 1/s into the norm before and leave other layers as they are. Here s ships with the layer, as
  bfloat16, and the kernel divides x by it: see `awq`, whose bounds of s are these, too, and so is what it does where
  scales are folded; max|x_j| and max_i|W_ij| are then the largest of all that share s_j.
- Inputs or columns that are all zero count as those of the middle.
- Only inputs whose range is found while running (a8dyn): a calibrated range is one of inputs as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.methods import QuantizedWeight, Statistics
from autoq.methods._inputs import ScalingMethod, input_scales, needed, shared, together
from autoq.methods._search import nearest, plain_grid, unit_of, values
from autoq.scheme import Integer, Scheme

EXPONENTS = tuple(step / 10 for step in range(11))
_STEPS = 255  # of an 8-bit input


class Smooth(ScalingMethod):
    """Uniform integers of a weight that took over the outliers of its inputs, which are quantized, too."""

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not isinstance(scheme, Integer):
            return "smooth makes integers only"
        if scheme.activation != "a8dyn":
            return "smooth is for inputs whose 8-bit range is found while running (a8dyn)"
        if scheme.zero == "real":
            return "smooth rounds its zero point to a code, as rtn does; choose from none, integer"
        return None

    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        assert isinstance(scheme, Integer)
        columns = weight.shape[1]
        squares = needed(scheme, statistics, "input_mean_square", (columns,)).double()
        peak = needed(scheme, statistics, "input_peak", (columns,)).double()
        everyone = together(weight, scheme, statistics)
        unit = unit_of(everyone)
        sizes = shared(everyone.abs().amax(0).double(), scheme, statistics, "amax")
        widest = shared(peak, scheme, statistics, "amax")
        best, least = torch.ones(columns), float("inf")
        for exponent in (None, *EXPONENTS):
            scales = best if exponent is None else input_scales(_wanted(widest, sizes, exponent), scheme.folded)
            plain = plain_grid(everyone * scales, scheme)
            found = values(everyone * scales, scheme, *plain).div_(scales).mul_(unit)
            step = 2 * (peak / scales).max() / _STEPS
            off = found.sub(everyone, alpha=unit).square_().sum(0, dtype=torch.float64)
            energy = found.square_().sum(0, dtype=torch.float64)
            error = float(off @ squares + energy @ scales.double().square() * step.square() / 12)
            if error < least:
                best, least = scales, error
        own = weight.float() * best
        return nearest(own, scheme, *plain_grid(own, scheme), best)


def _wanted(peak: Tensor, sizes: Tensor, exponent: float) -> Tensor:
    """The paper's s (in,), float32; 0 where an input or a column is all zero, or s is no float32."""
    wanted = peak**exponent / sizes ** (1 - exponent)
    usable = (peak > 0) & (sizes > 0)
    wanted = torch.where(usable, wanted, 0.0)
    middle = wanted[usable].log().mean().exp() if usable.any() else 1.0
    return (wanted / middle).float().nan_to_num_(0.0, 0.0, 0.0)
