"""A histogram of a layer's inputs that is filled in one pass, without knowing their range beforehand.

`BINS` bins of equal width span [-2^e, 2^e), with e the least integer for which that holds every value so far.
A value beyond doubles the range as often as needed, and each doubling merges bins in pairs. As widths are
powers of two, the bins of one range nest in those of the next and the quotient by a width is exact: the
histogram is that of all values at once, in whatever order and portions they came. At least a quarter of the
bins reach up to the largest magnitude. PyTorch's `HistogramObserver` and pytorch-quantization's calibrator
widen ranges too, to where the new values lie, and then share out counts between bins that do not nest.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoq.errors import NotFinite

BINS = 16384
MIN_EXPONENT = -100  # magnitudes below 2^-100 share the two bins beside 0


class Binned:
    """Values, of any shape, float dtype and device, by the bins of the least range that holds them.

    Raises `NotFinite` for NaN or infinity.
    """

    def __init__(self, x: Tensor) -> None:
        # On the CPU, where the order of additions is always the same.
        values = x.detach().reshape(-1).float().cpu()
        largest = float(values.abs().max()) if values.numel() else 0.0
        if not math.isfinite(largest):
            raise NotFinite("its inputs are NaN or infinite on the calibration data")
        # The k of 2^(k-1) <= largest < 2^k.
        self.exponent = max(math.frexp(largest)[1], MIN_EXPONENT) if largest > 0 else MIN_EXPONENT
        # Float64, for in float32 the quotient of a small negative value may be -0.
        places = (values.double() * 2.0 ** -_log_width(self.exponent)).floor_()
        self.places = places.to(torch.int16)  # counted from the first bin that holds no negative values

    def sums(self, weights: Tensor | None = None) -> Tensor:
        """How many values a bin holds (BINS,) int64, or the sum float64 of their `weights`, which has their shape."""
        own = None if weights is None else weights.detach().reshape(-1).double().cpu()
        return torch.bincount(self.places.long() + BINS // 2, weights=own, minlength=BINS)


def _log_width(exponent: int) -> int:
    return exponent + 1 - int(math.log2(BINS))


def _widened(sums: Tensor, doublings: int) -> Tensor:
    """The sums of a range that is 2^doublings as wide."""
    if doublings <= 0:
        return sums
    half = BINS // 2
    places = half + torch.div(torch.arange(BINS) - half, 2 ** min(doublings, 60), rounding_mode="floor")
    return torch.zeros_like(sums).index_add_(0, places, sums)


class Histogram:
    """Counts, or sums of weights, of values by bin: bin b holds [(b - BINS/2) width, (b + 1 - BINS/2) width)."""

    def __init__(self, sums: Tensor | None = None, exponent: int = MIN_EXPONENT) -> None:
        self.sums = torch.zeros(BINS, dtype=torch.int64) if sums is None else sums  # (BINS,), on the CPU
        self.exponent = exponent

    def add(self, x: Tensor | Binned, weights: Tensor | None = None) -> None:
        """Count values, each as its of `weights` if there are any, which make the sums float64.

        Raises what `Binned` raises, and then has counted nothing.
        """
        binned = x if isinstance(x, Binned) else Binned(x)
        self.widen(binned.exponent)
        self.sums = self.sums + _widened(binned.sums(weights), self.exponent - binned.exponent)

    def widen(self, exponent: int) -> None:
        """Make the range at least [-2^exponent, 2^exponent)."""
        self.sums = _widened(self.sums, exponent - self.exponent)
        self.exponent = max(exponent, self.exponent)

    @property
    def width(self) -> float:
        """Of one bin."""
        return 2.0 ** _log_width(self.exponent)

    @property
    def edges(self) -> Tensor:
        """The lower edges of the bins, (BINS,) float64."""
        return (torch.arange(BINS, dtype=torch.float64) - BINS // 2) * self.width

    @property
    def centres(self) -> Tensor:
        """The middles of the bins, (BINS,) float64."""
        return self.edges + self.width / 2

    @property
    def magnitudes(self) -> Tensor:
        """Sums by magnitude, (BINS/2,), from 0 upwards."""
        return self.sums[BINS // 2 :] + self.sums[: BINS // 2].flip(0)
