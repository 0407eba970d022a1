"""Recipes in a study: proposals of their own name, stored with it, and refused before anything is written."""

import json
from collections.abc import Mapping

import pytest

from autoq.assignment import Assignment
from autoq.errors import BadInput
from autoq.measurement import Measurement
from autoq.models import inspect
from autoq.scheme import Keep
from autoq.search.controller import create_study, run_study
from autoq.search.executors import LocalExecutor
from autoq.search.observer import Observer
from autoq.spec import build_spec
from autoq.store import Store
from autoq.targets import CostTable

Q = "model.layers.0.self_attn.q_proj"


class Evaluator:
    """Every assignment is worth the share of its layers that are kept; a table of costs of 1 ms each."""

    def __init__(self, spec):
        self.tables = []

    def describe(self):
        return {"device": "made up", "threads": 1}

    def calibrate(self):
        return "nowhere"

    def sensitivities(self, choices):
        return {name: {text: float(len(texts) - i) for i, text in enumerate(texts)} for name, texts in choices.items()}

    def cost_table(self, choices: Mapping):
        self.tables.append(choices)
        times = {name: dict.fromkeys(texts, 1.0) for name, texts in choices.items()}
        return CostTable("made up", {"latency_decode_ms": 1.0}, {"latency_decode_ms": times})

    def measure(self, assignment, part):
        value = 1.0 + sum(scheme != Keep() for scheme in assignment.values())
        return [Measurement("kl_nats_per_token", value, "nats/token", "measured", part, stderr=0.1, n=10)]

    def time(self, assignment):
        return [Measurement("latency_decode_ms", 1.0, "ms", "measured", "report", stderr=0.1, n=10)]


@pytest.fixture
def store(tmp_path):
    return Store.open(f"sqlite:///{tmp_path / 'autoq.db'}")


@pytest.fixture
def spec(tiny_model_dir):
    def build(recipes, **more):
        tree = {
            "model": {"id": str(tiny_model_dir("llama")), "dtype": "bfloat16"},
            "sampler": {"name": "nsga2"},
            "target": {"name": "generic"},
            "space": {"schemes": ["rtn-int3-g32", "rtn-int4-g32"], "exclude": ["*.down_proj"]},
            "objectives": ["kl_nats_per_token", "size_bytes"],
            "budget": {"trials": 24},
            "recipes": [str(path) for path in recipes],
        }
        return build_spec(tree | more)

    return build


@pytest.fixture
def recipe(tmp_path, tiny_model_dir):
    """Write the assignment that gives every linear a scheme, unless told otherwise; gives path and texts."""

    def write(name, text, **others):
        layers = inspect(build_spec({"model": {"id": str(tiny_model_dir("llama"))}}).model).layers
        texts = {each.name: text for each in layers if each.kind == "linear" and "down_proj" not in each.name} | others
        path = tmp_path / name
        path.write_text(json.dumps(texts), encoding="utf-8")
        return path, Assignment.from_dict({each.name: texts.get(each.name, "keep") for each in layers})

    return write


class Stop(Observer):
    """Interrupts a study where it begins a stage, or at its n-th trial."""

    def __init__(self, stage=None, trial=None):
        self.at, self.count, self.notes = stage, trial, []

    def note(self, text):
        self.notes.append(text)

    def stage(self, name, total):
        if name == self.at:
            raise KeyboardInterrupt

    def trial(self, trial, done, budget):
        if done == self.count:
            raise KeyboardInterrupt


def run(store, study, observer=None, made=None):
    def make(spec):
        def build(spec):
            evaluator = Evaluator(spec)
            if made is not None:
                made.append(evaluator)
            return evaluator

        return LocalExecutor(spec, build)

    return run_study(store, study.id, observer or Observer(), make)


def test_a_recipe_is_a_baseline_after_the_uniform_ones_and_starts_the_search(store, spec, recipe):
    inside, in_space = recipe("inside.json", "rtn-int4-g32", **{Q: "rtn-int3-g32"})
    outside, beyond = recipe("outside.json", "hqq-int8-g32", lm_head="rtn-int8-channel-sym")
    study = create_study(store, spec([inside, outside]))
    run(store, study)
    trials = store.trials(study.id, with_assignments=True)
    names = [trial.baseline for trial in trials if trial.baseline]
    assert names[-2:] == ["recipe:inside", "recipe:outside"]
    assert names[0] == "unquantized"
    found = {trial.baseline: trial for trial in trials}
    assert found["recipe:inside"].assignment == in_space
    assert found["recipe:outside"].assignment == beyond
    assert {found[name].origin for name in names} == {"baseline"}
    assert found["recipe:outside"].state == "complete"
    # The sampler is told of the one that lies in its space.
    told = [name for name in names if found[name].sampler_attrs]
    assert "recipe:inside" in told
    assert "recipe:outside" not in told
    seeds = [trial.number for trial in trials if trial.origin == "seed"]
    assert min(seeds) == len(names)


