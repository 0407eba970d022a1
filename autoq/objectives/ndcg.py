"""nDCG@10 of an encoder's ranking: Järvelin & Kekäläinen 2002, with the gains as they are graded.

    DCG@10 = Σ_{i=1..10} relevance_i / log2(i + 1)

over documents in the order of their similarity to the query, divided by that of the best possible order, and
averaged over queries. Of equally similar documents the one that is named first ranks first.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from autoq.objectives import TaskObjective

DEPTH = 10


class Ndcg(TaskObjective):
    """Mean nDCG@10 over queries."""

    unit = "nDCG@10"
    answers = "ranking"

    def score(self, example: Mapping[str, Any], answer: Any) -> Sequence[float]:
        """nDCG@10 of one query, from 0 to 1."""
        grades = example["relevance"]
        ranked = sorted(range(len(grades)), key=lambda i: -answer[i])
        return [_dcg([grades[i] for i in ranked]) / _dcg(sorted(grades, reverse=True))]


def _dcg(grades: Sequence[float]) -> float:
    return sum(grade / math.log2(place + 2) for place, grade in enumerate(grades[:DEPTH]))
