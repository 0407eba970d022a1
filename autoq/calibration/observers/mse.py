"""The range with the least mean squared rounding error, what is cut off included.

    argmin over (low, high) of Σ_b counts_b E[(Q(x) - x)² | x in bin b]

The error is that of values that lie evenly in their bins (`_levels`). A bound is tried at 16 places per octave,
from the whole range down to where a range has 16 bins; between them the error is flat. Symmetric levels have one
bound. Affine ones have two, of which one at a time is moved to where the error is least until neither moves:
each step lowers the error, which begins with that of the whole range, so it is never above `minmax`'s.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoq.calibration.histogram import Histogram
from autoq.calibration.observers import Codes, Observer

PER_OCTAVE = 16
LEAST_BINS = 16
MAX_MOVES = 16


class Mse(Observer):
    """Least squares."""

    def choose(self, inputs: Histogram, low: float, high: float, levels: Codes) -> tuple[float, float]:
        """See `Observer.choose`."""
        filled = inputs.sums > 0
        left, counts = inputs.edges[filled], inputs.sums[filled].double()

        def errors(lows: Tensor, highs: Tensor) -> Tensor:
            return levels.square_error(left, inputs.width, lows[:, None], highs[:, None]) @ counts

        whole = float(errors(torch.tensor([low]).double(), torch.tensor([high]).double()))
        if levels.symmetric:
            tops = _places(max(-low, high), inputs.magnitudes, inputs.width, whole)
            # The first of equal ones, here and below: the widest.
            top = float(tops[errors(-tops, tops).argmin()])
            return max(low, -top), min(high, top)
        half = len(inputs.sums) // 2
        lows = -_places(-low, inputs.sums[:half].flip(0), inputs.width, whole)
        highs = _places(high, inputs.sums[half:], inputs.width, whole)
        i, j = 0, 0
        for _ in range(MAX_MOVES):
            before = (i, j)
            j = int(errors(lows[i].expand(len(highs)), highs).argmin())
            i = int(errors(lows, highs[j].expand(len(lows))).argmin())
            if (i, j) == before:
                break
        return float(lows[i]), float(highs[j])


def _places(bound: float, magnitudes: Tensor, width: float, whole: float) -> Tensor:
    """Where a bound is tried (C,), as magnitudes, the whole one first; float64.

    Left out is where what is cut off, counted from the near edges of its bins, alone errs by more than the whole range.
    """
    octaves = math.log2(bound / (LEAST_BINS * width)) if bound > LEAST_BINS * width else 0.0
    places = bound * 2.0 ** (-torch.arange(int(octaves * PER_OCTAVE) + 1, dtype=torch.float64) / PER_OCTAVE)
    filled = magnitudes > 0
    near = torch.arange(len(magnitudes), dtype=torch.float64)[filled] * width
    cut_off = (near - places[:, None]).clamp_(min=0).square_() @ magnitudes[filled].double()
    return places[(cut_off <= whole) | (places == bound)]
