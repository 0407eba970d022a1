"""Sparsity patterns: which weights of a row a pruned weight leaves. No torch."""

from __future__ import annotations

import re
from dataclasses import dataclass

from autoq.errors import BadInput


@dataclass(frozen=True, order=True)
class TwoOfFour:
    """2:4 sparsity: of every four consecutive inputs of a row, two are zero."""

    def __str__(self) -> str:
        return "24"

    def kept(self, in_features: int) -> int:
        """Weights left in a row, which four must divide."""
        return in_features // 2


@dataclass(frozen=True, order=True)
class Unstructured:
    """`percent` of every row is zero, wherever it is, rounded down to whole weights."""

    percent: int

    def __post_init__(self) -> None:
        if self.percent not in PERCENTAGES:
            raise BadInput(f"no sparsity {self.percent}: {SPARSITY_CHOICES}")

    def __str__(self) -> str:
        return str(self.percent)

    def kept(self, in_features: int) -> int:
        """Weights left in a row."""
        return in_features - in_features * self.percent // 100


Pattern = TwoOfFour | Unstructured
PERCENTAGES = range(10, 100, 5)  # 24 is none of them, so two digits say either pattern
SPARSITY_CHOICES = "choose 24 (two of every four inputs) or a percentage of each row from 10 to 95 in steps of 5"


def parse_pattern(text: str) -> Pattern:
    """The sparsity pattern that two digits name. Raises `BadInput`."""
    if text == "24":
        return TwoOfFour()
    if not re.fullmatch(r"[1-9]\d", text, re.ASCII):
        raise BadInput(f"no sparsity {text!r:.40}: {SPARSITY_CHOICES}")
    return Unstructured(int(text))
