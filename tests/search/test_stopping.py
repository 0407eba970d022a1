"""Whom a candidate is held against."""

import pytest

from autoq.measurement import Measurement
from autoq.search.stopping import Finished, choose, expected, was_stopped

NAMES = ("kl_nats_per_token", "size_bytes", "latency_decode_ms")
LESS = ("minimize",) * 3
FINISHED = [
    Finished(0, (0.0, 100.0, 10.0)),
    Finished(1, (0.5, 50.0, 5.0)),
    Finished(2, (0.4, 50.0, 8.0)),
    Finished(3, (0.4, 50.0, 8.0)),
    Finished(4, (0.2, 60.0, 4.0)),
]


@pytest.mark.parametrize(
    ("size", "latency", "number"),
    [
        (100.0, 10.0, 0),  # as large and as slow as the unquantized model: nothing is better than that
        (99.0, 9.0, 4),
        (55.0, 9.0, 2),  # the earlier of equals
        (50.0, 7.0, 1),
        (60.0, 4.0, 4),  # equal is at least as good
        (60.0, 3.9, None),
        (49.0, 10.0, None),
    ],
)
def test_the_rival_is_the_best_of_those_that_are_nowhere_larger_or_slower(size, latency, number):
    known = {"size_bytes": size, "latency_decode_ms": latency}
    assert choose(FINISHED, NAMES, LESS, ["kl_nats_per_token"], known) == number


def test_directions_say_what_is_better():
    directions = ("maximize", "minimize", "maximize")
    known = {"size_bytes": 60.0, "latency_decode_ms": 8.0}
    assert choose(FINISHED, NAMES, directions, ["kl_nats_per_token"], known) == 2


def test_without_quality_or_trials_there_is_no_rival():
    assert (
        choose(FINISHED, NAMES, LESS, [], {"kl_nats_per_token": 1, "size_bytes": 100, "latency_decode_ms": 9}) is None
    )
    assert choose([], NAMES, LESS, ["kl_nats_per_token"], {"size_bytes": 100, "latency_decode_ms": 9}) is None


def test_of_several_qualities_the_first_one_of_the_study_decides():
    names, known = ("perplexity", "size_bytes", "kl_nats_per_token"), {"size_bytes": 60.0}
    finished = [Finished(0, (9.0, 50.0, 0.1)), Finished(1, (8.0, 50.0, 0.2))]
    assert choose(finished, names, LESS, ["kl_nats_per_token", "perplexity"], known) == 1


def test_what_a_stopped_measurement_says_of_all_tokens():
    whole = Measurement("kl_nats_per_token", 0.5, "nats/token", "measured", "search")
    part = Measurement(
        "kl_nats_per_token", 0.5, "nats/token", "measured", "search", detail={"rival": 3, "estimate": 0.75}
    )
    assert (expected(whole), expected(part)) == (0.5, 0.75)
    assert (was_stopped([whole]), was_stopped([whole, part])) == (False, True)
