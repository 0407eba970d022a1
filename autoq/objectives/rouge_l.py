"""ROUGE-L of generated texts: the F-measure of the longest common subsequence of words (Lin 2004).

With LCS the length of the longest common subsequence of answer and target, precision LCS / answer words, recall
LCS / target words, F = 2 P R / (P + R), from 0 to 1, averaged over examples. As the package rouge-score
computes it: words are runs of lower-case Latin letters and digits, not stemmed.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from autoq.objectives import TaskObjective


@functools.cache
def _scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=False)


class RougeL(TaskObjective):
    """Mean F-measure over examples."""

    unit = "ROUGE-L"
    answers = "text"
    packages = ("rouge_score",)

    def score(self, example: Mapping[str, Any], answer: Any) -> Sequence[float]:
        """The F-measure of one answer."""
        return [float(_scorer().score(example["target"], answer)["rougeL"].fmeasure)]
