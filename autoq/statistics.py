"""Standard errors that are honest about dependent samples. Knows no torch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 32


def mean_and_stderr(values: NDArray[np.float64]) -> tuple[float, float | None, int]:
    """Mean over tokens, its standard error, and the number of tokens that count.

    `values` is (windows, tokens); NaN marks tokens that do not count. Neighbouring tokens share their
    context, so their losses are correlated and the naive error is too small; the error here is that
    of non-overlapping batch means (Flegal & Jones 2010) of `BLOCK_TOKENS` tokens, as a ratio
    estimator, since blocks may hold different counts. None with fewer than two blocks.
    """
    counted = ~np.isnan(values)
    total = int(counted.sum())
    if total == 0:
        return float("nan"), None, 0
    mean = float(values[counted].sum() / total)
    sums, counts = [], []
    for start in range(0, values.shape[1], BLOCK_TOKENS):
        block = slice(start, start + BLOCK_TOKENS)
        sums.append(np.nansum(values[:, block], axis=1))
        counts.append(counted[:, block].sum(axis=1))
    block_sums, block_counts = np.concatenate(sums), np.concatenate(counts)
    used = block_counts > 0
    blocks = int(used.sum())
    if blocks < 2:
        return mean, None, total
    residuals = block_sums[used] - mean * block_counts[used]
    variance = blocks / (blocks - 1) * float((residuals**2).sum()) / total**2
    return mean, float(np.sqrt(variance)), total
