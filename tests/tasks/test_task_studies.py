"""Whole studies on labelled examples: what is measured is what the model answers, and the search gets better."""

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from autoq.assignment import Assignment
from autoq.errors import BadInput, DataRefused
from autoq.evaluation import Evaluator
from autoq.scheme import Keep, parse_scheme
from autoq.search.controller import create_study, run_study
from autoq.spec import build_spec
from autoq.store import Store
from autoq.store.dominance import non_dominated
from autoq.study import Study

SIZE = "size_bytes"
TEXTS = {"columns": {"text": "sentence"}, "search_examples": 150, "report_examples": 250}
QUESTIONS = {"search_examples": 60, "report_examples": 80}


def uniform(evaluator, text):
    scheme = parse_scheme(text)
    return Assignment({x.name: scheme if x.kind == "linear" else Keep() for x in evaluator.info.layers})


def by_name(measurements):
    return {m.objective: m for m in measurements}


def test_accuracy_and_f1_are_those_of_answers_given_one_by_one(classifier, study_tree):
    evaluator = Evaluator(build_spec(study_tree(classifier, TEXTS, ["accuracy", "f1:mine", SIZE])))
    evaluator.describe()
    assert evaluator.info.labels == ("a", "b", "c")
    assignment = uniform(evaluator, "rtn-int2-channel")
    lines = (classifier / "examples.jsonl").read_text().splitlines()
    labels = {row["sentence"]: row["label"] for row in map(json.loads, lines)}
    seen = {}
    for part, count in (("search", 150), ("report", 250)):
        found = by_name(evaluator.measure(assignment, part))
        rows = getattr(evaluator._tasks._examples["mine", "labels"], part)
        seen[part] = {row["text"] for row in rows}
        answers = []
        with evaluator.swapped(assignment), torch.no_grad():
            for row in rows:
                ids = torch.tensor([evaluator.model.tokenizer(row["text"])["input_ids"]])
                answers.append("abc"[int(evaluator.model.model(input_ids=ids).logits.argmax())])
        right = [answer == labels[row["text"]] for row, answer in zip(rows, answers, strict=True)]
        measured = found["accuracy"]
        assert (measured.value, measured.n, measured.part) == (pytest.approx(np.mean(right)), count, part)
        assert measured.stderr == pytest.approx(np.std(right, ddof=1) / count**0.5)
        assert measured.per_token[:, 0].tolist() == right
        f1 = []
        for c in "abc":
            both = sum(a == labels[row["text"]] == c for row, a in zip(rows, answers, strict=True))
            either = sum((a == c) + (labels[row["text"]] == c) for row, a in zip(rows, answers, strict=True))
            f1.append(2 * both / either)
        assert found["f1:mine"].value == pytest.approx(np.mean(f1))
        assert 0 < found["f1:mine"].stderr < 0.1
        assert found["f1:mine"].per_token.shape == (count, 1)
    assert not seen["search"] & seen["report"]
    whole = by_name(evaluator.measure(Assignment({}), "search"))
    assert whole["accuracy"].value > 0.9
    assert whole["accuracy"].value > by_name(evaluator.measure(assignment, "search"))["accuracy"].value


def test_a_classifiers_distance_is_that_of_its_classes_and_the_proxy_foretells_it(classifier, study_tree):
    """KL of one distribution a window; the curvature proxy's labels come from the classes."""
    more = {"data": {"source": str(classifier / "text.txt"), "window_tokens": 12, "calibration_tokens": 1536}}
    more["data"] |= {"search_tokens": 768, "report_tokens": 128}
    evaluator = Evaluator(build_spec(study_tree(classifier, TEXTS, ["kl_nats_per_token", "top1_agreement"], **more)))
    data = evaluator.parts.search
    linears = [x.name for x in evaluator.info.layers if x.kind == "linear" and "pooler" not in x.name]
    table = evaluator.sensitivities({name: ["rtn-int3-channel"] for name in linears})
    with torch.no_grad():
        before = evaluator.model.outputs(data)[:, 0].double().log_softmax(-1)
    predicted, measured = [], []
    for name in linears:
        alone = Assignment({name: parse_scheme("rtn-int3-channel")})
        found = by_name(evaluator.measure(alone, "search"))
        with evaluator.swapped(alone), torch.no_grad():
            after = evaluator.model.outputs(data)[:, 0].double().log_softmax(-1)
        kl = (before.exp() * (before - after)).sum(-1).mean()
        assert found["kl_nats_per_token"].value == pytest.approx(float(kl), rel=0.05, abs=2e-5)
        assert found["kl_nats_per_token"].n == len(data)
        same = (before.argmax(-1) == after.argmax(-1)).double().mean()
        assert found["top1_agreement"].value == pytest.approx(float(same))
        predicted.append(table[name]["rtn-int3-channel"])
        measured.append(float(kl))
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, measured)]
    assert np.corrcoef(*ranks)[0, 1] > 0.7
    assert 1 / 3 < sum(predicted) / sum(measured) < 3


