"""Standard errors that are honest about dependent samples, and comparisons on the same samples. Knows no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 32
PAIR_BLOCK_TOKENS = 64
DRAWS = 500  # resamples, by which a standard error is known to 3 %
LEAST_BLOCKS = 8  # below so many blocks of pairs their spread is known too badly for a verdict
LEAST_EXAMPLES = 32  # the same for single answers: right or wrong is farther from normal than a block's mean

Values = NDArray[np.float64] | NDArray[np.float32]


def mean_and_stderr(values: Values, block_tokens: int = BLOCK_TOKENS) -> tuple[float, float | None, int]:
    """Mean over tokens, its standard error, and the number of tokens that count.

    `values` is (windows, tokens); NaN marks tokens that do not count. Neighbouring tokens share their
    context, so their losses are correlated and the naive error is too small; the error here is that
    of non-overlapping batch means (Flegal & Jones 2010) of `block_tokens` tokens, as a ratio
    estimator, since blocks may hold different counts. None with fewer than two blocks.
    """
    counted = ~np.isnan(values)
    total = int(counted.sum())
    if total == 0:
        return float("nan"), None, 0
    mean = float(values[counted].sum(dtype=np.float64) / total)
    sums, counts = block_sums(values, block_tokens)
    return mean, error_of_mean(sums, counts)[1] if len(counts) > 1 else None, total


def error_of_mean(sums: NDArray[np.float64], counts: NDArray[np.int64]) -> tuple[float, float]:
    """Mean over tokens and its standard error, from sums and counts of blocks (blocks,); infinite for one block."""
    total, blocks = int(counts.sum()), len(counts)
    mean = float(sums.sum() / total)
    if blocks < 2:
        return mean, float("inf")
    variance = blocks / (blocks - 1) * float(((sums - mean * counts) ** 2).sum()) / total**2
    return mean, float(np.sqrt(variance))


def block_sums(values: Values, block_tokens: int = PAIR_BLOCK_TOKENS) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Sums and counts (blocks,) of consecutive tokens of a window; blocks in which none counts are left out."""
    counted = ~np.isnan(values)
    sums, counts = [], []
    for start in range(0, values.shape[1], block_tokens):
        block = slice(start, start + block_tokens)
        sums.append(np.nansum(values[:, block], axis=1, dtype=np.float64))
        counts.append(counted[:, block].sum(axis=1))
    block_sums, block_counts = np.concatenate(sums), np.concatenate(counts)
    used = block_counts > 0
    return block_sums[used], block_counts[used]


def paired(values: Values, others: Values) -> tuple[float, float | None, int]:
    """Mean of `values - others` (windows, tokens) on the tokens that count in both, its error, their number.

    What makes a token hard is the same for both and falls out of the difference.
    """
    return mean_and_stderr(np.subtract(values, others, dtype=np.float64), PAIR_BLOCK_TOKENS)


def shards(windows: int, window_tokens: int, least: int = LEAST_BLOCKS) -> list[range]:
    """Windows 0 to `windows` - 1 in shards, after each of which a candidate may be given up.

    Each shard but the first is as long as all before it, the rungs of successive halving (Jamieson &
    Talwalkar 2016). The first has `least` blocks of pairs.
    """
    first = -(-least // -(-window_tokens // PAIR_BLOCK_TOKENS))
    ends = [min(first, windows)]
    while ends[-1] < windows:
        ends.append(min(2 * ends[-1], windows))
    return [range(start, end) for start, end in zip([0, *ends], ends, strict=False)]


@dataclass(frozen=True)
class Rival:
    """A trial evaluated in full that is at least as good as a candidate in all that needs no evaluation.

    `values` maps the objectives that do to its values per token (windows, tokens) or labelled example (examples, 1).
    A candidate that is worse
    in all of them is worse than the rival. It is given up once that is known with `confidence`, over all
    looks together.
    """

    number: int
    values: Mapping[str, NDArray[np.float32]]
    confidence: float

    def expected(self, objective: str, values: Values) -> float:
        """The candidate's mean over all tokens, as far as those evaluated so far tell: a ratio estimate.

        `values` (windows, tokens) are the candidate's, NaN where it was not evaluated. Losses of two assignments
        are more or less in proportion, so the rival's mean is multiplied with what the candidate's sum is to the
        rival's on the same tokens (Cochran, Sampling Techniques, 1977, chapter 6). Far from the rival that is a
        third nearer to the truth than adding the mean difference, and near to it the same. A rival that loses
        nothing has no ratio; there the difference is added.
        """
        rival = self.values[objective]
        mean = mean_and_stderr(rival)[0]
        both = ~np.isnan(values) & ~np.isnan(rival)
        ours, others = (float(each[both].sum(dtype=np.float64)) for each in (values, rival))
        return mean * ours / others if others > 0 else mean + paired(values, rival)[0]

    def beats(self, objective: str, values: Values, sign: float, looks: int) -> bool:
        """Whether the candidate's mean over all tokens will be worse than the rival's.

        `sign` is 1 where less is better and -1 where more is. The mean difference d over the n of N tokens
        evaluated so far has the error s √(1 - n/N), since only the rest is in doubt (the finite population
        correction: Cochran, Sampling Techniques, 1977, section 2.6); blocks are few, so d / error follows
        Student's distribution; and each of `looks` looks may err with (1 - confidence) / looks (Bonferroni).
        """
        from scipy.special import stdtrit  # importing it takes longer than most commands

        rival = self.values[objective]
        difference, stderr, n = paired(values, rival)
        blocks = len(block_sums(np.subtract(values, rival, dtype=np.float64))[1])
        if stderr is None or blocks < LEAST_BLOCKS:
            return False
        unknown = max(0.0, 1 - n / int((~np.isnan(rival)).sum()))
        quantile = stdtrit(blocks - 1, 1 - (1 - self.confidence) / looks)
        return bool(sign * difference > quantile * stderr * unknown**0.5)


Statistic = Callable[[NDArray[np.float64]], float]


def bootstrap_stderr(statistic: Statistic, rows: NDArray[np.float64], draws: int = DRAWS) -> float | None:
    """Standard error of a statistic of examples (n, k): its spread over samples of n drawn with replacement.

    Efron 1979, "Bootstrap methods: another look at the jackknife". The draws are the same for equal n, so
    what is compared was drawn alike. None for a single example.
    """
    if len(rows) < 2:
        return None
    picked = np.random.default_rng(0).integers(len(rows), size=(draws, len(rows)))
    return float(np.std([statistic(rows[each]) for each in picked], ddof=1))


def pseudo_values(statistic: Statistic, rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """The jackknife's pseudo-values (n,) of a statistic T of examples (n, k): n T − (n − 1) T without the example.

    Tukey 1958. To first order the statistic is their mean and they are independent, so two models that were
    given the same examples can be compared by them in pairs. Of a mean they are the values themselves.
    """
    count, whole = len(rows), statistic(rows)
    if count < 2:
        return np.full(count, whole)
    without = [statistic(np.delete(rows, i, axis=0)) for i in range(count)]
    return count * whole - (count - 1) * np.array(without)
