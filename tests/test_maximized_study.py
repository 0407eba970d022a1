"""Qualities of which more is better: what the evaluator measures, and whole studies on them."""

import numpy as np
import pytest
import torch
import transformers

from autoq import reference
from autoq.assignment import Assignment
from autoq.evaluation import Evaluator
from autoq.scheme import Keep, parse_scheme
from autoq.search.controller import create_study, run_study
from autoq.spec import build_spec
from autoq.statistics import Rival
from autoq.store import Store
from autoq.store.dominance import non_dominated
from autoq.study import Study

JS, ACCURACY, AGREEMENT, SIZE = "js_nats_per_token", "next_token_accuracy", "top1_agreement", "size_bytes"
DATA = {"calibration_tokens": 128, "search_tokens": 2048, "report_tokens": 512, "window_tokens": 64}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_models):
    """A Llama that has learned which of six letters follows, which takes a look at the last two."""
    folder = tiny_models.save("llama-tied", tmp_path_factory.mktemp("trained"), torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = tiny_models.tokenizer()
    text = _text(20_000)
    (folder / "text.txt").write_text(text)
    ids = torch.tensor(tokenizer(text)["input_ids"])
    torch.manual_seed(0)
    batches = (torch.stack([ids[i : i + 64] for i in torch.randint(len(ids) - 64, (8,))]) for _ in range(150))
    tiny_models.train(model, ({"input_ids": batch, "labels": batch} for batch in batches)).save_pretrained(folder)
    return folder


def _text(length):
    """Letters of which each follows from the two before it, but for one time in seven."""
    rng = np.random.default_rng(0)
    following, letters = rng.integers(6, size=(6, 6)), [0, 1]
    while len(letters) < length:
        by_rule = int(following[letters[-1], letters[-2]])
        letters.append(int(rng.integers(6)) if rng.random() < 0.15 else by_rule)
    return "".join("abcdef"[i] for i in letters)


@pytest.fixture
def make_spec(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))

    def build(objectives, **more):
        tree = {
            "model": {"id": str(trained), "dtype": "float32"},
            "data": {**DATA, "source": str(trained / "text.txt")},
            "target": {"name": "generic"},
            "space": {"schemes": ["rtn-int2-g32", "rtn-int3-g32", "rtn-int4-g32", "rtn-int8-g32"]},
            "objectives": list(objectives),
            "budget": {"trials": 24, "report_points": 4},
            "workers": {"cpus": 1},
        }
        return build_spec(tree | more)

    return build


def uniform(evaluator, text):
    scheme = parse_scheme(text)
    return Assignment({x.name: scheme if x.kind == "linear" else Keep() for x in evaluator.info.layers})


def outputs(evaluator, data):
    with torch.no_grad():
        return torch.stack([evaluator.model.outputs(window.unsqueeze(0))[0] for window in data])


@pytest.mark.parametrize("memory", ["plenty", "hidden states", "file"])
def test_measured_values_are_the_direct_ones(make_spec, memory, monkeypatch):
    if memory == "file":
        monkeypatch.setattr(reference, "_hidden_states", lambda *_: None)
    more = {} if memory == "plenty" else {"bank": {"memory": "1KB"}}
    evaluator = Evaluator(make_spec([JS, ACCURACY, AGREEMENT, SIZE], **more))
    assignment, data = uniform(evaluator, "rtn-int2-g32"), evaluator.parts.search
    before = outputs(evaluator, data)
    with evaluator.swapped(assignment):
        after = outputs(evaluator, data)
    p, q = before.double().softmax(-1), after.double().softmax(-1)
    m = (p + q) / 2
    js = ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1)).mean() / 2
    found = {x.objective: x for x in evaluator.measure(assignment, "search")}
    assert found[JS].value == pytest.approx(float(js), rel=0.02)
    right = after[:, :-1].argmax(-1) == data[:, 1:]
    assert found[ACCURACY].value == pytest.approx(float(right.double().mean()), abs=1e-9)
    assert found[ACCURACY].n == right.numel()
    same = after.argmax(-1) == before.argmax(-1)
    assert found[AGREEMENT].value == pytest.approx(float(same.double().mean()), abs=1e-9)
    assert 0.2 < found[AGREEMENT].value < 1
    # The unquantized model agrees with itself on every token, however its answers are kept.
    whole = {x.objective: x for x in evaluator.measure(Assignment({}), "search")}
    assert (whole[AGREEMENT].value, whole[AGREEMENT].stderr) == (1.0, 0.0)
    assert whole[JS].value < 1e-5
    assert whole[ACCURACY].value > 0.7
    assert 0 < found[ACCURACY].stderr < 0.1


