"""Macro F1 of a sequence classifier: the mean over classes of the harmonic mean of precision and recall.

Of class c, F1 = 2 TP / (2 TP + FP + FN). Classes that neither the labels nor the answers have are left out, as
scikit-learn does. It is no mean over examples, so its standard error is the bootstrap's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoq.objectives import TaskObjective


class F1(TaskObjective):
    """Macro F1."""

    unit = "F1"
    answers = "labels"
    is_mean = False

    def score(self, example: Mapping[str, Any], answer: Any) -> Sequence[float]:
        """The class and the answer."""
        return [float(example["label"]), float(answer)]

    def value(self, scores: NDArray[np.float64]) -> float:
        """From 0 to 1."""
        true, found = scores.astype(np.int64).T
        classes = int(max(true.max(), found.max())) + 1
        right = np.bincount(true[true == found], minlength=classes)
        counted = np.bincount(true, minlength=classes) + np.bincount(found, minlength=classes)
        return float((2 * right[counted > 0] / counted[counted > 0]).mean())
