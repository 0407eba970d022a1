"""Holding a study: one runs it, hears what is asked of it, and writes nothing once it has lost it."""

from __future__ import annotations

import time

import pytest

from autoq.errors import LeaseLost, StudyBusy
from autoq.measurement import Measurement
from autoq.scheme import code_bits
from autoq.search import holding as holdings
from autoq.search.controller import create_study, raise_budget, run_study
from autoq.search.executors import LocalExecutor
from autoq.search.holding import StopRequested, holding
from autoq.search.observer import Observer
from autoq.spec import build_spec
from autoq.store import Store, holders

KL, SIZE = "kl_nats_per_token", "size_bytes"
TRIALS = 9


class Evaluator:
    """Quality is a sum over layers. `act` is called with the number of each measurement on the search part."""

    act = staticmethod(lambda _: None)

    def __init__(self, spec):
        self.measured = 0

    def describe(self):
        return {"device": "made up", "threads": 1}

    def measure(self, assignment, part, **_):
        if part == "search":
            self.measured += 1
            type(self).act(self.measured)
        value = sum((1 + sum(name.encode()) % 7) * 4.0 ** -code_bits(s) for name, s in assignment.items())
        return [Measurement(KL, value, "nats/token", "measured", part, 0.01)]


def make(spec):
    return LocalExecutor(spec, Evaluator)


@pytest.fixture
def store(tmp_path):
    with Store.open(str(tmp_path / "autoq.db")) as store:
        yield store


@pytest.fixture
def study(store, tiny_model_dir, monkeypatch):
    monkeypatch.setattr(holdings, "LOOK_SECONDS", 0.0)
    monkeypatch.setattr(Evaluator, "act", staticmethod(lambda _: None))
    tree = {
        "model": {"id": str(tiny_model_dir("llama"))},
        "target": {"name": "generic"},
        "space": {"schemes": ["rtn-int2-g32", "rtn-int4-g32", "rtn-int8-g32"]},
        "objectives": [KL, SIZE],
        "sampler": {"name": "random", "seeds": 0},
        "budget": {"trials": TRIALS, "wall_time": 1000},
    }
    return create_study(store, build_spec(tree))


def outcome(store, study_id):
    return [(t.number, t.state, t.hash, t.measurements) for t in store.trials(study_id)]


def test_a_cancelled_study_ends_after_its_trial_and_goes_on_when_it_is_resumed(store, study, monkeypatch):
    monkeypatch.setattr(Evaluator, "act", staticmethod(lambda n: store.queue.cancel(study.id) if n == 4 else None))
    left = run_study(store, study.id, make=make)
    assert (left.state, left.request) == ("cancelled", None)
    assert [(number, state) for number, state, *_ in outcome(store, study.id)] == [(n, "complete") for n in range(4)]
    monkeypatch.setattr(Evaluator, "act", staticmethod(lambda _: None))
    assert run_study(store, study.id, make=make).state == "finished"
    assert len(outcome(store, study.id)) == TRIALS


def test_what_is_asked_to_yield_all_the_time_gets_on_and_comes_to_the_same_end(store, study):
    """One trial, or one report, at a time: loading a model may take longer than a turn."""
    whole = create_study(store, study.study_spec())
    run_study(store, whole.id, make=make)
    runs = 0
    while store.study(study.id).state != "finished":
        runs += 1
        assert runs < 60
        with holding(store, study.id, queued=True) as hold:
            store.set_state(study.id, "running")
            store.queue.ask(study.id, "yield")
            before = outcome(store, study.id)
            left = run_study(store, study.id, make=make, hold=hold)
            assert outcome(store, study.id) != before or left.state == "finished"
            assert left.request is None
    assert runs >= TRIALS
    assert outcome(store, study.id) == outcome(store, whole.id)


def test_a_study_that_another_process_runs_is_refused_in_one_line(store, study):
    with holding(store, study.id):
        with pytest.raises(StudyBusy) as refused:
            run_study(store, study.id, make=make)
        me = holders.shown(holders.holder())
        assert str(refused.value) == f"study {study.name!r} is being run by {me}"
        assert store.study(study.id).state == "created"
    assert run_study(store, study.id, make=make).state == "finished"


