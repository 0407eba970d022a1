"""A histogram of a layer's inputs that is filled in one pass, without knowing their range beforehand.

`BINS` bins of equal width span [-2^e, 2^e), with e the least integer for which that holds every value so far.
A value beyond doubles the range as often as needed, and each doubling merges bins in pairs. As widths are
powers of two, the bins of one range nest in those of the next and the quotient by a width is exact: the
histogram is that of all values at once, in whatever order and portions they came. At least a quarter of the
bins reach up to the largest magnitude. PyTorch's `HistogramObserver` and pytorch-quantization's calibrator
widen ranges too, to where the new values lie, and then share out counts between bins that do not nest.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoq.errors import NotFinite

BINS = 16384
_PORTION = 2**20  # values at once: few sums of all bins, and temporary values that are not mapped anew each time
_CODES = 2**16  # of bfloat16 numbers
MIN_EXPONENT = -100  # magnitudes below 2^-100 share the two bins beside 0


def _exponent(largest: float) -> int:
    """Of the least range that holds magnitudes up to `largest`. Raises `NotFinite`."""
    if not math.isfinite(largest):
        raise NotFinite("its inputs are NaN or infinite on the calibration data")
    # The k of 2^(k-1) <= largest < 2^k.
    return max(math.frexp(largest)[1], MIN_EXPONENT) if largest > 0 else MIN_EXPONENT


def _places(values: Tensor, exponent: int) -> Tensor:
    """The bin of each value, int32 of their shape, in the range [-2^exponent, 2^exponent) that holds them all."""
    width = _log_width(exponent)
    # Where float32 makes numbers smaller, a small negative one would become -0. Floors of bfloat16 are bfloat16.
    exact = values if values.dtype is torch.bfloat16 else values.float()
    scaled = values.double() * 2.0**-width if width > 0 else exact * 2.0**-width
    return scaled.floor_().to(torch.int32).add_(BINS // 2)


def _codes(values: Tensor, _: int) -> Tensor:
    """The bits of bfloat16 numbers, int32 of their shape: those that share a bin are merged once they are counted."""
    return values.view(torch.uint16).to(torch.int32)


@functools.lru_cache(maxsize=16)
def _merging(exponent: int) -> Any:
    """The sparse matrix (BINS, codes) that puts sums by bits into the bins of a range, and nowhere what is beyond."""
    from scipy.sparse import csr_array

    codes = torch.arange(_CODES, dtype=torch.int32)
    numbers = codes.to(torch.uint16).view(torch.bfloat16)
    inside = numbers.abs() < 2.0**exponent  # and no NaN
    places, columns = _places(numbers[inside], exponent).numpy(), codes[inside].numpy()
    return csr_array((np.ones(len(columns)), (places, columns)), shape=(BINS, _CODES))


@functools.lru_cache(maxsize=8)
def _ones(count: int) -> NDArray[np.float64]:
    return np.ones(count)


def sums_by_row(x: Tensor, weights: Tensor, largest: float) -> tuple[Tensor, int]:
    """Sums (k, BINS) float64 of several weights (n, k), each the same for all values of a row of `x` (n, m).

    And the exponent of their range, the least that holds `largest`, the largest magnitude among the values. It is the
    product of a sparse matrix (BINS, n), as many times 1 as a value of the row lies in the bin, and the weights: one
    walk over the values for all of them, and no weight is written out for each value.
    """
    from scipy.sparse import csc_array  # importing it takes longer than most commands

    exponent, (rows, columns) = _exponent(largest), x.shape
    find, classes = (_codes, _CODES) if x.dtype is torch.bfloat16 else (_places, BINS)
    total: Any = 0.0 if rows else np.zeros((classes, weights.shape[1]))
    at_once = max(1, min(rows, _PORTION // max(1, columns)))
    ones, starts = _ones(at_once * columns), np.arange(at_once + 1, dtype=np.int32) * columns
    shares = weights.detach().double().cpu().numpy()
    for start in range(0, rows, at_once):
        portion = x[start : start + at_once].detach().cpu()
        places = find(portion, exponent).reshape(-1).numpy()
        matrix = csc_array((ones[: len(places)], places, starts[: len(portion) + 1]), shape=(classes, len(portion)))
        total = total + matrix @ shares[start : start + at_once]
    if classes != BINS:
        total = _merging(exponent) @ total
    return torch.from_numpy(np.ascontiguousarray(total.T)), exponent


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

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """Count values, of any shape, each as its of `weights` if there are any, which make the sums float64.

        Raises `NotFinite` for NaN or infinity, and then has counted nothing.
        """
        # On the CPU, where the order of additions is always the same.
        values = x.detach().reshape(-1).cpu()
        exponent = _exponent(float(values.abs().max()) if values.numel() else 0.0)
        own = None if weights is None else weights.detach().reshape(-1).double().cpu()
        self.add_sums(torch.bincount(_places(values, exponent), weights=own, minlength=BINS), exponent)

    def add_sums(self, sums: Tensor, exponent: int) -> None:
        """Add the sums (BINS,) of values that span [-2^exponent, 2^exponent)."""
        self.widen(exponent)
        self.sums = self.sums + _widened(sums, self.exponent - exponent)

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
