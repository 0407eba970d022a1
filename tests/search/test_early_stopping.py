"""Studies whose evaluator gives candidates up: end states, what is told, and that order changes nothing."""

import numpy as np
import pytest

from autoq.measurement import Measurement
from autoq.scheme import code_bits
from autoq.search import controller
from autoq.search.controller import create_study, run_study
from autoq.search.executors import LocalExecutor
from autoq.search.observer import Observer
from autoq.search.stopping import expected
from autoq.spec import build_spec
from autoq.statistics import mean_and_stderr, shards
from autoq.store import Store

KL = "kl_nats_per_token"
HARDNESS = np.random.default_rng(0).lognormal(size=(8, 256))


class Evaluator:
    """Loss of a token: what the layers add, times how hard the token is, times a little chance."""

    def __init__(self, spec):
        self.rivals = {}

    def describe(self):
        return {"device": "made up", "threads": 1}

    def calibrate(self):
        return "nowhere"

    def sensitivities(self, choices):
        from autoq.scheme import parse_scheme

        return {name: {t: 4.0 ** -code_bits(parse_scheme(t)) for t in texts} for name, texts in choices.items()}

    def measure(self, assignment, part, rival=None):
        self.rivals[assignment.hash] = rival
        level = sum((1 + sum(n.encode()) % 7) * 4.0 ** -code_bits(scheme) for n, scheme in assignment.items())
        chance = np.random.default_rng(int(assignment.hash[:8], 16)).normal(size=HARDNESS.shape)
        values = level * HARDNESS * np.exp(0.2 * chance)
        steps, detail = shards(*values.shape), {}
        for step in steps[:-1]:
            seen = np.where(np.arange(len(values))[:, None] < step.stop, values, np.nan)
            if rival is not None and rival.beats(KL, seen, 1.0, len(steps) - 1):
                detail = {"of": values.size, "rival": rival.number, "estimate": rival.expected(KL, seen)}
                values = seen
                break
        mean, stderr, n = mean_and_stderr(values)
        tokens = values.astype(np.float32)
        return [Measurement(KL, mean, "nats/token", "measured", part, stderr, n, detail=detail, per_token=tokens)]


class Interrupting(Observer):
    def __init__(self, stop_at):
        self.stop_at = stop_at

    def trial(self, trial, done, budget):
        if done >= self.stop_at:
            raise KeyboardInterrupt


@pytest.fixture
def store(tmp_path):
    return Store.open(f"sqlite:///{tmp_path / 'autoq.db'}")


@pytest.fixture
def spec(tiny_model_dir):
    def build(**more):
        tree = {
            "model": {"id": str(tiny_model_dir("llama")), "dtype": "float32"},
            "target": {"name": "generic"},
            "space": {"schemes": ["rtn-int2-g32", "rtn-int3-g32", "rtn-int4-g32", "rtn-int8-g32"]},
            "objectives": [KL, "size_bytes"],
            "sampler": {"name": "tpe", "seeds": 6},
            "budget": {"trials": 32},
        }
        return build_spec(tree | more)

    return build


def local(made=None):
    def build(spec):
        evaluator = Evaluator(spec)
        if made is not None:
            made.append(evaluator)
        return evaluator

    return lambda spec: LocalExecutor(spec, build)


class Shuffled(LocalExecutor):
    """Gives results in another order than that of submission."""

    def next(self, timeout=None):
        self._queue.rotate(1)
        return super().next(timeout)


def search(store, spec, make=None):
    study = create_study(store, spec)
    run_study(store, study.id, None, make or local())
    return study


def history(store, study):
    found = [
        (t.number, t.state, t.hash, {k: m.to_json() for k, m in t.measurements.items()}) for t in trials(store, study)
    ]
    return found, [t.number for t in store.frontier(study.id)]


def trials(store, study, *states):
    return store.trials(study.id, states=states or None)


