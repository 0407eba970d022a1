"""Share of labelled texts whose class a sequence classifier finds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoq.objectives import TaskObjective


class Accuracy(TaskObjective):
    """Mean of 1 for the right class and 0 for another."""

    answers = "labels"

    def score(self, example: Mapping[str, Any], answer: Any) -> Sequence[float]:
        """1 or 0."""
        return [float(answer == example["label"])]
