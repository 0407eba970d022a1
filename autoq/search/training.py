"""How to train a trial: the numbers that `recovering` goes by, and what they may be."""

from __future__ import annotations

from dataclasses import dataclass

from autoq.errors import BadInput

MAX_STEPS = 10**6
HOW = ("model", "blocks")


@dataclass(frozen=True)
class Training:
    """How to train: `steps` updates of each layer, each by `windows` windows of text, on at most `tokens` (default: all
    that are in no part of the study). `rate` multiplies the usual learning rates. All layers are trained together, by
    the answers of the whole model, or one block of the model after the other, by what the block gives back."""

    steps: int
    tokens: int | None = None
    windows: int = 1
    rate: float = 1.0
    seed: int = 0
    how: str = "model"

    def check(self) -> None:
        """Raises `BadInput` for what nothing can be trained by."""
        if self.how not in HOW:
            raise BadInput(f"how must be one of {', '.join(HOW)} (got {self.how!r:.40})")
        for name in ("steps", "windows"):
            if not 1 <= getattr(self, name) <= MAX_STEPS:
                raise BadInput(f"{name} must be from 1 to {MAX_STEPS} (got {getattr(self, name)})")
        if self.tokens is not None and self.tokens < 1:
            raise BadInput(f"tokens must be at least 1 (got {self.tokens})")
        if not 0 < self.rate < 1000:
            raise BadInput(f"rate must be above 0 and below 1000 (got {self.rate:g})")
        if not 0 <= self.seed < 2**32:
            raise BadInput(f"seed must be from 0 to {2**32 - 1} (got {self.seed})")
