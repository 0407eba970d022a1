"""Standard errors of means over correlated tokens."""

import numpy as np
import pytest

from autoq.statistics import BLOCK_TOKENS, LEAST_BLOCKS, PAIR_BLOCK_TOKENS, Rival, mean_and_stderr, paired, shards


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


def test_a_difference_in_pairs_is_far_more_certain_than_its_two_sides():
    rng = np.random.default_rng(3)
    hardness = rng.lognormal(sigma=2, size=(8, 256))
    ours, others = hardness * 1.1, hardness + 0.01 * rng.normal(size=hardness.shape)
    difference, stderr, n = paired(ours, others)
    assert (difference, n) == (pytest.approx(0.1 * hardness.mean(), abs=2e-3), hardness.size)
    assert stderr is not None
    assert stderr < mean_and_stderr(ours)[1] / 5
    ours[0, :3] = np.nan
    others[0, 2:5] = np.nan
    assert paired(ours, others)[2] == hardness.size - 5


@pytest.mark.parametrize(("windows", "tokens"), [(1, 512), (2, 512), (4, 512), (9, 512), (32, 64), (5, 100), (3, 4096)])
def test_shards_cover_every_window_once_and_double(windows, tokens):
    steps = shards(windows, tokens)
    assert [index for step in steps for index in step] == list(range(windows))
    assert all(step.stop == min(2 * step.start, windows) for step in steps[1:])
    # The first is enough for a verdict, if there is as much.
    assert len(steps) == 1 or len(steps[0]) * -(-tokens // PAIR_BLOCK_TOKENS) >= LEAST_BLOCKS
    assert len(shards(4, 512)) == 3


def losses(rng, windows=8, tokens=256):
    """Losses of a trial, heavy-tailed, and correlated over neighbouring tokens."""
    noise = rng.normal(size=(windows, tokens + 8))
    smooth = np.stack([np.convolve(row, np.ones(9) / 3, "valid") for row in noise])
    return np.exp(smooth - 2)


def unseen(values, windows):
    return np.where(np.arange(len(values))[:, None] < windows, values, np.nan)


def stops(rival, values):
    steps = shards(*values.shape)
    return any(rival.beats("kl", unseen(values, step.stop), 1.0, len(steps) - 1) for step in steps[:-1])


def test_a_candidate_that_is_not_worse_is_seldom_given_up():
    """Candidates whose mean over all tokens is a little better than the rival's: each given up is a mistake."""
    rng = np.random.default_rng(4)
    mistakes = 0
    for _ in range(400):
        base = losses(rng)
        values = base * np.exp(0.3 * rng.normal(size=base.shape))
        values *= 0.999 * base.mean() / values.mean()
        mistakes += stops(Rival(0, {"kl": base.astype(np.float32)}, 0.95), values)
    assert mistakes <= 0.05 * 400


def test_a_candidate_that_is_clearly_worse_is_given_up_at_the_first_look():
    rng = np.random.default_rng(5)
    base = losses(rng).astype(np.float32)
    rival = Rival(7, {"kl": base}, 0.99)
    worse = base * np.exp(0.3 * rng.normal(size=base.shape)) * 1.5
    assert rival.beats("kl", unseen(worse, 2), 1.0, 2)
    assert not rival.beats("kl", unseen(worse, 2), -1.0, 2), "where more is better it is not worse"
    assert not rival.beats("kl", unseen(worse, 1), 1.0, 2), "too few blocks for any verdict"
    assert not rival.beats("kl", base, 1.0, 2), "equal is not worse"


def test_only_tokens_that_were_not_evaluated_are_in_doubt():
    """A difference of 2 standard errors is beyond doubt after 7 of 8 windows, after 2 it is not."""
    rng = np.random.default_rng(6)
    base = np.zeros((8, 1024), np.float32)
    noise = rng.normal(size=base.shape)
    verdicts = []
    for seen in (2, 7):
        part = noise[:seen] - noise[:seen].mean()
        values = unseen(np.zeros_like(noise), seen)
        values[:seen] = part + 2.0 * mean_and_stderr(part, PAIR_BLOCK_TOKENS)[1]
        verdicts.append(Rival(0, {"kl": base}, 0.99).beats("kl", values, 1.0, 1))
    assert verdicts == [False, True]


def test_the_estimate_is_the_rivals_mean_in_proportion_to_what_both_lost_so_far():
    base = np.arange(64, dtype=np.float32).reshape(4, 16)
    rival = Rival(0, {"kl": base}, 0.9)
    assert rival.expected("kl", unseen(base + 0.5, 1)) == pytest.approx(base.mean() * 128 / 120)
    assert rival.expected("kl", unseen(1.25 * base, 2)) == pytest.approx(1.25 * base.mean())
    ours = unseen(1.25 * base, 2)
    ours[0, 0] = np.nan
    assert rival.expected("kl", ours) == pytest.approx(1.25 * base.mean()), "only tokens that both have count"


def test_what_is_worse_is_expected_to_be_worse():
    """The verdict is by differences and the estimate by a ratio: they never contradict each other."""
    rng = np.random.default_rng(9)
    for _ in range(100):
        base = losses(rng).astype(np.float32)
        values = unseen(losses(rng), 2)
        rival = Rival(0, {"kl": base}, 0.9)
        assert (rival.expected("kl", values) > base.mean(dtype=float)) == (paired(values, base)[0] > 0)


def test_a_rival_that_loses_nothing_gives_no_proportion():
    base = np.zeros((8, 256), np.float32)
    values = unseen(np.random.default_rng(10).lognormal(size=base.shape), 4)
    assert Rival(0, {"kl": base}, 0.99).expected("kl", values) == pytest.approx(np.nanmean(values))
