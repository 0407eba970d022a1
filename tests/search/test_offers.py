"""Offers of a stored study: bounds are kept exactly, predictions hold what is true, refusals are one line."""

import math

import pytest

from autoq.errors import AutoQError
from autoq.measurement import Measurement
from autoq.objectives.kl_nats_per_token import KLNatsPerToken
from autoq.scheme import code_bits, parse_scheme
from autoq.search.controller import create_study, run_study
from autoq.search.executors import LocalExecutor
from autoq.search.offers import offer
from autoq.search.setup import pose
from autoq.spec import Bound, build_spec
from autoq.store import Store

KL, SIZE, WEIGHT = "kl_nats_per_token", "size_bytes", "bits_per_weight"


def weight(name):
    return 1 + sum(name.encode()) % 7


def truth(assignment):
    """`down_proj` loses four times what is predicted of it."""
    parts = [(4 if "down" in n else 1) * weight(n) * 4.0 ** -code_bits(s) for n, s in assignment.items()]
    return sum(parts) ** 1.1


class Evaluator:
    """Quality is known; `sign` turns it around."""

    statistics = "/cache/statistics/a-model.safetensors"
    sign = 1.0

    def __init__(self, spec):
        self.spec = spec

    def describe(self):
        return {"device": "made up", "threads": 1}

    def calibrate(self):
        return self.statistics

    def sensitivities(self, choices):
        return {n: {t: weight(n) * 4.0 ** -code_bits(parse_scheme(t)) for t in texts} for n, texts in choices.items()}

    def measure(self, assignment, part, **_):
        return [Measurement(KL, self.sign * truth(assignment), "nats/token", "measured", part, 0.001)]

    def measure_with_slopes(self, assignment, part, choices, turn):
        return self.measure(assignment, part), {}


@pytest.fixture
def store(tmp_path):
    with Store.open(str(tmp_path / "autoq.db")) as store:
        yield store


@pytest.fixture
def run(store, tiny_model_dir):
    def run(objectives=(KL, SIZE), constraints=None, trials=16, schemes=(2, 3, 4, 8), **changes):
        spec = {
            "model": {"id": str(tiny_model_dir("llama"))},
            "target": {"name": "generic"},
            "space": {"schemes": [f"rtn-int{bits}-g32" for bits in schemes]},
            "objectives": list(objectives),
            "constraints": constraints or {},
            "sampler": {"name": "frontier"},
            "budget": {"trials": trials},
        }
        created = create_study(store, build_spec({**spec, **changes}))
        run_study(store, created.id, None, lambda spec: LocalExecutor(spec, Evaluator))
        return store.study(created.id)

    return run


def sizes(store, study):
    found = [trial.measurements[SIZE, "search"].value for trial in store.trials(study.id)]
    return min(found), max(found)


def test_offers_keep_their_bounds_and_hold_what_is_true(store, run):
    study = run()
    low, high = sizes(store, study)
    problem = pose(study.study_spec())
    held, losses = [], []
    for share in (0.02, 0.2, 0.4, 0.6, 0.8):
        limit = low + share * (high - low)
        found = offer(store, study, {SIZE: Bound(max=limit)})
        size = problem.objectives[SIZE].compute(problem.info, found.assignment, problem.spec.target)
        assert size <= limit
        assert found.predicted[SIZE] == (size,) * 3
        value, least, most = found.predicted[KL]
        assert least < value < most
        held.append(least <= truth(found.assignment) <= most)
        losses.append(truth(found.assignment))
        stored = [t for t in store.trials(study.id) if t.measurements[SIZE, "search"].value <= limit]
        # The model's best is no worse than the best that was measured, but for what it cannot know.
        assert losses[-1] <= 1.1 * min(t.measurements[KL, "search"].value for t in stored)
    assert sum(held) >= 4
    assert losses == sorted(losses, reverse=True)


def test_an_offer_where_more_is_better(store, run, monkeypatch):
    monkeypatch.setattr(KLNatsPerToken, "direction", "maximize")
    monkeypatch.setattr(Evaluator, "sign", -1.0)
    study = run()
    low, high = sizes(store, study)
    few, many = (offer(store, study, {SIZE: Bound(max=low + share * (high - low))}) for share in (0.2, 0.8))
    for found in (few, many):
        value, least, most = found.predicted[KL]
        assert least < value < most
        assert math.isclose(value, -truth(found.assignment), rel_tol=0.5, abs_tol=0.05)
    assert truth(many.assignment) < truth(few.assignment)


