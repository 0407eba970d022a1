"""Share of multiple-choice questions whose right continuation a causal model finds the most likely."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoq.objectives import TaskObjective


class MultipleChoiceAccuracy(TaskObjective):
    """Mean of 1 for the right choice and 0 for another; of equally likely ones the first counts."""

    answers = "choices"

    def score(self, example: Mapping[str, Any], answer: Any) -> Sequence[float]:
        """1 or 0."""
        return [float(answer.index(max(answer)) == example["answer"])]