def test_a_masked_model_has_agreement_and_js_and_no_next_tokens(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path))
    tree = {
        "model": {"id": str(tiny_model_dir("bert-mlm")), "dtype": "float32"},
        "data": {"calibration_tokens": 64, "search_tokens": 256, "report_tokens": 64, "window_tokens": 64},
        "target": {"name": "generic"},
        "objectives": [JS, AGREEMENT, SIZE],
    }
    evaluator = Evaluator(build_spec(tree))
    worse = {x.objective: x.value for x in evaluator.measure(uniform(evaluator, "rtn-int2-channel"), "search")}
    whole = {x.objective: x.value for x in evaluator.measure(Assignment({}), "search")}
    assert worse[AGREEMENT] < whole[AGREEMENT] == 1.0
    assert worse[JS] > whole[JS] >= 0


def test_a_candidate_that_is_right_less_often_is_given_up(make_spec):
    evaluator = Evaluator(make_spec([ACCURACY, SIZE]))
    (best,) = evaluator.measure(uniform(evaluator, "rtn-int8-g32"), "search")
    rival = Rival(3, {ACCURACY: best.per_token}, 0.99)
    (bad,) = evaluator.measure(uniform(evaluator, "rtn-int2-g32"), "search", rival)
    assert bad.detail["rival"] == 3
    assert bad.n < best.n
    assert bad.detail["estimate"] < best.value
    # and the other way round nothing is given up
    (worst,) = evaluator.measure(uniform(evaluator, "rtn-int2-g32"), "search")
    (good,) = evaluator.measure(
        uniform(evaluator, "rtn-int8-g32"), "search", Rival(4, {ACCURACY: worst.per_token}, 0.99)
    )
    assert "rival" not in good.detail
    assert good.n == best.n


def test_a_study_that_maximizes(make_spec, tmp_path):
    spec = make_spec([ACCURACY, SIZE], constraints={AGREEMENT: {"min": 0.8}})
    store = Store.open(f"sqlite:///{tmp_path}/autoq.db")
    study = create_study(store, spec)
    run_study(store, study.id)
    assert store.study(study.id).directions == ("maximize", "minimize")
    complete = store.trials(study.id, states=["complete"])
    feasible = [t for t in complete if t.feasible]
    assert feasible
    for trial in complete:
        agreement = trial.measurements[AGREEMENT, "search"].value
        assert trial.feasible == (agreement >= 0.8)
        assert trial.violations[f"{AGREEMENT}.min"] == pytest.approx((0.8 - agreement) / 0.8)
    values = [t.values([ACCURACY, SIZE]) for t in feasible]
    expected = {feasible[i].number for i in non_dominated(values, ["maximize", "minimize"])}
    frontier = store.frontier(study.id)
    assert {t.number for t in frontier} == expected
    # A larger point that is on it is right more often.
    by_size = sorted(frontier, key=lambda t: t.values([SIZE])[0])
    assert [t.values([ACCURACY])[0] for t in by_size] == sorted(t.values([ACCURACY])[0] for t in frontier)
    best = max(frontier, key=lambda t: t.values([ACCURACY])[0])
    assert Study(store, study.id).pick(best=ACCURACY).number == best.number
    limit = by_size[0].best_measurements()[ACCURACY].value
    picked = Study(store, study.id).pick(min={ACCURACY: limit}, best=SIZE)
    assert picked.best_measurements()[ACCURACY].value >= limit
    # Whoever was stopped has a rival that is no larger and right more often than it would have been.
    for trial in store.trials(study.id, states=["stopped"]):
        found = trial.measurements[ACCURACY, "search"]
        rival = store.trial(study.id, found.detail["rival"])
        assert rival.values([SIZE]) <= trial.values([SIZE])
        assert rival.values([ACCURACY])[0] > found.detail["estimate"]
    reported = [t for t in complete if (ACCURACY, "report") in t.measurements]
    assert {t.number for t in complete if t.baseline} <= {t.number for t in reported}
    optimism = store.table(study.id, "optimism")
    assert optimism is None or 0.5 < optimism["ratio"] < 2