def test_several_bounds_are_kept_at_once(store, run):
    study = run((KL, SIZE, WEIGHT))
    low, high = sizes(store, study)
    limit, fewest = low + 0.6 * (high - low), 4.0
    found = offer(store, study, {SIZE: Bound(max=limit), WEIGHT: Bound(min=fewest)})
    assert found.predicted[SIZE][0] <= limit
    assert found.predicted[WEIGHT][0] >= fewest
    with pytest.raises(AutoQError, match="no assignment that the model finds keeps all bounds"):
        offer(store, study, {SIZE: Bound(max=low), WEIGHT: Bound(min=8.0)})


def test_the_smallest_that_keeps_a_bound_on_the_loss(store, run):
    study = run()
    low, high = sizes(store, study)
    last = high
    for most in (0.1, 0.5, 2.0):
        found = offer(store, study, {KL: Bound(max=most)}, best=SIZE)
        assert found.predicted[KL][0] <= most
        assert low <= found.predicted[SIZE][0] <= last
        last = found.predicted[SIZE][0]
        # No smaller one is predicted to keep it.
        smaller = offer(store, study, {SIZE: Bound(max=last - 0.02 * (high - low))})
        assert smaller.predicted[KL][0] > 0.99 * most
    with pytest.raises(AutoQError, match="the best kl_nats_per_token that is predicted"):
        offer(store, study, {KL: Bound(max=1e-9)}, best=SIZE)


@pytest.mark.parametrize("best", [KL, SIZE])
def test_fresh_offers_are_new_and_may_be_better(store, run, best):
    study = run()
    low, high = sizes(store, study)
    bounds = {KL: Bound(max=0.5)} if best == SIZE else {SIZE: Bound(max=low + 0.4 * (high - low))}
    problem = pose(study.study_spec())
    hashes = {trial.hash for trial in store.trials(study.id)}
    for _ in range(40):
        if (found := offer(store, study, bounds, best, fresh=True)) is None:
            break
        assert found.assignment.hash not in hashes
        hashes.add(found.assignment.hash)
        trial = store.start_trial(study.id, len(store.trials(study.id)), found.assignment, "refine")
        size = problem.objectives[SIZE].compute(problem.info, found.assignment, problem.spec.target)
        measured = [
            Measurement(KL, truth(found.assignment), "nats/token", "measured", "search", 0.001),
            Measurement(SIZE, size, "bytes", "computed", "search"),
        ]
        store.finish_trial(trial.id, trial.attempt, measured, {}, 0.1, "")
    else:
        raise AssertionError("there is always something better")


def test_the_studys_own_constraints_hold_too(store, run):
    first = run()
    low, high = sizes(store, first)
    limit = low + 0.3 * (high - low)
    study = run(constraints={SIZE: {"max": limit}}, trials=16, name="bounded")
    assert offer(store, study, {}).predicted[SIZE][0] <= limit


def test_what_cannot_be_offered_is_refused_in_one_line(store, run):
    study = run(trials=16)
    low, high = sizes(store, study)
    for bounds, reason in (
        ({}, f"give one on: {SIZE}"),
        ({KL: Bound(max=0.1)}, f"give one on: {SIZE}"),
        ({"latency_decode_ms": Bound(max=1.0)}, "knows nothing of latency_decode_ms"),
        ({SIZE: Bound(max=low - 1000)}, "no assignment that the model finds keeps all bounds"),
        ({SIZE: Bound(max=high), KL: Bound(max=1e-9)}, "the best kl_nats_per_token that is predicted within the other"),
    ):
        with pytest.raises(AutoQError, match=reason) as refusal:
            offer(store, study, bounds)
        assert "\n" not in str(refusal.value)
    everything = run([SIZE], trials=4, name="computed")
    with pytest.raises(AutoQError, match="has 0 measured objectives"):
        offer(store, everything, {SIZE: Bound(max=high)})
