"""Any task of EleutherAI's lm-eval, by name: the mean of the task's first metric over examples.

`lm_eval:arc_easy` is one of lm-eval's own, `lm_eval:mine` a task of the study whose source is a task's YAML file.
More is better, as with nearly all of lm-eval's metrics; a perplexity is an objective of its own here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoq.objectives import TaskObjective


class LmEval(TaskObjective):
    """Mean of lm-eval's first metric."""

    unit = "score"
    answers = "lm_eval"
    packages = ("lm_eval",)
    extra = "lm-eval"

    def score(self, example: Mapping[str, Any], answer: Any) -> Sequence[float]:
        """The metric of one example."""
        return [answer]