def test_recipes_of_one_name_are_numbered_and_equal_ones_tried_once(store, spec, recipe, tmp_path):
    first, _ = recipe("mix.json", "rtn-int4-g32", **{Q: "rtn-int3-g32"})
    (tmp_path / "b").mkdir()
    second, _ = recipe("b/mix.json", "rtn-int3-g32", **{Q: "rtn-int4-g32"})
    again, _ = recipe("again.json", "rtn-int3-g32", **{Q: "rtn-int4-g32"})
    study = create_study(store, spec([first, second, again]))
    run(store, study)
    names = [trial.baseline for trial in store.trials(study.id) if (trial.baseline or "").startswith("recipe:")]
    assert names == ["recipe:mix", "recipe:mix-2"]


def test_a_uniform_baseline_keeps_its_name_and_the_recipe_is_not_missed(store, spec, recipe):
    path, _ = recipe("nothing.json", "keep")
    study = create_study(store, spec([path]))
    observer = Stop()
    run(store, study, observer)
    assert not [t for t in store.trials(study.id) if (t.baseline or "").startswith("recipe:")]
    assert observer.notes == ["recipe:nothing is the same assignment as unquantized"]


@pytest.mark.parametrize("stop", [Stop(stage="load"), Stop(stage="calibrate"), Stop(trial=2)])
def test_a_resume_needs_no_recipe_file(store, spec, recipe, stop):
    path, assignment = recipe("mine.json", "hqq-int4-g32")
    study = create_study(store, spec([path]))
    path.unlink()
    with pytest.raises(KeyboardInterrupt):
        run(store, study, stop)
    run(store, study)
    trials = {trial.baseline: trial for trial in store.trials(study.id, with_assignments=True)}
    assert trials["recipe:mine"].assignment == assignment


def test_a_creation_that_was_cut_off_reads_them_when_the_study_runs(store, spec, recipe):
    path, assignment = recipe("mine.json", "hqq-int4-g32")
    whole = spec([path])
    study = store.create_study(whole, [("kl_nats_per_token", "u", "minimize"), ("size_bytes", "u", "minimize")])
    run(store, study)
    path.unlink()
    trials = {trial.baseline: trial for trial in store.trials(study.id, with_assignments=True)}
    assert trials["recipe:mine"].assignment == assignment


def test_what_a_recipe_uses_is_timed(store, spec, recipe, monkeypatch):
    monkeypatch.setattr("autoq.targets.generic.Generic.latencies", frozenset({"latency_decode_ms"}))
    path, _ = recipe("mine.json", "hqq-int4-g32", lm_head="rtn-int8-channel-sym")
    study = create_study(store, spec([path], objectives=["kl_nats_per_token", "latency_decode_ms"]))
    made = []
    run(store, study, made=made)
    (choices,) = made[0].tables
    assert choices["lm_head"] == ["keep", "rtn-int8-channel-sym"]
    assert "hqq-int4-g32" in choices[Q]
    assert choices["model.layers.0.mlp.down_proj"] == ["keep"]
    assert store.study(study.id).state == "finished"


@pytest.mark.parametrize(
    ("content", "fragment"),
    [
        (None, "No such file"),
        ("hello", "is no recipe; choose from"),
        ('{"model.layers.9.mlp.up_proj": "keep"}', "the model has no layers model.layers.9.mlp.up_proj"),
        ('{"lm_head": "gguf-q4_0"}', "a GGUF type belongs to the target llama-cpp"),
    ],
)
def test_a_recipe_that_cannot_be_used_is_refused_and_nothing_is_written(store, spec, tmp_path, content, fragment):
    path = tmp_path / "bad"
    if content is not None:
        path.write_text(content)
    with pytest.raises(BadInput) as caught:
        create_study(store, spec([path]))
    assert fragment in str(caught.value)
    assert caught.value.exit_code == 2
    assert store.studies() == []
