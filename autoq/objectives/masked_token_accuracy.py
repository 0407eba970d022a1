"""Share of hidden tokens that a masked language model finds: 15 % of each window's tokens, all hidden at once.

The value is the mean over windows of a window's share. All windows of a part hide equally many tokens, unless the text
itself has special ones, and then it is the share of all hidden tokens. The standard error is that of
independent windows, since tokens of one window share their context.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoq.objectives import TaskObjective


class MaskedTokenAccuracy(TaskObjective):
    """Mean share of hidden tokens that are ranked first."""

    answers = "hidden_tokens"

    def score(self, example: Mapping[str, Any], answer: Any) -> Sequence[float]:
        """A window's share, from 0 to 1."""
        return [float(answer)]
