"""Rivals that are kept up as trials are told are those that a search over all told trials finds."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoq.search import rivals
from autoq.search.ahead import Pace, window
from autoq.search.rivals import Rivals
from autoq.search.stopping import Finished, choose

NAMES = ["kl_nats_per_token", "size_bytes", "speed"]
DIRECTIONS = ["minimize", "minimize", "maximize"]


class Values:
    """A store that counts how often it is asked for values per token."""

    def __init__(self):
        self.asked = []

    def token_values(self, study_id, number, name, part):
        self.asked.append((number, name))
        return np.zeros((1, 1), dtype=np.float32) if number % 2 == 0 else None


def made(store=None, confidence=0.99, names=NAMES):
    objectives = {name: SimpleNamespace(direction=direction) for name, direction in zip(NAMES, DIRECTIONS, strict=True)}
    budget = SimpleNamespace(stop_confidence=confidence)
    spec = SimpleNamespace(objectives=names, budget=budget)
    problem = SimpleNamespace(spec=spec, qualities=NAMES[:1], objectives=objectives)
    return Rivals(problem, store, 1)


@pytest.fixture(autouse=True)
def comparable(monkeypatch):
    monkeypatch.setattr(rivals, "can_be_compared", lambda objectives: True)


few = st.integers(0, 4).map(float)  # so that there are ties
trial = st.one_of(st.none(), st.tuples(few, few, few, few))


@given(st.lists(trial, max_size=24), st.lists(st.tuples(few, few), min_size=1, max_size=4))
def test_the_choice_is_that_among_all_trials_told(told, candidates):
    own = made()
    for values in told:
        own.tell(values)
    assert own.told == len(told)
    everything = [Finished(number, values) for number, values in enumerate(told) if values is not None]
    for size, speed in candidates:
        known = {"size_bytes": size, "speed": speed}
        assert own.number(known) == choose(everything, NAMES, DIRECTIONS, NAMES[:1], known)


def test_only_the_frontier_of_those_told_is_kept():
    own = made()
    for number in range(500):  # each smaller and worse than the one before, or worse in both
        own.tell([float(number), float(-number if number % 10 == 0 else 1), 0.0])
    assert len(own._kept) <= 51


def test_values_are_read_once_and_a_rival_without_them_is_none():
    store = Values()
    own = made(store)
    for _ in range(3):
        assert own.rival(4).number == 4
        assert own.rival(3) is None
    assert own.rival(None) is None
    assert store.asked == [(4, NAMES[0]), (3, NAMES[0])]


@pytest.mark.parametrize("fields", [{"confidence": None}, {"names": NAMES[1:]}])
def test_there_is_no_rival_where_none_is_wanted(fields):
    own = made(**fields)
    assert not own.wanted
    own.tell([1.0, 1.0, 1.0])
    assert own.number({"size_bytes": 9.0, "speed": 0.0}) is None


def test_one_worker_hears_of_everything_before_it_is_asked():
    assert [window(workers) for workers in (1, 2, 3, 8, 1000)] == [1, 3, 5, 16, 4322]


@given(st.integers(1, 5000))
def test_more_workers_have_more_ahead_of_them(workers):
    assert window(workers) < window(workers + 1)
    assert window(workers) >= workers


@pytest.mark.parametrize(
    ("workers", "takes", "least"),
    [(1, 0.1, 10.0), (8, 0.1, 10.0), (16, 0.1, 5.0), (1000, 0.1, 2.0), (2, 4.0, 12.0), (1000, 4.0, 12.0)],
)
def test_a_trial_that_hangs_is_waited_for_the_shorter_the_more_wait(workers, takes, least):
    pace = Pace(workers)
    for _ in range(7):
        pace.took(takes)
    assert not pace.is_late(1e6)  # of what trials take too little is known
    pace.took(takes)
    assert not pace.is_late(least * 0.999)
    assert pace.is_late(least * 1.001)


@given(st.integers(1000, 5000), st.floats(0.5, 100))
def test_a_thousand_workers_never_wait_for_one_that_hangs(workers, takes):
    """From half a second a trial on, they have more to run than is over before it is late."""
    pace = Pace(workers)
    for _ in range(8):
        pace.took(takes)
    assert pace.is_late(takes * window(workers) / workers)
