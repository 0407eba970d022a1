"""Randomized Hadamard matrices: rotations that spread every direction over all coordinates, at n log n a row.

A Hadamard matrix H of order n has entries ±1 and H Hᵀ = n I. With random signs before it, Q = D H/√n is orthogonal
and no coordinate of x Q is much larger than ‖x‖/√n (Tseng et al., "QuIP#", 2024). Rows are vectors here.

    H_p ⊗ M      n = p m, p a power of two. H_p is Sylvester's, by butterflies; M is of order m:
    m = 1        n itself is a power of two
    m = q + 1    Paley's first construction (1933), q a prime with q mod 4 = 3: 12, 20, 24, 44, 48, 60, …
    m = 2q + 2   his second, q a prime with q mod 4 = 1: 12, 28, 36, 60, 76, …
    otherwise    M is a random orthogonal matrix of the odd part of n, so rows are still mixed within it

576 = 16 · 36, 896 = 32 · 28, 1536 = 128 · 12, 2560 = 128 · 20, 3584 = 128 · 28. Everything is float64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LARGEST_FACTOR = 1024  # of M, which is multiplied plainly


@dataclass(frozen=True)
class Rotation:
    """Q = D (H_p ⊗ M), orthogonal: `signs` (n,) of D, `factor` (m, m) is M/√m."""

    signs: Tensor
    factor: Tensor

    @classmethod
    def random(cls, size: int, seed: int) -> Rotation:
        """A rotation of `size` coordinates, the same for a seed."""
        generator = torch.Generator().manual_seed(seed)
        signs = torch.randint(2, (size,), generator=generator).double() * 2 - 1
        return cls(signs, _factor(size, generator))

    def apply(self, rows: Tensor) -> Tensor:
        """`rows` (…, n) times Q, in float64."""
        size, m = len(self.signs), len(self.factor)
        mixed = (rows.double() * self.signs).view(-1, size // m, m) @ self.factor
        width = 1
        while width < size // m:
            pairs = mixed.view(-1, size // m // width // 2, 2, width, m)
            low, high = pairs[:, :, 0], pairs[:, :, 1]
            mixed = torch.stack([low + high, low - high], dim=2)
            width *= 2
        return mixed.reshape(rows.shape) / math.sqrt(size // m)


def _factor(size: int, generator: torch.Generator) -> Tensor:
    """M of the smallest order that is a multiple of the odd part of `size`, over √m; (m, m) float64."""
    odd = size
    while odd % 2 == 0:
        odd //= 2
    order = odd
    while order <= min(size, _LARGEST_FACTOR):
        found = hadamard(order)
        if found is not None and size % order == 0:
            return found / math.sqrt(order)
        order *= 2
    gaussian = torch.randn(odd, odd, generator=generator, dtype=torch.float64)
    orthogonal: Tensor = torch.linalg.qr(gaussian).Q
    return orthogonal


def hadamard(order: int) -> Tensor | None:
    """A Hadamard matrix of order 1 or one of Paley's, (n, n) of ±1 in float64; None where neither gives one."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(q := order - 1) and q % 4 == 3:
        border = torch.cat([torch.ones(1, q), _residues(q)]).double()
        return torch.eye(order).double() + torch.cat([torch.cat([torch.zeros(1, 1), -torch.ones(q, 1)]), border], 1)
    if order % 4 == 0 and _is_prime(q := order // 2 - 1) and q % 4 == 1:
        border = torch.cat([torch.ones(1, q), _residues(q)]).double()
        conference = torch.cat([torch.cat([torch.zeros(1, 1), torch.ones(q, 1)]), border], 1)
        plus, minus = torch.tensor([[1.0, 1], [1, -1]]).double(), torch.tensor([[1.0, -1], [-1, -1]]).double()
        return torch.kron(conference, plus) + torch.kron(torch.eye(q + 1).double(), minus)
    return None


def _residues(q: int) -> Tensor:
    """χ(i - j) modulo the prime q: 0 for equal ones, 1 where the difference is a square, else -1; (q, q)."""
    character = torch.full((q,), -1.0)
    character[torch.arange(1, q).square() % q] = 1.0
    character[0] = 0.0
    place = torch.arange(q)
    return character[(place[:, None] - place) % q]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