def test_what_a_finished_trial_beats_is_given_up_and_kept_as_that(store, spec):
    study = search(store, spec())
    stopped = trials(store, study, "stopped")
    assert len(stopped) >= 3
    assert store.studies()[0].stopped == len(stopped)
    assert len(stopped) + len(trials(store, study, "complete")) == 32, "it counts against the budget"
    assert {trial.origin for trial in stopped} == {"sampler"}
    for trial in stopped:
        found = trial.measurements[KL, "search"]
        rival = store.trial(study.id, found.detail["rival"])
        assert rival.state == "complete"
        assert rival.number < trial.number
        # Nowhere worse, and better in quality by what all tokens would most likely give.
        assert rival.values(["size_bytes"]) <= trial.values(["size_bytes"])
        assert rival.values([KL])[0] < found.detail["estimate"]
        assert found.n in (512, 1024)
        assert found.detail["of"] == 2048
        assert not trial.on_frontier
        assert (KL, "report") not in trial.measurements
        assert np.isfinite(store.token_values(study.id, trial.number, KL, "search")).sum() == found.n


def test_stopping_takes_nothing_from_the_frontier_of_the_trials(store, spec):
    """Every stopped trial, evaluated in full, is beaten."""
    study = search(store, spec())
    frontier = store.frontier(study.id)
    evaluator = Evaluator(None)
    for trial in store.trials(study.id, states=("stopped",), with_assignments=True):
        (whole,) = evaluator.measure(trial.assignment, "search")
        size = trial.values(["size_bytes"])[0]
        assert any(t.values([KL])[0] < whole.value and t.values(["size_bytes"])[0] <= size for t in frontier)


@pytest.mark.parametrize("more", [{"budget": {"trials": 32, "stop_confidence": None}}, {"objectives": ["size_bytes"]}])
def test_nothing_is_given_up_where_that_is_not_wanted_or_makes_no_sense(store, spec, more):
    made = []
    study = search(store, spec(**more), local(made))
    assert not trials(store, study, "stopped")
    assert set(made[0].rivals.values()) == {None}


def test_the_sampler_is_told_the_estimate(store, spec, monkeypatch):
    told = []

    class Listening(controller.AskTell):
        def tell(self, number, values, constraints=()):
            told.append(values[0])
            super().tell(number, values, constraints)

    monkeypatch.setattr(controller, "AskTell", Listening)
    study = search(store, spec())
    ended = trials(store, study, "complete", "stopped")[:-1]  # nobody asks what follows from the last one
    values = [expected(trial.measurements[KL, "search"]) for trial in ended]
    assert told == values[-len(told) :]
    stopped = [trial for trial in ended if trial.state == "stopped"]
    assert stopped
    assert all(expected(trial.measurements[KL, "search"]) != trial.values([KL])[0] for trial in stopped)


def test_what_is_infeasible_is_nobodys_rival(store, spec):
    free = search(store, spec())
    sizes = sorted(t.values(["size_bytes"])[0] for t in trials(store, free, "complete"))
    made = []
    fields = {"constraints": {"size_bytes": {"min": sizes[len(sizes) // 2]}}}
    bounded = search(store, spec(**fields), local(made))
    feasible = {trial.number for trial in trials(store, bounded, "complete") if trial.feasible}
    assert len(feasible) < len(trials(store, bounded, "complete"))
    rivals = {rival.number for rival in made[0].rivals.values() if rival is not None}
    assert rivals
    assert rivals <= feasible


@pytest.mark.parametrize("workers", [1, 3])
def test_a_resumed_study_gives_up_what_the_uninterrupted_one_did(store, spec, workers):
    fields = {"workers": {"count": workers, "executor": "ray"}}
    whole = search(store, spec(**fields))
    assert trials(store, whole, "stopped")
    study = create_study(store, spec(**fields))
    for stop_at in (9, 14, 21):
        with pytest.raises(KeyboardInterrupt):
            run_study(store, study.id, Interrupting(stop_at), local())
    run_study(store, study.id, None, local())
    assert history(store, study) == history(store, whole)


def test_order_of_completion_changes_neither_proposals_nor_rivals(store, spec):
    fields = {"workers": {"count": 3, "executor": "ray"}}
    plain = search(store, spec(**fields))
    shuffled = search(store, spec(**fields), lambda spec: Shuffled(spec, Evaluator))
    assert trials(store, plain, "stopped")
    assert history(store, shuffled) == history(store, plain)
