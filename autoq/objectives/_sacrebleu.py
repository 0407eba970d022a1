"""sacreBLEU's corpus metrics as sums over examples, which is what resampling examples takes.

A corpus score is a function of the sum of one list of counts per example. sacreBLEU's own bootstrap uses the
same two functions; they have no public name, so a test holds what comes of them against `corpus_score`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from autoq.objectives import TaskObjective


@functools.cache
def metric(name: str) -> Any:
    """sacreBLEU's metric `BLEU` or `CHRF`, with its defaults."""
    from sacrebleu import metrics

    made = getattr(metrics, name)()
    # Tokenized output is what it warns of; answers are decoded text, and seven in a hundred may end in " .".
    made._force = True
    return made


class CorpusScore(TaskObjective):
    """A corpus score from 0 to 100."""

    metric: ClassVar[str]
    answers: ClassVar[str] = "text"
    is_mean: ClassVar[bool] = False
    packages: ClassVar[tuple[str, ...]] = ("sacrebleu",)

    def score(self, example: Mapping[str, Any], answer: Any) -> Sequence[float]:
        """The example's counts."""
        counts: list[float] = metric(self.metric)._extract_corpus_statistics([answer], [[example["target"]]])[0]
        return counts

    def value(self, scores: NDArray[np.float64]) -> float:
        """From 0 to 100."""
        counts = [int(count) for count in scores.sum(axis=0)]
        return float(metric(self.metric)._compute_score_from_stats(counts).score)
