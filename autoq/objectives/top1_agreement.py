"""Share of tokens whose most likely prediction is the unquantized model's.

Accuracy with the unquantized model as the truth, called flips where it counts the opposite (Dutta et al.
2024, "Accuracy is Not All You Need"): accuracy stays where as many answers become right as become wrong,
agreement does not. It needs no labels, so it has a meaning for masked models too.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from autoq.objectives import Direction, TokenChunk, TokenObjective


class Top1Agreement(TokenObjective):
    """Mean of 1 for a token with the same first choice and 0 for one with another."""

    unit = "share"
    direction: ClassVar[Direction] = "maximize"

    def per_token(self, chunk: TokenChunk) -> Tensor:
        """1 or 0 (t,)."""
        assert chunk.reference_top is not None, "no distribution"
        return (chunk.output.argmax(-1) == chunk.reference_top).to(chunk.output.dtype)
