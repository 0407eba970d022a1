"""Spearman's rank correlation of an encoder's similarities with those that people gave, over pairs of texts.

The correlation of the ranks of cosines with the ranks of scores (Spearman 1904), equals sharing the mean of their
ranks; what STS tasks report. It is no mean over pairs, so its standard error is the bootstrap's (Efron 1979), over
pairs: Fisher's z with 1/√(n − 3) takes both for normal, and scores with few grades are far from that. 0 where all
scores or all cosines are equal, of which nothing can be told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoq.objectives import TaskObjective


class Spearman(TaskObjective):
    """Rank correlation with gold scores."""

    unit = "rho"
    answers = "pairs"
    is_mean = False

    def score(self, example: Mapping[str, Any], answer: Any) -> Sequence[float]:
        """The gold score and the cosine."""
        return [float(example["score"]), float(answer)]

    def value(self, scores: NDArray[np.float64]) -> float:
        """From -1 to 1."""
        gold, found = (_ranks(column) for column in scores.T)
        gold, found = gold - gold.mean(), found - found.mean()
        scale = float(np.sqrt((gold @ gold) * (found @ found)))
        return float(gold @ found) / scale if scale > 0 else 0.0


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks (n,) from 1, equals sharing their mean."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: NDArray[np.float64] = (last - (counts - 1) / 2)[places]
    return ranks
