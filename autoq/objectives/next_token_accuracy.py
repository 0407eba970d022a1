"""Share of true next tokens that the model ranks first, as greedy decoding would choose them.

Of tokens that are ranked first together, the one with the lowest number counts, as `argmax` has it.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from autoq.layer import Task
from autoq.objectives import Direction, TokenChunk, TokenObjective


class NextTokenAccuracy(TokenObjective):
    """Mean of 1 for a token that is predicted and 0 for one that is not."""

    unit = "share"
    direction: ClassVar[Direction] = "maximize"
    tasks: ClassVar[frozenset[Task]] = frozenset({"causal", "seq2seq"})

    def per_token(self, chunk: TokenChunk) -> Tensor:
        """1 or 0 (t,); NaN where a token has no successor."""
        right = (chunk.output.argmax(-1) == chunk.next_token).to(chunk.output.dtype)
        return torch.where(chunk.next_token >= 0, right, torch.nan)
