"""Standard errors of means over correlated tokens."""

import numpy as np
import pytest

from autoq.statistics import BLOCK_TOKENS, mean_and_stderr


def test_mean_counts_only_tokens_that_count():
    values = np.array([[1.0, np.nan, 3.0], [5.0, np.nan, np.nan]])
    mean, _, n = mean_and_stderr(values)
    assert (mean, n) == (3.0, 3)


def test_no_error_is_claimed_from_one_block():
    assert mean_and_stderr(np.ones((1, BLOCK_TOKENS)))[1] is None


def test_nothing_counted_is_not_a_number():
    mean, stderr, n = mean_and_stderr(np.full((2, 4), np.nan))
    assert np.isnan(mean)
    assert (stderr, n) == (None, 0)


def test_error_of_independent_tokens_is_the_textbook_one():
    values = np.random.default_rng(0).normal(size=(64, 512))
    stderr = mean_and_stderr(values)[1]
    assert stderr == pytest.approx(1 / np.sqrt(values.size), rel=0.1)


def test_error_covers_the_truth_for_correlated_tokens():
    """An AR(1) loss with correlation 0.8: the naive error is 3 times too small, this one is not."""
    rng = np.random.default_rng(1)
    z_scores = []
    for _ in range(200):
        noise = rng.normal(size=(8, 256))
        values = np.empty_like(noise)
        values[:, 0] = noise[:, 0] / np.sqrt(1 - 0.8**2)
        for t in range(1, 256):
            values[:, t] = 0.8 * values[:, t - 1] + noise[:, t]
        mean, stderr, _ = mean_and_stderr(values)
        assert stderr is not None
        z_scores.append(mean / stderr)
    assert 0.8 < np.std(z_scores) < 1.35


def test_blocks_of_different_counts_weigh_as_their_tokens():
    """Dropping tokens at random leaves the estimate near the full one."""
    rng = np.random.default_rng(2)
    values = rng.normal(loc=2, size=(16, 512))
    thinned = np.where(rng.random(values.shape) < 0.5, np.nan, values)
    full, part = mean_and_stderr(values), mean_and_stderr(thinned)
    assert part[0] == pytest.approx(full[0], abs=0.05)
    assert part[1] == pytest.approx(full[1] * np.sqrt(2), rel=0.2)
