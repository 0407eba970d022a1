"""The range that 99.99 % of the inputs lie in.

The highest percentile of H. Wu, P. Judd, X. Zhang, M. Isaev, P. Micikevicius, "Integer Quantization for Deep
Learning Inference: Principles and Empirical Evaluation", arXiv:2004.09602, section 4.3. Symmetric levels cut
magnitudes off; affine ones half of the rest at either end, as ONNX Runtime's calibration does. The bound is the
far edge of the bin that reaches the share, so that never more is cut off than said; of fewer than 10,000 inputs
(20,000 for affine levels) nothing is.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.calibration.histogram import BINS, Histogram
from autoq.calibration.observers import Codes, Observer

SHARE = 0.9999


class Percentile(Observer):
    """All but the outermost 0.01 %."""

    def choose(self, inputs: Histogram, low: float, high: float, levels: Codes) -> tuple[float, float]:
        """See `Observer.choose`."""
        if levels.symmetric:
            top = _bins_within(inputs.magnitudes, SHARE) * inputs.width
            return max(low, -top), min(high, top)
        share = 1 - (1 - SHARE) / 2
        upper = _bins_within(inputs.sums, share) - BINS // 2
        lower = BINS // 2 - _bins_within(inputs.sums.flip(0), share)
        return max(low, min(lower * inputs.width, 0.0)), min(high, max(upper * inputs.width, 0.0))


def _bins_within(counts: Tensor, share: float) -> int:
    """How many of the first bins hold at least `share` of all."""
    total = counts.cumsum(0)
    # Not a comparison with share * total, which float rounding could put above the total itself.
    left_out = int(float(total[-1]) * (1 - share) + 1e-6)
    return int(torch.searchsorted(total, total[-1] - left_out)) + 1
