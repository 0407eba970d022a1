"""Fixed point: symmetric integers whose steps are powers of two.

The numbers of digital signal processors and microcontrollers (Qm.n), as in Lin, Talathi & Annapureddy, "Fixed
Point Quantization of Deep Convolutional Networks" (2016): scaling by s = 2^e is a shift.

    q = clamp(round(w/s + z), 0, 2^b - 1)        w' = (q - z) s        s = 2^e        z = 2^(b-1)

    w  weight     s  scale     e  exponent     q  codes     b  bits

The paper derives e from a Gaussian fit to the weights. Here e is the one with the least squared error of the group
among the least exponent whose levels span max|w|, the two below it, which give up the largest weights for a finer
step, and no other. Of equal ones the least is taken. bfloat16 holds each s, which is never below 2^-126.
Exactly: zero weights stay zero, and every w' is a whole multiple of a power of two.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from autoq.methods import QuantizedWeight, Statistics
from autoq.methods._ruled import RuledMethod
from autoq.methods._search import best_grid, nearest
from autoq.scheme import Integer, Scheme

_FINER = 2  # exponents that are tried below the one that spans the range


class FixedPoint(RuledMethod):
    """Symmetric integers times a power of two per group, channel or tensor."""

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not isinstance(scheme, Integer):
            return "fixed makes integers only"
        if scheme.zero != "none":
            return "fixed point is symmetric; choose zero point none"
        return None

    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        assert isinstance(scheme, Integer)

        def grids(low: Tensor, high: Tensor) -> Iterable[tuple[Tensor, Tensor]]:
            # As for rtn: the most positive weight may lie half a step above the last level.
            fraction, exponent = torch.frexp(torch.maximum(-low, high) / ((2**scheme.bits - 1) / 2))
            exponent = exponent - (fraction == 0.5).int()  # such a step is itself a power of two
            zero = torch.full_like(low, float(2 ** (scheme.bits - 1)))
            for finer in range(_FINER, -1, -1):
                # Beyond 2^126 a level times its code would be infinite; below 2^-126 a step would not be normal.
                yield torch.ldexp(torch.ones_like(low), (exponent - finer).clamp(-126, 126)), zero

        return nearest(weight, scheme, *best_grid(weight, scheme, grids))
