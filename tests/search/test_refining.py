"""Refining a finished study: offers become trials, and whatever happens the study stays finished."""

import sys
import types

import pytest

from autoq.errors import AutoQError, BadInput
from autoq.measurement import Measurement
from autoq.scheme import code_bits
from autoq.search.controller import create_study, run_study
from autoq.search.executors import LocalExecutor
from autoq.search.observer import Observer
from autoq.search.refining import refine_study
from autoq.search.setup import pose
from autoq.spec import Bound, build_spec
from autoq.store import Store
from autoq.store.dominance import non_dominated

KL, SIZE = "kl_nats_per_token", "size_bytes"


class Evaluator:
    """Quality is a sum over layers."""

    problem, penalty = None, 0.0

    def __init__(self, spec):
        self.spec = spec

    def describe(self):
        return {"device": "made up", "threads": 1}

    def measure(self, assignment, part, **_):
        if part == "search" and type(self).problem is not None:
            raise type(self).problem
        value = type(self).penalty + sum(
            (1 + sum(name.encode()) % 7) * 4.0 ** -code_bits(s) for name, s in assignment.items()
        )
        return [Measurement(KL, value * (1.1 if part == "report" else 1.0), "nats/token", "measured", part, 0.01)]


class Notes(Observer):
    """What was said."""

    def __init__(self):
        self.notes, self.trials = [], []

    def note(self, text):
        self.notes.append(text)

    def trial(self, trial, done, budget):
        self.trials.append((trial.number, trial.state, done, budget))


@pytest.fixture
def store(tmp_path):
    with Store.open(str(tmp_path / "autoq.db")) as store:
        yield store


@pytest.fixture
def study(store, tiny_model_dir):
    """A study of baselines alone, so that everything in between is a gap."""
    spec = {
        "model": {"id": str(tiny_model_dir("llama"))},
        "target": {"name": "generic"},
        "space": {"schemes": ["rtn-int2-g32", "rtn-int4-g32", "rtn-int8-g32"]},
        "objectives": [KL, SIZE],
        "sampler": {"name": "random", "seeds": 0},
        "budget": {"trials": 6},
    }
    created = create_study(store, build_spec(spec))
    run_study(store, created.id, None, make)
    return store.study(created.id)


def make(spec):
    return LocalExecutor(spec, Evaluator)


@pytest.fixture
def offers(study, monkeypatch):
    """A model whose i-th offer has the first i layers in 8 bits and the others in 4."""
    fake = types.ModuleType("autoq.search.offers")
    fake.bounds = []
    problem = pose(study.study_spec())

    def offer(store, record, bounds, best, fresh):
        assert fresh, "what was tried is not to be measured again"
        fake.bounds.append((record.id, bounds, best))
        raised = 1 + sum(trial.origin == "refine" for trial in store.trials(record.id))
        if raised > fake.most:
            return None
        assignment = problem.space.assignment([2 if i < raised else 1 for i in range(len(problem.space.variables))])
        return types.SimpleNamespace(assignment=assignment, predicted={})

    fake.offer, fake.most = offer, 100
    monkeypatch.setitem(sys.modules, "autoq.search.offers", fake)
    monkeypatch.setattr(Evaluator, "problem", None)
    return fake


BOUNDS = {SIZE: Bound(max=1e6)}


def test_offers_become_trials_with_both_parts(store, study, offers):
    before, notes = store.trials(study.id), Notes()
    found = refine_study(store, study.id, BOUNDS, 3, notes, make, best=SIZE)
    last = before[-1].number
    assert [(t.number, t.origin, t.state) for t in found] == [(last + i, "refine", "complete") for i in (1, 2, 3)]
    assert offers.bounds == [(study.id, BOUNDS, SIZE)] * 3
    assert all({(KL, "search"), (KL, "report"), (SIZE, "search")} <= set(trial.measurements) for trial in found)
    assert len({trial.hash for trial in found}) == 3
    assert notes.trials == [(last + i, "complete", i, 3) for i in (1, 2, 3)]
    # The frontier knows them, and is that of all trials.
    complete = store.trials(study.id, states=["complete"])
    expected = [complete[i].number for i in non_dominated([t.values([KL, SIZE]) for t in complete], ["minimize"] * 2)]
    assert [trial.number for trial in store.frontier(study.id)] == expected
    assert store.table(study.id, "optimism")["objective"] == KL
    assert store.study(study.id).state == "finished"


