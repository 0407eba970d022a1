"""KV caches as decisions of a study: the space, what is counted, a whole search, and who refuses them."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from autoq.assignment import Assignment
from autoq.errors import BadInput, SchemeRefused, SpecError
from autoq.kv_cache import KeyValue
from autoq.scheme import Keep, parse_scheme
from autoq.search.controller import create_study, run_study
from autoq.search.observer import Observer
from autoq.search.offers import offer
from autoq.search.priors import make_prior
from autoq.search.setup import pose
from autoq.search.survey import survey
from autoq.shipping.export import export
from autoq.spec import Bound, build_spec
from autoq.store import Store
from autoq.store.dominance import non_dominated

KL, PEAK, SIZE = "kl_nats_per_token", "peak_memory_bytes", "size_bytes"
CACHES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
BATCH, PROMPT = 16, 100


@pytest.fixture
def spec(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))

    def spec(family="llama", **changes):
        tree = {
            "name": "cached",
            "model": {"id": str(tiny_model_dir(family))},
            "data": {"calibration_tokens": 128, "search_tokens": 128, "report_tokens": 128, "window_tokens": 64},
            "target": {"name": "generic", "batch_size": BATCH, "prompt_tokens": PROMPT},
            "space": {"schemes": ["rtn-int4-g32", "keep"], "kv_cache": [8, 4]},
            "objectives": [KL, PEAK],
            "budget": {"trials": 18, "report_points": 3},
            "workers": {"cpus": 1},
        }
        return build_spec({**tree, **changes})

    return spec


@pytest.fixture
def store(tmp_path):
    with Store.open(str(tmp_path / "autoq.db")) as store:
        yield store


def peak(info, assignment):
    """The bytes by hand: a cache of heads 2, width 8, 100 tokens of which 96 are in whole groups."""
    weights = info.other_bytes + sum(layer.nbytes(assignment[layer.name]) for layer in info.layers)
    keep = 100 * 2 * (8 + 8) * 2
    kv = {bits: 2 * 8 * (3 * (32 * bits // 8 + 4) + 4 * 2) + 100 * 2 * (8 * bits // 8 + 4) for bits in (8, 4)}
    caches = [kv[assignment.caches[name].bits] if name in assignment.caches else keep for name in CACHES]
    return weights + BATCH * sum(caches)


def test_each_block_decides_for_itself_and_choices_are_ordered_by_bytes(spec):
    problem = pose(spec())
    own = [variable for variable in problem.space.variables if variable.name in CACHES]
    assert [v.name for v in own] == CACHES
    assert all(v.choices == (KeyValue(4), KeyValue(8), Keep()) for v in own)
    assert problem.space.size == 2**14 * 3**2
    lightest = problem.space.assignment([0] * len(problem.space.variables))
    assert lightest.caches == dict.fromkeys(CACHES, KeyValue(4))
    assert problem.space.indices(lightest) == [0] * len(problem.space.variables)
    last = [len(v.choices) - 1 for v in problem.space.variables]
    assert problem.space.assignment(last).caches == {}
    assert problem.space.indices(problem.space.assignment(last)) == last
    # What lies outside of the space.
    kept = dict(problem.space.assignment(last))
    assert problem.space.indices(Assignment(kept, caches={CACHES[0]: KeyValue(2)})) is None
    assert problem.space.indices(Assignment(kept, caches={"elsewhere": KeyValue(4)})) is None


def test_without_the_field_nothing_is_searched_or_named(spec):
    problem = pose(spec(space={"schemes": ["rtn-int4-g32", "keep"]}))
    assert problem.space.caches == {}
    assert all(name not in problem.space.choices for name in CACHES)


def test_caches_alone_can_be_searched_and_excluded_by_name(spec):
    problem = pose(spec(space={"kinds": [], "kv_cache": [8]}))
    assert [v.name for v in problem.space.variables] == CACHES
    problem = pose(spec(space={"kinds": [], "kv_cache": [8], "exclude": ["*.1.self_attn"]}))
    assert [v.name for v in problem.space.variables] == CACHES[:1]


def test_the_objective_is_a_sum_over_decisions_and_counts_what_is_held(spec):
    problem = pose(spec(constraints={PEAK: {"max": "400KB"}}))
    table = make_prior(problem, None, None).additive[1]
    assert table.high == 400_000
    for place in range(3):
        indices = [min(place, len(v.choices) - 1) for v in problem.space.variables]
        assignment = problem.space.assignment(indices)
        exact = peak(problem.info, assignment)
        assert problem.computed(PEAK, assignment) == exact
        names = [v.name for v in problem.space.variables]
        assert table.of(dict(zip(names, indices, strict=True))) == exact


def test_size_does_not_know_caches(spec):
    problem = pose(spec(objectives=[KL, SIZE]))
    kept = problem.space.assignment([len(v.choices) - 1 for v in problem.space.variables])
    coded = Assignment(kept, caches=dict.fromkeys(CACHES, KeyValue(4)))
    assert problem.computed(SIZE, coded) == problem.computed(SIZE, kept)
    assert problem.computed(PEAK, coded) == peak(problem.info, coded) < problem.computed(PEAK, kept)


@pytest.mark.parametrize(
    ("family", "changes", "error", "line"),
    [
        ("t5", {}, SpecError, "space.kv_cache: it needs .* caches, and T5ForConditionalGeneration has none"),
        ("bert-mlm", {}, SpecError, "space.kv_cache: it needs .*, and BertForMaskedLM decodes nothing"),
        (
            "llama",
            {"target": {"name": "torch-cpu"}},
            SchemeRefused,
            "torch-cpu cannot run kv8 on model.layers.0.self_attn: it keeps",
        ),
        ("llama", {"target": {"name": "llama-cpp"}}, SchemeRefused, "one type for all caches of a model"),
        ("llama", {"target": {"name": "vllm"}}, SchemeRefused, "8-bit floats"),
        ("llama", {"target": {"name": "generic", "prompt_tokens": 200}}, SpecError, "prompt_tokens: 200 is too long"),
        (
            "llama",
            {"constraints": {PEAK: {"max": 1000}}},
            SpecError,
            "peak_memory_bytes.max: 1000 bytes are out of reach",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(family, changes, error, line, spec):
    objectives = [KL, PEAK] if "constraints" in changes else [KL, SIZE]
    with pytest.raises(error, match=line) as refused:
        pose(spec(family, objectives=objectives, **changes))
    assert "\n" not in str(refused.value)


def test_a_model_without_caches_has_no_peak(spec):
    with pytest.raises(SpecError, match=r"peak_memory_bytes .* of T5ForConditionalGeneration none are known"):
        pose(spec("t5", space={}))


@pytest.mark.parametrize(
    ("space", "line"),
    [
        ({"kv_cache": [3]}, r"space\.kv_cache\.0.*must be one of 8, 4, 2.*3"),
        ({"kv_cache": [True]}, r"space\.kv_cache\.0.*must be one of 8, 4, 2"),
        ({"schemes": ["kv8"]}, r"kv8 is a scheme of KV caches, not of layers: space\.kv_cache: \[8\]"),
    ],
)
def test_bad_fields_are_named_with_value_and_choices(space, line, spec):
    with pytest.raises(SpecError, match=line) as refused:
        spec(space=space)
    assert "\n" not in str(refused.value)


class StopAt(Observer):
    """Interrupts once so many trials have ended."""

    def __init__(self, number):
        self.number = number

    def trial(self, trial, done, budget):
        if done >= self.number:
            raise KeyboardInterrupt


def history(store, study):
    return [
        (t.number, t.origin, t.baseline, t.hash, t.measurements[KL, "search"].value)
        for t in store.trials(study.id)
        if t.state != "duplicate"
    ]


def test_a_whole_study_from_spec_to_frontier_and_back_from_the_store(spec, store, tmp_path):
    study = create_study(store, spec())
    run_study(store, study.id)
    trials = store.trials(study.id, states=["complete", "stopped"], with_assignments=True)
    info = pose(spec()).info
    for trial in trials:
        assert set(trial.assignment) == {layer.name for layer in info.layers}
        assert trial.measurements[PEAK, "search"].value == peak(info, trial.assignment)
        assert trial.measurements[PEAK, "search"].kind == "computed"
        assert trial.measurements[KL, "search"].kind == "measured"
        assert Assignment.from_json(trial.assignment.json) == trial.assignment
        assert trial.hash == trial.assignment.hash
    by_name = {t.baseline: t for t in trials if t.baseline}
    assert by_name["uniform-kv4"].assignment.caches == dict.fromkeys(CACHES, KeyValue(4))
    assert set(by_name["uniform-kv4"].assignment.values()) == {Keep()}
    kl = {name: t.measurements[KL, "search"].value for name, t in by_name.items()}
    assert kl["unquantized"] < kl["uniform-kv8"] < kl["uniform-kv4"]
    # The search itself uses them, and differently from block to block somewhere.
    own = [t for t in trials if t.baseline is None]
    assert any(t.assignment.caches for t in own)
    complete = [t for t in trials if t.state == "complete"]
    front = {complete[i].number for i in non_dominated([t.values([KL, PEAK]) for t in complete], ["minimize"] * 2)}
    assert {t.number for t in store.frontier(study.id)} == front
    assert any((KL, "report") in t.measurements for t in complete if t.number in front)

    limit = (peak(info, by_name["unquantized"].assignment) + min(t.values([PEAK])[0] for t in complete)) / 2
    found = offer(store, study, {PEAK: Bound(max=limit)})
    assert found.predicted[PEAK][0] == peak(info, found.assignment) <= limit

    coded = next(t for t in store.trials(study.id, states=["complete"], with_assignments=True) if t.assignment.caches)
    with pytest.raises(SchemeRefused, match=r"torch-cpu cannot run trial .* as kv.* keeps keys and values"):
        export(store, study, coded, tmp_path / "out", "torch-cpu")
    assert not (tmp_path / "out").exists()
    kept = next(t for t in own if not t.assignment.caches) if any(not t.assignment.caches for t in own) else None
    export(store, study, kept or by_name["uniform-int4"], tmp_path / "out", "torch-cpu")


def test_a_resumed_study_goes_the_way_of_the_whole_one(spec, store):
    whole = create_study(store, spec())
    run_study(store, whole.id)
    study = create_study(store, spec(name="resumed"))
    for stop in (9, 14, None):
        if stop is None:
            run_study(store, study.id)
        else:
            with pytest.raises(KeyboardInterrupt):
                run_study(store, study.id, StopAt(stop))
    assert history(store, study) == history(store, whole)


def test_the_survey_has_caches_and_budgets_of_what_the_study_counts(spec, store):
    found = survey(store, spec())
    assert found.axis == PEAK
    for name in CACHES:
        losses, sizes = found.layers[name], found.sizes[name]
        assert losses["keep"] == 0.0 < losses["kv8"] < losses["kv4"]
        assert sizes["keep"] == found.kept[name] == BATCH * 100 * 2 * 16 * 2
        assert sizes["kv4"] < sizes["kv8"] < sizes["keep"]
    points = found.frontier
    assert [p.loss for p in points] == sorted((p.loss for p in points), reverse=True)
    assert any(p.baseline == "uniform-kv4" for p in points)
    # What is known already is not computed again.
    assert survey(store, spec()).layers == found.layers


def test_the_command_line_shows_caches(spec, store, tmp_path):
    from autoq.cli import app

    study = create_study(store, spec(budget={"trials": 12, "report_points": 1}))
    run_study(store, study.id)
    db = ["--db", str(tmp_path / "autoq.db")]
    runner = CliRunner()
    document = json.loads(runner.invoke(app, ["diff", "cached", "unquantized", "uniform-kv4", *db, "--json"]).stdout)
    assert document["layers"] == {
        name: {"a": "keep", "b": "kv4", "bytes_a": BATCH * 6400, "bytes_b": BATCH * (16 * (3 * 20 + 8) + 1600)}
        for name in CACHES
    }
    assert "kv4" in runner.invoke(app, ["diff", "cached", "unquantized", "uniform-kv4", *db]).stdout
    shown = json.loads(runner.invoke(app, ["trials", "cached", *db, "--json"]).stdout)["trials"]
    assert any(trial["assignment"].get(CACHES[0]) == "kv8" for trial in shown)
    methods = json.loads(runner.invoke(app, ["methods", "--json"]).stdout)["methods"]
    assert {"kv8", "kv4"} <= {entry["name"] for entry in methods}


def test_a_scheme_on_what_it_is_not_for_is_refused_by_name(spec):
    from autoq.evaluation import Evaluator

    evaluator = Evaluator(spec())
    layer = "model.layers.0.self_attn.q_proj"
    for wrong, line in [
        ({layer: "kv8"}, f"{layer} as kv8: .* that is a layer, not a KV cache"),
        ({"model.norm": "kv8"}, "model.norm as kv8: .* that is no KV cache"),
        ({CACHES[0]: "rtn-int4-g32"}, f"{CACHES[0]} as rtn-int4-g32: .* that is a KV cache, which is"),
        ({"nowhere": "keep"}, "nowhere as keep: .* that is no layer"),
    ]:
        with pytest.raises(BadInput, match=line):
            evaluator.measure(Assignment.from_dict(wrong), "search")


def test_hidden_states_that_are_kept_are_not_those_of_another_cache(spec):
    from autoq.evaluation import Evaluator

    evaluator = Evaluator(spec("llama"))
    chain = evaluator._states.chain
    assert chain is not None
    assert [name for names in chain.layers for name in names if name in CACHES] == CACHES
    layer = {"model.layers.1.mlp.up_proj": parse_scheme("rtn-int4-g32")}
    one, other = (Assignment(layer, caches={name: KeyValue(2)}) for name in CACHES)
    fresh = [Evaluator(spec("llama")).measure(a, "search")[0].value for a in (one, other)]
    assert [evaluator.measure(a, "search")[0].value for a in (one, other, one, other)] == fresh * 2
    assert fresh[0] != fresh[1]


@pytest.mark.parametrize("how", ["model", "blocks"])
def test_weights_are_trained_with_the_caches_that_they_will_run_with(how, spec, tmp_path, monkeypatch):
    from autoq.evaluation import Evaluator

    evaluator = Evaluator(spec())
    int2 = parse_scheme("rtn-int2-g32")
    layers = {layer.name: int2 if layer.kind == "linear" else Keep() for layer in evaluator.info.layers}
    read, swap = [], evaluator.model.swap

    def seen(weights, activations=None, caches=None):
        read.append(set(caches or {}))
        swap(weights, activations, caches)

    monkeypatch.setattr(evaluator.model, "swap", seen)
    losses = []
    found, _ = evaluator.recover(
        Assignment(layers, caches=dict.fromkeys(CACHES, KeyValue(4))),
        steps=12,
        tokens=None,
        windows=1,
        rate=1.0,
        seed=0,
        how=how,
        tell=lambda step, steps, loss, left: losses.append(loss),
        note=lambda text: None,
        checkpoints=str(tmp_path / "left"),
    )
    assert found
    assert losses
    assert read
    assert all(names == set(CACHES) for names in read)
    assert not any(hasattr(module, "autoq_cache") for module in evaluator.model.model.modules())
