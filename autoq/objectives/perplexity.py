"""Perplexity of the text under the model: exp of the mean negative log-likelihood of the next token.

The standard error follows from that of the mean by the delta method: d exp(x) = exp(x) dx.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from autoq.objectives import TokenChunk, TokenObjective


class Perplexity(TokenObjective):
    """Perplexity per token of the model's own tokenizer."""

    unit = "perplexity"
    tasks = frozenset({"causal", "seq2seq"})

    def per_token(self, chunk: TokenChunk) -> Tensor:
        """Negative log-likelihood (t,) in nats; NaN where a token has no successor."""
        assert chunk.log_normalizer is not None
        known = chunk.next_token >= 0
        chosen = chunk.output.gather(-1, chunk.next_token.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        return torch.where(known, chunk.log_normalizer - chosen, torch.nan)

    def transform(self, mean: float, stderr: float) -> tuple[float, float]:
        """exp of the mean; overflow becomes infinite and is then refused as not finite."""
        value = math.exp(mean) if mean < 700 else math.inf
        return value, value * stderr