def test_a_trial_that_is_beaten_is_reported_too(store, study, offers, monkeypatch):
    monkeypatch.setattr(Evaluator, "penalty", 10.0)
    (found,) = refine_study(store, study.id, BOUNDS, 1, None, make)
    assert not found.on_frontier
    assert (KL, "report") in found.measurements


def test_it_ends_when_nothing_is_offered(store, study, offers):
    offers.most = 2
    notes = Notes()
    found = refine_study(store, study.id, BOUNDS, 5, notes, make)
    assert len(found) == 2
    assert notes.notes == ["the model offers nothing untried that is likely to be better within these bounds"]


def test_nothing_is_loaded_where_nothing_is_to_be_measured(store, study, offers):
    def never(spec):
        raise AssertionError("workers were started")

    offers.most, notes = 1, Notes()
    refine_study(store, study.id, BOUNDS, 1, None, make)
    assert refine_study(store, study.id, BOUNDS, 2, notes, never) == []
    assert "offers nothing untried" in notes.notes[0]

    def nothing(*_, **__):
        raise AutoQError("no assignment keeps the bounds")

    offers.offer = nothing
    with pytest.raises(AutoQError, match="no assignment keeps the bounds"):
        refine_study(store, study.id, BOUNDS, 2, None, never)
    assert store.study(study.id).state == "finished"


def test_what_was_measured_before_offers_ran_out_is_reported(store, study, offers):
    first = offers.offer

    def once(*arguments, **more):
        if offers.bounds:
            raise AutoQError("no assignment keeps the bounds")
        return first(*arguments, **more)

    offers.offer, notes = once, Notes()
    (found,) = refine_study(store, study.id, BOUNDS, 3, notes, make)
    assert (KL, "report") in found.measurements
    assert notes.notes == ["nothing more is offered: no assignment keeps the bounds"]


def test_what_to_be_best_in_must_be_an_objective(store, study, offers):
    with pytest.raises(BadInput, match="bits_per_weight"):
        refine_study(store, study.id, BOUNDS, 1, None, make, best="bits_per_weight")
    assert offers.bounds == []


@pytest.mark.parametrize("n", [0, -1])
def test_fewer_than_one_is_refused(store, study, offers, n):
    with pytest.raises(BadInput, match="n must be at least 1"):
        refine_study(store, study.id, BOUNDS, n, None, make)
    assert offers.bounds == []


@pytest.mark.parametrize("state", ["created", "running", "interrupted", "failed"])
def test_only_finished_studies(store, study, offers, state):
    store.set_state(study.id, state)
    with pytest.raises(BadInput, match=f"is {state} and cannot be refined"):
        refine_study(store, study.id, BOUNDS, 1, None, make)
    assert store.study(study.id).state == state


def test_a_failure_is_a_failed_trial(store, study, offers, monkeypatch):
    monkeypatch.setattr(Evaluator, "problem", MemoryError("no room"))
    assert refine_study(store, study.id, BOUNDS, 2, None, make) == []
    last = store.trials(study.id)[-1]
    assert (last.state, last.origin, last.error.message) == ("failed", "refine", "no room")
    assert store.study(study.id).state == "finished"


def test_an_interrupt_leaves_no_trial_running(store, study, offers, monkeypatch):
    monkeypatch.setattr(Evaluator, "problem", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        refine_study(store, study.id, BOUNDS, 2, None, make)
    assert store.trials(study.id, states=["running"]) == []
    assert store.study(study.id).state == "finished"


def test_a_model_that_offers_nothing_changes_nothing(store, study, offers):
    def nothing(*_, **__):
        raise AutoQError("no assignment keeps the bounds")

    offers.offer = nothing
    before = len(store.trials(study.id))
    with pytest.raises(AutoQError, match="no assignment keeps the bounds"):
        refine_study(store, study.id, BOUNDS, 2, None, make)
    assert (len(store.trials(study.id)), store.study(study.id).state) == (before, "finished")


def test_a_refined_study_can_be_run_again(store, study, offers):
    """A process that is killed while it refines leaves the study running: resuming it ends it properly."""
    refine_study(store, study.id, BOUNDS, 1, None, make)
    before = [trial.hash for trial in store.trials(study.id)]
    store.set_state(study.id, "running")
    run_study(store, study.id, None, make)
    assert [trial.hash for trial in store.trials(study.id)] == before
    assert store.study(study.id).state == "finished"
