"""Jensen–Shannon divergence between the quantized and the unquantized model's next-token distribution.

With m = (p + q) / 2 (Lin 1991, "Divergence measures based on the Shannon entropy"),

    JS(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m) = ½ Σ (p log(p/m) + q log(q/m))

in nats, averaged over tokens: p the unquantized model's probabilities, q the candidate's. It is symmetric
and at most ln 2, so a few tokens that the candidate takes to be impossible cannot outweigh all others, as
they do in KL. Every term of the sum is at least zero, so nothing cancels and equal models are at 0 but for
the rounding of p, about 1e-7 nats.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.objectives import TokenChunk, TokenObjective


class JSNatsPerToken(TokenObjective):
    """Mean Jensen–Shannon divergence in nats per token."""

    unit = "nats/token"

    def per_token(self, chunk: TokenChunk) -> Tensor:
        """JS (t,) of each token, from 0 to ln 2."""
        assert chunk.log_normalizer is not None and chunk.reference_mass is not None, "no distribution"
        q = (chunk.output - chunk.log_normalizer.unsqueeze(-1)).exp()
        p = chunk.reference.to(q.dtype) / chunk.reference_mass.unsqueeze(-1)
        # Where both are zero the quotient does not matter, but must be a number.
        m = ((p + q) / 2).clamp(min=torch.finfo(q.dtype).tiny)
        total: Tensor = (torch.xlogy(p, p / m) + torch.xlogy(q, q / m)).sum(-1)
        return total / 2