def test_who_has_lost_the_study_stops_and_writes_nothing_more(store, study, monkeypatch):
    taken = []

    def lose(number):
        if number == 3:
            store.queue.release(study.id, store.queue.lease(study.id).epoch)
            taken.append(store.queue.acquire(study.id, "elsewhere:1:0:0", 60))
            taken.append(store.study(study.id).changes)

    monkeypatch.setattr(Evaluator, "act", staticmethod(lose))
    with pytest.raises(LeaseLost):
        run_study(store, study.id, make=make)
    found = store.study(study.id)
    assert (found.state, found.changes) == ("running", taken[1])
    assert [state for _, state, *_ in outcome(store, study.id)] == ["complete", "complete", "running"]
    assert store.queue.lease(study.id).live
    store.queue.release(study.id, taken[0])
    monkeypatch.setattr(Evaluator, "act", staticmethod(lambda _: None))
    assert run_study(store, study.id, make=make).state == "finished"


def test_wall_time_is_the_time_that_the_study_ran(store, study, monkeypatch):
    def interrupt(number):
        time.sleep(0.05)
        if number == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(Evaluator, "act", staticmethod(interrupt))
    with pytest.raises(KeyboardInterrupt):
        run_study(store, study.id, make=make)
    first = store.table(study.id, "clock")["seconds"]
    assert 0.15 < first < 60
    time.sleep(0.5)  # nobody runs it
    with pytest.raises(KeyboardInterrupt):
        run_study(store, study.id, make=make)
    second = store.table(study.id, "clock")["seconds"]
    assert first + 0.15 < second
    # All used up: only what was out is finished, and the report is made.
    store.put_table(study.id, "clock", {"seconds": 1000.5})
    monkeypatch.setattr(Evaluator, "act", staticmethod(lambda _: None))
    assert run_study(store, study.id, make=make).state == "finished"
    assert len(outcome(store, study.id)) < TRIALS
    # More trials are a new budget.
    raise_budget(store, study.id, TRIALS + 1)
    assert store.table(study.id, "clock") is None
    run_study(store, study.id, make=make)
    assert len(outcome(store, study.id)) == TRIALS + 1


def test_workers_are_seen_while_they_work(store, study, monkeypatch):
    monkeypatch.setattr(holdings, "BEAT_SECONDS", 0.02)
    seen = []

    def look(number):
        trial, found = number - 1, []
        while 0 < trial < TRIALS and trial not in [worker.trial for worker in found]:
            time.sleep(0.01)
            found = store.queue.workers()
        seen.extend(found)

    monkeypatch.setattr(Evaluator, "act", staticmethod(look))
    run_study(store, study.id, make=make)
    assert {worker.id for worker in seen} == {holders.shown(holders.holder())}
    assert {worker.trial for worker in seen} >= set(range(1, TRIALS))
    assert {(worker.study, worker.state, worker.device) for worker in seen} == {(study.name, "busy", "made up")}
    assert all(worker.memory_bytes > 10**6 for worker in seen)
    assert store.queue.workers() == []
    assert not store.queue.lease(study.id).live


@pytest.mark.parametrize(("asked", "left"), [(None, "queued"), ("cancel", "cancelled")])
def test_a_queues_process_that_is_told_to_end_leaves_the_study_in_the_queue(store, study, monkeypatch, asked, left):
    def end(number):
        if number == 2:
            store.queue.ask(study.id, asked)
            raise KeyboardInterrupt

    monkeypatch.setattr(Evaluator, "act", staticmethod(end))
    with holding(store, study.id, queued=True) as hold, pytest.raises(KeyboardInterrupt):
        run_study(store, study.id, make=make, hold=hold)
    assert store.study(study.id).state == left


def test_a_stage_stops_at_its_next_step_and_no_handler_of_exceptions_hears_of_it(store, study):
    class Steps(Observer):
        steps = 0

        def advance(self, steps=1):
            self.steps += steps

    told = Steps()
    with holding(store, study.id) as hold:
        watching = holdings.Watching(told, hold)
        store.set_state(study.id, "running")
        store.queue.ask(study.id, "yield")
        watching.stage("calibrate", 1)
        watching.advance()  # of what was done before
        watching.stage("quantize", 3)
        with pytest.raises(StopRequested) as stop:
            watching.advance()
        assert (stop.value.kind, told.steps) == ("yield", 2)
        assert not isinstance(stop.value, Exception)
        hold.progressed = False
        store.queue.ask(study.id, "cancel")
        with pytest.raises(StopRequested):
            watching.stage("load", 1)
