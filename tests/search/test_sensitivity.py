"""Shared sensitivities: computed once per model, data and method; and the frontier that they predict."""

import itertools

import pytest

from autoq.errors import AutoQError
from autoq.methods.rtn import RoundToNearest
from autoq.scheme import code_bits, parse_scheme
from autoq.search.executors import LocalExecutor
from autoq.search.observer import Observer
from autoq.search.sensitivity import LAYERS_PER_JOB, gather
from autoq.search.setup import pose
from autoq.search.survey import predicted_frontier, survey
from autoq.spec import build_spec
from autoq.store import Store


class Evaluator:
    """Makes up a loss per layer and scheme and remembers what it was asked for."""

    statistics = "/cache/statistics/one-model.safetensors"

    def __init__(self, spec=None):
        self.asked = []
        self.break_at = None

    def describe(self):
        return {"device": "made up", "threads": 1}

    def calibrate(self):
        return type(self).statistics

    def sensitivities(self, choices):
        if self.break_at is not None and len(self.asked) >= self.break_at:
            raise KeyboardInterrupt
        self.asked += [(layer, text) for layer, texts in choices.items() for text in texts]
        return {layer: {text: loss(layer, text) for text in texts} for layer, texts in choices.items()}


def loss(layer, text):
    return (1 + sum(layer.encode()) % 5) * 4.0 ** -code_bits(parse_scheme(text))


@pytest.fixture
def store(tmp_path):
    with Store.open(str(tmp_path / "autoq.db")) as store:
        yield store


@pytest.fixture
def asked(store, monkeypatch):
    """Gather choices with a fresh evaluator; what it was asked for, and what came."""

    def asked(choices, statistics="one-model", target="vllm", **settings):
        monkeypatch.setattr(Evaluator, "statistics", f"/anywhere/{statistics}.safetensors")
        evaluator = Evaluator()
        vars(evaluator).update(settings)
        with LocalExecutor(None, lambda spec: evaluator) as executor:
            try:
                found = gather(choices, target, store, executor, Observer())
            except KeyboardInterrupt:
                found = None
        return evaluator.asked, found

    return asked


TWO = ["rtn-int4-g64", "hqq-int4-g64-rz"]


def test_only_what_no_study_has_found_is_computed(asked):
    first, found = asked({"a": TWO, "b": TWO})
    assert len(first) == 4
    assert found["b"] == {text: loss("b", text) for text in TWO}
    again, same = asked({"b": TWO, "a": TWO})
    assert (again, same) == ([], found)
    more, found = asked({"a": [*TWO, "rtn-int8-channel-sym"], "c": ["rtn-int4-g64"]})
    assert more == [("a", "rtn-int8-channel-sym"), ("c", "rtn-int4-g64")]
    assert found["a"] == {text: loss("a", text) for text in [*TWO, "rtn-int8-channel-sym"]}
    assert asked({"a": [*TWO, "rtn-int8-channel-sym"], "b": TWO, "c": ["rtn-int4-g64"]})[0] == []


def test_other_statistics_are_another_model(asked):
    asked({"a": TWO})
    assert len(asked({"a": TWO}, statistics="another")[0]) == 2


def test_quantized_inputs_lose_something_else_on_another_target(asked):
    texts = ["rtn-int8-channel-sym", "rtn-int8-channel-sym-a8mse", "rtn-int8-channel-sym-a8dyn"]
    assert len(asked({"a": texts})[0]) == 3
    assert asked({"a": texts})[0] == []
    assert asked({"a": texts}, target="onnxruntime")[0] == [("a", text) for text in texts[1:]]


def test_a_method_that_changed_is_asked_again(asked, monkeypatch):
    asked({"a": TWO})
    monkeypatch.setattr(RoundToNearest, "version", RoundToNearest.version + 1)
    assert asked({"a": TWO})[0] == [("a", "rtn-int4-g64")]


def test_an_interrupted_pass_keeps_what_it_found(asked):
    layers = [f"layer{i}" for i in range(3 * LAYERS_PER_JOB)]
    choices = {layer: ["rtn-int4-g64"] for layer in layers}
    first, found = asked(choices, break_at=LAYERS_PER_JOB)
    assert (len(first), found) == (LAYERS_PER_JOB, None)
    rest, found = asked(choices)
    assert [layer for layer, _ in rest] == layers[LAYERS_PER_JOB:]
    assert set(found) == set(layers)


@pytest.fixture
def spec(tiny_model_dir):
    return build_spec(
        {
            "model": {"id": str(tiny_model_dir("llama")), "dtype": "bfloat16"},
            "target": {"name": "generic"},
            "space": {
                "schemes": ["rtn-int2-g32", "rtn-int4-g32", "rtn-int8-channel-sym"],
                "exclude": ["*.mlp.*", "model.layers.1.*"],
            },
            "objectives": ["kl_nats_per_token", "size_bytes"],
        }
    )


def test_the_predicted_frontier_is_the_brute_force_one(spec):
    problem = pose(spec)
    losses = {n: {str(s): loss(n, str(s)) for s in schemes} for n, schemes in problem.space.choices.items()}
    every = []
    for indices in itertools.product(*(range(len(v.choices)) for v in problem.space.variables)):
        assignment = problem.space.assignment(indices)
        size = problem.info.other_bytes + sum(layer.nbytes(assignment[layer.name]) for layer in problem.info.layers)
        every.append((size, sum(losses[name][str(assignment[name])] for name in losses)))
    points = predicted_frontier(problem, losses, 9)
    assert len(points) >= 9
    for point in points:
        assert point.exact
        assert point.size_bytes <= point.budget_bytes
        assert point.loss == pytest.approx(min(lost for size, lost in every if size <= point.budget_bytes))
    assert (points[0].size_bytes, points[-1].size_bytes) == (min(every)[0], max(every)[0])
    baselines = {point.baseline: point for point in points if point.baseline}
    # Those in 3, 5 and 6 bits use what is not searched; the unquantized model is larger than all that is.
    assert set(baselines) == {"uniform-int2", "uniform-int4", "uniform-int8"}
    assert baselines["uniform-int8"].baseline_loss == pytest.approx(min(lost for _, lost in every))
    assert baselines["uniform-int4"].baseline_loss == pytest.approx(
        sum(losses[name]["rtn-int4-g32"] for name in losses)
    )


def test_a_survey_serves_the_search_that_follows(store, spec):
    made = []

    def make(spec):
        made.append(Evaluator())
        return LocalExecutor(spec, lambda spec: made[-1])

    found = survey(store, spec, make=make)
    assert len(made[0].asked) == 3 * len(found.layers)
    assert survey(store, spec, make=make).to_json() == found.to_json()
    assert made[1].asked == []
    document = found.to_json()
    assert (document["kind"], document["unit"]) == ("predicted", "nats/token")
    (name, *_) = found.layers
    kept = found.kept[name]
    assert found.sizes[name]["rtn-int8-channel-sym"] < kept
    assert store.studies() == []


def test_a_failure_is_told(store, spec):
    class Broken(Evaluator):
        def sensitivities(self, choices):
            raise MemoryError("no room")

    with pytest.raises(AutoQError, match="sensitivities: no room"):
        survey(store, spec, make=lambda spec: LocalExecutor(spec, Broken))
