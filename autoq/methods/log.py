"""Logarithmic levels: zero and powers of two below the largest weight of each group, with a sign.

Miyashita, Lee & Murmann, "Convolutional Neural Networks using Logarithmic Data Representation" (2016),
section 2: a weight is a sign and the exponent of a power of two, so that a product is a shift.

    level ∈ {0, ±1, ±1/2, ±1/4, …, ±2^(2 - 2^(b-1)), +2^(1 - 2^(b-1))}

    b  `bits`

A sign and b-1 bits hold 2^(b-1) - 1 exponents and two zeros; instead of the second zero there is one more
positive power, so that all 2^b codes count. Small weights have the relative precision of large ones, which
is what products need and what the squared error of a bell-shaped weight does not: among formats of as many
bits this one is the least exact, and the cheapest to multiply.

Where we differ: weights are rounded to the nearest level by value (borders at 1.5 · 2^-k), not by logarithm
(at √2 · 2^-k), which is the lesser error; and levels are scaled by max|w| of the group instead of the next
power of two. Weights that are powers of two within the range of exponents below their group's largest stay
as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.methods._levels import FixedLevels


class Logarithmic(FixedLevels):
    """Powers of two."""

    def levels(self, bits: int) -> Tensor:
        half = 2 ** (bits - 1)
        positive = [2.0**-k for k in range(half)]
        return torch.tensor([*(-number for number in positive[:-1]), 0.0, *reversed(positive)])
