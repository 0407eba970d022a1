"""A view reads a study once, then what changed; columns merge to what all records together give."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.dashboards import study_view
from autoq.dashboards.columns import Trials
from autoq.dashboards.study_view import View
from autoq.errors import NotFound
from autoq.measurement import Measurement

from .conftest import assignment


def same(a: Trials, b: Trials) -> None:
    assert (a.baselines, a.units) == (b.baselines, b.units)
    for name, column in a._columns.items():
        np.testing.assert_array_equal(column, b._columns[name])
    assert a._measured.keys() == b._measured.keys()
    for key, row in a._measured.items():
        for name, column in row.items():
            np.testing.assert_array_equal(column, b._measured[key][name])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_columns_merge_to_the_same_in_any_pieces(database, sizes, rng: random.Random):
    store, ids = database
    records = store.trials(ids["ordinary"])
    shuffled = rng.sample(records, len(records))
    merged = Trials.of()
    for size in sizes:
        # Some come twice, as trials that have changed do.
        merged = merged.merged(Trials.of(rng.sample(records, size)))
    merged = merged.merged(Trials.of(shuffled))
    whole = Trials.of(records)
    same(merged, whole)
    assert merged.place(5) == 5
    assert merged.place(1000) is None


@pytest.mark.parametrize("name", ["ordinary", "empty", "failed", "names that are markup", "four objectives"])
def test_rows_give_what_records_give(database, name):
    store, ids = database
    same(Trials.of_rows(*store.trial_columns(ids[name])), Trials.of(store.trials(ids[name])))
    same(Trials.of_rows(*store.trial_columns(ids[name], 4, 7)), Trials.of(store.trials(ids[name], after=4, limit=7)))


def test_estimates_of_stopped_trials_count(maker):
    study = maker.study()
    trial = maker.store.start_trial(study, 0, assignment(0), "sampler", None, {"frontier:predicted": 0.25})
    found = [
        Measurement("kl_nats_per_token", 0.5, "nats/token", "measured", "search", 0.1, detail={"estimate": 0.4}),
        Measurement("size_bytes", 1e8, "bytes", "computed", "search"),
    ]
    maker.store.stop_trial(trial.id, 1, found, {}, 1.0, "w")
    trials = View(maker.store, study).refresh().trials
    assert trials.measured("kl_nats_per_token", "search").expected.tolist() == [0.4]
    assert trials.measured("kl_nats_per_token", "search").value.tolist() == [0.5]
    assert trials.predicted.tolist() == [0.25]
    same(trials, Trials.of(maker.store.trials(study)))


def test_columns_hold_what_records_hold(database):
    store, ids = database
    records = store.trials(ids["ordinary"])
    trials = Trials.of(records)
    for place, record in enumerate(records):
        for name, measurement in record.best_measurements().items():
            best = trials.best(name)
            assert best.value[place] == measurement.value
            assert (best.stderr[place] == measurement.stderr) or measurement.stderr is None
        assert trials.on_frontier[place] == record.on_frontier
    assert trials.nbytes < 400 * len(records)


class Counting:
    """A store that counts the trials that it hands out."""

    def __init__(self, store):
        self.store, self.read = store, 0

    def __getattr__(self, name):
        return getattr(self.store, name)

    def trial_columns(self, *arguments):
        found = self.store.trial_columns(*arguments)
        self.read += len(found[0])
        return found


def test_only_what_changed_is_read_again(maker, monkeypatch):
    monkeypatch.setattr(study_view, "PAGE", 4)
    study = maker.study()
    for number in range(10):
        maker.trial(study, number, (0.5 - number / 100, 1e8 + number))
    store = Counting(maker.store)
    view = View(store, study).refresh()
    assert store.read == 10
    assert view.refresh().figure("frontier").table == View(maker.store, study).figure("frontier").table
    assert store.read == 10
    # This one beats all others, whose membership of the frontier then changes.
    maker.trial(study, 10, (0.001, 1e6))
    assert view.refresh().trials.on_frontier.tolist() == [False] * 10 + [True]
    assert store.read == 21
    maker.trial(study, 11, (0.002, 2e6), end="failed")
    view.refresh()
    assert store.read == 22
    same(view.trials, Trials.of(maker.store.trials(study)))


def test_a_study_that_is_not_there(maker):
    with pytest.raises(NotFound):
        View(maker.store, 7).figure("frontier")


def test_ties_of_a_large_frontier_are_left_out(maker, monkeypatch):
    monkeypatch.setattr(study_view, "MOST_TIED", 2)
    study = maker.study()
    for number in range(4):
        maker.trial(study, number, (0.5 - number / 10, 1e8 + number))
    view = View(maker.store, study).refresh()
    assert view.ties() is None
    assert "too large to compare" in view.figure("frontier").note


def test_sparklines_are_short(views):
    made = views("ordinary").sparkline()
    assert 0 < len(made["values"]) <= 60
    assert made["path"].startswith("M")
    assert views("empty").sparkline() == {"values": [], "path": ""}


def test_studies_that_are_compared_are_read_once(maker):
    store = Counting(maker.store)
    ids = [maker.study(name=f"s{index}") for index in range(3)]
    for study in ids:
        for number in range(5):
            maker.trial(study, number, (0.5 - number / 10, 1e8 + number))
    view = View(store, ids[0])
    first = view.figure("compare", studies="s1,s2,s0")
    assert store.read == 15
    assert view.figure("compare", studies="s1,s2,s0").table == first.table
    assert store.read == 15
    assert [column.title for column in first.table.columns[1:-1]] == ["s0", "s1", "s2"]
