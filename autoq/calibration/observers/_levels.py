"""What 8 bits are spread over a range as: the levels that inputs are rounded to, and the error that this makes.

    SYMMETRIC_INT8  s = max|range| / 127, levels q s for q = -127 … 127
    AFFINE_INT8     s = (high - low) / 255, levels q s for q = -z … 255 - z with z = round(-low / s)
    FP8             s = max|range| / 448, levels q s for q of E4M3

Kernels that store s in bfloat16, or whose codes go to -128, differ from this by less than a range is worth
knowing to.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(E4M3).max


class Codes(abc.ABC):
    """What codes of 8 bits stand for over a range; `symmetric`: of equal magnitudes on both sides of 0."""

    symmetric: bool

    @abc.abstractmethod
    def square_error(self, left: Tensor, width: float, low: Tensor, high: Tensor) -> Tensor:
        """Mean squared error (C, B) of rounding what lies evenly in [left, left + width), by bin and range.

        `left` is (B,), `low` and `high` are (C, 1) with low <= 0 <= high and not both 0; float64.
        """

    @abc.abstractmethod
    def cuts(self, one_sided: bool) -> Tensor:
        """Where the magnitudes [0, 1] of a range are divided between levels, both ends included; float64.

        `one_sided` says that all inputs are of one sign.
        """


@dataclass(frozen=True)
class _Uniform(Codes):
    symmetric: bool

    def square_error(self, left: Tensor, width: float, low: Tensor, high: Tensor) -> Tensor:
        """See `Codes`. By the integral of the squared error e(u)² = (u - Q(u))² from 0 to x,

            n s³/12 + (x - n s)³/3      with n the code of x: a full step is worth s³/12, what is beyond the last
                                        level a third of its cube

        whose differences over bins hold for steps that are wider than a bin and for those that are narrower.
        """
        if self.symmetric:
            step = torch.maximum(-low, high) / 127
            first, last = torch.full_like(step, -127), torch.full_like(step, 127)
        else:
            step = (high - low) / 255
            zero = (-low / step).round().clamp(0, 255)
            first, last = -zero, 255 - zero

        def integral(x: Tensor) -> Tensor:
            code = torch.minimum(torch.maximum((x / step).round(), first), last)
            return code * step**3 / 12 + (x - code * step) ** 3 / 3

        return ((integral(left + width) - integral(left)) / width).clamp_(min=0)

    def cuts(self, one_sided: bool) -> Tensor:
        """See `Codes`. 128 levels for magnitudes, as one bit is the sign's; 256 where no sign is stored."""
        count = 256 if one_sided and not self.symmetric else 128
        return torch.linspace(0, 1, count + 1, dtype=torch.float64)


@dataclass(frozen=True)
class _Fp8(Codes):
    symmetric: bool = True

    def square_error(self, left: Tensor, width: float, low: Tensor, high: Tensor) -> Tensor:
        """See `Codes`. By the middles of the bins: where levels are closer than bins, their error is next to none."""
        scale = torch.maximum(-low, high) / _FP8_MAX
        middles = left + width / 2
        codes = (middles / scale).clamp(-_FP8_MAX, _FP8_MAX).float().to(E4M3).double()
        return (codes * scale - middles).square()

    def cuts(self, one_sided: bool) -> Tensor:
        """See `Codes`. Halfway between E4M3's numbers; the sign is always stored."""
        numbers = torch.arange(127, dtype=torch.uint8).view(E4M3).double() / _FP8_MAX
        return torch.cat([torch.zeros(1), (numbers[1:] + numbers[:-1]) / 2, torch.ones(1)])


SYMMETRIC_INT8: Codes = _Uniform(symmetric=True)
AFFINE_INT8: Codes = _Uniform(symmetric=False)
FP8: Codes = _Fp8()
