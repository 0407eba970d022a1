"""Ties: what the measurements can tell apart, in pairs where there are values per token."""

import dataclasses
from datetime import UTC, datetime

import numpy as np
import pytest

from autoq.display.ties import ties
from autoq.measurement import Measurement
from autoq.store import StudyObjective, TrialRecord

KL, SIZE, DECODE, ACCURACY = "kl_nats_per_token", "size_bytes", "latency_decode_ms", "accuracy"
OBJECTIVES = [StudyObjective(KL, "nats/token", "minimize"), StudyObjective(SIZE, "bytes", "minimize")]
TIMED = [*OBJECTIVES, StudyObjective(DECODE, "ms", "minimize")]

BARE = TrialRecord(
    id=0, study_id=1, study="s", number=0, state="complete", origin="sampler", baseline=None, hash="h",
    duplicate_of=None, attempt=1, changed=1, feasible=True, on_frontier=True, violations={}, sampler_attrs={},
    error=None, worker="local", seconds=1.0, created_at=datetime.now(UTC), finished_at=None,
)  # fmt: skip


def trial(number, kl, size, stderr=0.1, part="report", **more):
    found = [
        Measurement(KL, kl, "nats/token", "measured", part, stderr),
        Measurement(SIZE, size, "bytes", "computed", "search"),
        *more.values(),
    ]
    return dataclasses.replace(BARE, number=number, measurements={(m.objective, m.part): m for m in found})


def latency(value, stderr=0.1, kind="measured", part="report"):
    return Measurement(DECODE, value, "ms", kind, part, stderr)


def nothing(number, name, part):
    return None


def tied(*trials, objectives=OBJECTIVES, values=nothing):
    return ties(trials, objectives, values)


def test_without_values_per_token_the_two_errors_decide():
    small, near, far = trial(1, 0.50, 80.0), trial(2, 0.25, 90.0), trial(3, 0.15, 95.0)
    # a difference of 0.25 is less than two errors of 0.141, one of 0.35 is more
    assert tied(small, near, far) == {1: [], 2: [1], 3: [2]}


def texts(seed=0, windows=32, tokens=256):
    """Loss of a text's tokens under any assignment: a few are hard for all of them."""
    return np.random.default_rng(seed).exponential(1.0, (windows, tokens))


def test_pairs_tell_apart_what_two_errors_cannot():
    text = texts()
    own = np.random.default_rng(1).normal(0.0, 0.02, (2, *text.shape))
    values = {1: text + own[0], 2: text + own[1] - 0.002}
    trials = [trial(n, float(v.mean()), 80.0 + n, float(v.std() / 90)) for n, v in values.items()]
    assert tied(*trials) == {1: [], 2: [1]}
    assert tied(*trials, values=lambda number, name, part: values[number].astype("f4")) == {1: [], 2: []}


def test_neighbouring_tokens_are_not_evidence_of_their_own():
    """64 tokens that move together count once: as independent ones they would be 8 times as certain."""
    text = texts()
    moves = np.random.default_rng(3).normal(0.0, 1.0, (text.shape[0], text.shape[1] // 64)).repeat(64, axis=1)
    moves += 0.1 - moves.mean()
    error = moves.std() / np.sqrt(moves.size / 64)
    assert moves.std() / np.sqrt(moves.size) * 2 < 0.1 < 2 * error
    values = {1: text, 2: text - moves}
    trials = [trial(n, float(v.mean()), 80.0 + n, 0.0) for n, v in values.items()]
    assert tied(*trials, values=lambda number, name, part: values[number].astype("f4") if name == KL else None) == {
        1: [],
        2: [1],
    }


def test_values_on_other_tokens_are_no_pairs():
    values = {1: np.zeros((1, 128), "f4"), 2: np.ones((1, 128), "f4")}
    values[2][0, :5] = np.nan
    trials = trial(1, 0.6, 80.0), trial(2, 0.5, 90.0)
    assert tied(*trials, values=lambda number, name, part: values[number]) == {1: [], 2: [1]}


def test_the_part_that_both_have_is_compared():
    asked = []

    def values(number, name, part):
        asked.append((number, part))

    searched = trial(1, 0.5, 80.0, 0.001, part="search")
    both = trial(2, 0.9, 90.0, 0.001)
    both = dataclasses.replace(
        both, measurements=both.measurements | trial(2, 0.4, 90.0, 0.001, part="search").measurements
    )
    assert tied(searched, both, values=values) == {1: [], 2: []}
    assert set(asked) == {(1, "search"), (2, "search")}


def test_an_advantage_in_a_noisy_latency_alone_is_a_tie():
    one = trial(1, 0.1, 80.0, 0.0001, latency=latency(20.0, 0.3))
    slower = trial(2, 0.1, 80.0, 0.0001, latency=latency(20.7, 0.2))
    assert tied(one, slower, objectives=TIMED) == {1: [2], 2: [1]}
    slowest = trial(2, 0.1, 80.0, 0.0001, latency=latency(20.8, 0.2))
    # it is slower for certain and better in nothing
    assert tied(one, slowest, objectives=TIMED) == {1: [], 2: [1]}
    smaller = trial(2, 0.1, 79.9, 0.0001, latency=latency(20.8, 0.2))
    assert tied(one, smaller, objectives=TIMED) == {1: [], 2: []}
    within = trial(2, 0.1, 79.9, 0.0001, latency=latency(20.7, 0.2))
    assert tied(one, within, objectives=TIMED) == {1: [2], 2: []}


@pytest.mark.parametrize(("predicted", "expected"), [(20.1, [2]), (20.5, [])])
def test_predictions_count_from_one_per_cent(predicted, expected):
    one = trial(1, 0.1, 80.0, latency=latency(20.0, None, "predicted", "search"))
    other = trial(2, 0.1, 79.0, latency=latency(predicted, None, "predicted", "search"))
    assert tied(one, other, objectives=TIMED)[1] == expected


def test_more_may_be_better():
    objectives = [StudyObjective(ACCURACY, "fraction", "maximize"), OBJECTIVES[1]]

    def accurate(number, value, size):
        found = [
            Measurement(ACCURACY, value, "fraction", "measured", "report", 0.01),
            Measurement(SIZE, size, "bytes", "computed", "search"),
        ]
        return dataclasses.replace(BARE, number=number, measurements={(m.objective, m.part): m for m in found})

    assert tied(accurate(1, 0.8, 80.0), accurate(2, 0.9, 90.0), objectives=objectives) == {1: [], 2: []}
    assert tied(accurate(1, 0.9, 80.0), accurate(2, 0.8, 90.0), objectives=objectives) == {1: [], 2: [1]}