def test_choices_are_ranked_by_their_log_likelihood(chooser, study_tree):
    evaluator = Evaluator(build_spec(study_tree(chooser, QUESTIONS, ["multiple_choice_accuracy", SIZE])))
    assignment = uniform(evaluator, "rtn-int2-channel")
    (found,) = evaluator.measure(assignment, "search")
    right = []
    with evaluator.swapped(assignment), torch.no_grad():
        for row in evaluator._tasks._examples["mine", "choices"].search:
            ids = torch.tensor([evaluator.model.tokenizer(row["prompt"])["input_ids"]])
            logs = evaluator.model.model(input_ids=ids).logits[0, -1].log_softmax(-1)
            token = [evaluator.model.tokenizer(choice)["input_ids"] for choice in row["choices"]]
            right.append(int(np.argmax([float(logs[t[0]]) for t in token])) == row["answer"])
    assert found.value == pytest.approx(np.mean(right))
    (whole,) = evaluator.measure(Assignment({}), "search")
    assert whole.value > 0.9 > found.value


@pytest.mark.parametrize(
    ("made", "task", "quality", "report"),
    [
        ("classifier", TEXTS, "accuracy", ["f1"]),
        ("chooser", QUESTIONS, "multiple_choice_accuracy", ["perplexity", "next_token_accuracy"]),
    ],
)
def test_from_examples_to_a_pick(request, study_tree, tmp_path, made, task, quality, report):
    tree = study_tree(request.getfixturevalue(made), task, [quality, SIZE], report=report)
    store = Store.open(f"sqlite:///{tmp_path}/autoq.db")
    study = create_study(store, build_spec(tree))
    run_study(store, study.id)
    complete = store.trials(study.id, states=["complete"])
    assert len(complete) == 16
    values = [t.values([quality, SIZE]) for t in complete]
    frontier = store.frontier(study.id)
    assert {t.number for t in frontier} == {complete[i].number for i in non_dominated(values, ["maximize", "minimize"])}
    by_baseline = {t.baseline: t for t in complete if t.baseline}
    whole, coarse = (by_baseline[name].values([quality])[0] for name in ("unquantized", "uniform-int2"))
    assert whole > coarse
    # What is reported only is on the report part of what was reported, and nowhere else.
    for trial in complete:
        measured = {name for name, part in trial.measurements if part == "search"}
        assert measured == {quality, SIZE}
        if (quality, "report") in trial.measurements:
            assert {(name, "report") for name in report} <= set(trial.measurements)
    assert any((report[0], "report") in t.measurements for t in frontier)
    best = max(frontier, key=lambda t: t.values([quality])[0])
    assert Study(store, study.id).pick(best=quality).number == best.number
    # It can be picked by, too.
    limit = best.measurements[report[0], "report"].value
    picked = Study(store, study.id).pick(**{"max" if report[0] == "perplexity" else "min": {report[0]: limit}})
    assert report[0] in picked.best_measurements()


def test_examples_that_cannot_be_used_are_refused_before_anything_is_written(classifier, study_tree, tmp_path):
    store = Store.open(f"sqlite:///{tmp_path}/autoq.db")
    tree = study_tree(classifier, {**TEXTS, "report_examples": 10_000}, ["accuracy", SIZE])
    with pytest.raises(DataRefused, match="and 10150 are needed"):
        create_study(store, build_spec(tree))
    assert list(store.studies()) == []


@pytest.mark.parametrize("field", [{"num_labels": 1}, {"problem_type": "multi_label_classification"}])
def test_heads_that_are_no_choice_between_classes_are_refused(tiny_model_dir, tmp_path, field):
    import shutil

    from autoq.errors import ModelRefused
    from autoq.models import inspect
    from autoq.spec import ModelSpec

    folder = shutil.copytree(tiny_model_dir("bert-classifier"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    if "num_labels" in field:
        config |= {"id2label": {"0": "x"}, "label2id": {"x": 0}}
    (folder / "config.json").write_text(json.dumps(config | field))
    with pytest.raises(ModelRefused, match="two classes or more, one of which is right"):
        inspect(ModelSpec(id=str(folder)))


def test_a_model_that_is_nan_by_itself_is_refused_once_although_no_text_is_measured(classifier, study_tree, tmp_path):
    folder = tmp_path / "damaged"
    shutil.copytree(classifier, folder)
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("attention.self.query.bias"))
    tensors[name][0] = torch.nan
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    store = Store.open(f"sqlite:///{tmp_path}/autoq.db")
    study = create_study(store, build_spec(study_tree(folder, TEXTS, ["accuracy", SIZE])))
    with pytest.raises(BadInput, match=r"gives NaN or infinity before anything is quantized"):
        run_study(store, study.id)
    assert not store.trials(study.id), "no trial was spent on it"
