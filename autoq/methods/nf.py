"""NormalFloat: levels at quantiles of the normal distribution, scaled to the largest weight of each group.

Dettmers, Pagnoni, Holtzman & Zettlemoyer, "QLoRA: Efficient Finetuning of Quantized LLMs" (2023), equation 4
and appendix E. Weights of a layer are about normal, so that each level stands for about as many of them:

    p = 1 - (1/(2 (2^b - 1)) + 1/(2 · 2^b)) / 2
    the positive levels are Φ⁻¹ at 2^(b-1) equal steps from p down to, but not including, 1/2,
    the negative ones -Φ⁻¹ at 2^(b-1) - 1 such steps, 0 lies between them, and all are divided by Φ⁻¹(p)

    b  `bits`    Φ⁻¹  quantile of the standard normal distribution    p  `outermost`

As the positive side has one level more, 0 is exact and no code is wasted on a second one. At 4 bits these are
the published 16 levels of NF4, float32 number by number: as there, p is rounded to 7 digits and steps are taken
in float32. The other widths follow the same rule.

Where we differ: a scale is bfloat16, not float32, and is not quantized again ("double quantization"), and
groups are runs of inputs of one row.
"""

from __future__ import annotations

import functools
from statistics import NormalDist

import torch
from torch import Tensor

from autoq.methods._levels import FixedLevels


class NormalFloat(FixedLevels):
    """Quantiles of the normal distribution."""

    def levels(self, bits: int) -> Tensor:
        return _levels(bits)


@functools.cache
def _levels(bits: int) -> Tensor:
    outermost = round(1 - (1 / (2 * (2**bits - 1)) + 1 / (2 * 2**bits)) / 2, 7)
    half = 2 ** (bits - 1)
    numbers = [0.0]
    for sign, count in ((1, half), (-1, half - 1)):
        shares = torch.linspace(outermost, 0.5, count + 1)[:-1].tolist()
        numbers += [sign * NormalDist().inv_cdf(share) for share in shares]
    levels = torch.tensor(sorted(numbers))
    return levels / levels.max()
