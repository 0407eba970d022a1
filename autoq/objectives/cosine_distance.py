"""Cosine distance of an encoder's token embeddings from those of the unquantized encoder.

1 − cos(h, h′) per token of the final hidden states, averaged: 0 means the same directions.
"""

from __future__ import annotations

import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor

from autoq.objectives import TokenChunk, TokenObjective


class CosineDistance(TokenObjective):
    """Mean of 1 − cosine similarity over tokens."""

    unit = "1-cos"
    tasks = frozenset({"encoder"})

    def per_token(self, chunk: TokenChunk) -> Tensor:
        """Distance (t,) of each token."""
        return 1 - F.cosine_similarity(chunk.output, chunk.reference.to(chunk.output.dtype), dim=-1)
