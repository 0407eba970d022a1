"""Round to nearest within a clipped range: each group gives up its largest weights for a finer step, if that pays.

The clipping search of AWQ (Lin et al., "AWQ: Activation-aware Weight Quantization", 2024, section 4.1 and their
code) and of OMNIQUANT's learned form, by what an error costs at the layer's inputs:

    c ← argmin over c of Σ_j E[x_j²] (w_j - w'_j(c))²        w'(c) on rtn's grid over [c min, c max]

    c  one of RATIOS, for each group, channel or tensor     w  weight     w'  dequantized     x_j  the j-th input

Where we differ: AWQ measures the error of sums over a group on 512 sampled inputs, Σ_t (Σ_j (w_j - w'_j) x_tj)².
Here inputs count as unrelated, which needs one number for each instead of their text, and is what rounding errors
mostly are. The grid is rounded to what ships before it is judged. c = 1 is rtn: by this measure never worse.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from autoq.methods import QuantizedWeight, Statistics
from autoq.methods._inputs import InputMethod, mean_squares
from autoq.methods._search import best_grid, nearest
from autoq.methods._uniform import minmax_grid
from autoq.scheme import Integer, Scheme, ZeroPoint

RATIOS = tuple(1 - 0.04 * step for step in range(17))  # 1 … 0.36: at 2 bits, ranges down to 0.4 are chosen


def clipped_grids(low: Tensor, high: Tensor, bits: int, zero: ZeroPoint) -> Iterator[tuple[Tensor, Tensor]]:
    """rtn's grids over [c low, c high], elementwise, for each c of RATIOS: (scale, zero) as they ship."""
    return (minmax_grid(low * ratio, high * ratio, bits, zero) for ratio in RATIOS)


class Clip(InputMethod):
    """Uniform integers over a part of each range, by the second moments of the inputs."""

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not isinstance(scheme, Integer):
            return "clip makes integers only"
        if scheme.zero == "real":
            return "clip rounds its zero point to a code, as rtn does; choose from none, integer"
        return None

    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        assert isinstance(scheme, Integer)
        importance = mean_squares(scheme, statistics, weight.shape[1])
        bits, zero = scheme.bits, scheme.zero
        grid = best_grid(weight, scheme, lambda low, high: clipped_grids(low, high, bits, zero), importance)
        return nearest(weight, scheme, *grid)
