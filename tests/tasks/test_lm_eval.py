"""lm-eval asks the model in memory: its numbers are those of our own questions, and bad tasks are one line."""

import json

import numpy as np
import pytest
import torch
import yaml

from autoq.assignment import Assignment
from autoq.errors import DataRefused
from autoq.evaluation import Evaluator
from autoq.scheme import Keep, parse_scheme
from autoq.search.controller import create_study, run_study
from autoq.spec import build_spec
from autoq.store import Store

pytest.importorskip("lm_eval")
SIZE = "size_bytes"


@pytest.fixture
def task_file(chooser, tmp_path, monkeypatch):
    """Fields -> a task's YAML file about the chooser's examples."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "datasets"))

    def write(**fields):
        task = {
            "task": "letters",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(chooser / "examples.jsonl")}},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{prompt}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "{{answer}}",
            "target_delimiter": "",
            "metric_list": [{"metric": "acc"}],
        }
        path = tmp_path / "letters.yaml"
        path.write_text(yaml.safe_dump(task | fields))
        return path

    return write


def study(study_tree, chooser, path, objectives, **more):
    tasks = {
        "letters": {"source": str(path), "search_examples": 60, "report_examples": 80},
        "mine": {"source": str(chooser / "examples.jsonl"), "search_examples": 60, "report_examples": 80},
    }
    return build_spec(study_tree(chooser, {}, objectives, tasks=tasks, **more))


def test_its_accuracy_is_that_of_our_own_questions(chooser, study_tree, task_file):
    """Both see all 140 of 144 examples; on those of one part of lm-eval's we answer one by one."""
    evaluator = Evaluator(study(study_tree, chooser, task_file(), ["lm_eval:letters", SIZE]))
    scheme = parse_scheme("rtn-int2-channel")
    assignment = Assignment({x.name: scheme if x.kind == "linear" else Keep() for x in evaluator.info.layers})
    rows = [json.loads(line) for line in (chooser / "examples.jsonl").read_text().splitlines()]
    for part in ("search", "report"):
        (found,) = evaluator.measure(assignment, part)
        right = []
        with evaluator.swapped(assignment), torch.no_grad():
            for place in (each["place"] for each in getattr(evaluator._tasks._examples["letters", "lm_eval"], part)):
                row = rows[place]
                ids = torch.tensor([evaluator.model.tokenizer(row["prompt"])["input_ids"]])
                logs = evaluator.model.model(input_ids=ids).logits[0, -1]
                tokens = [evaluator.model.tokenizer(choice)["input_ids"][0] for choice in row["choices"]]
                right.append(int(logs[tokens].argmax()) == row["answer"])
        assert found.per_token[:, 0].tolist() == right
        assert found.value == pytest.approx(np.mean(right))
    (whole,) = evaluator.measure(Assignment({}), "report")
    assert whole.value > found.value


def test_it_generates_and_rolls_over_texts(chooser, study_tree, task_file):
    from types import SimpleNamespace

    from autoq.tasks.kinds.lm_eval import _model_class

    evaluator = Evaluator(study(study_tree, chooser, task_file(), [SIZE]))
    model, tokenizer = evaluator.model, evaluator.model.tokenizer
    asked = _model_class()(model)
    text = "ab:c" * 60  # longer than the model reads
    ids = [tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]
    limit, expected = model.info.max_positions, 0.0
    with torch.inference_mode():
        (found,) = asked.loglikelihood_rolling([SimpleNamespace(args=(text,))])
        for start in range(0, len(ids) - 1, limit - 1):
            piece = torch.tensor([ids[start : start + limit]])
            logs = model.outputs(piece)[0, :-1].log_softmax(-1)
            expected += float(logs.gather(-1, piece[0, 1:, None]).sum())
        assert found == pytest.approx(expected, rel=1e-5)
        request = SimpleNamespace(args=("ab:", {"until": ["zz"], "max_gen_toks": 1}))
        (said,) = asked.generate_until([request])
        best = int(model.outputs(torch.tensor([tokenizer("ab:")["input_ids"]]))[0, -1].argmax())
    assert said == tokenizer.decode([best])
    request.args[1]["until"] = [said]
    with torch.inference_mode():
        assert asked.generate_until([request]) == [""]


def test_a_study_reports_it(chooser, study_tree, task_file, tmp_path):
    objectives = ["multiple_choice_accuracy:mine", SIZE]
    more = {"report": ["lm_eval:letters"], "budget": {"trials": 12, "report_points": 2}}
    store = Store.open(f"sqlite:///{tmp_path}/autoq.db")
    made = create_study(store, study(study_tree, chooser, task_file(), objectives, **more))
    run_study(store, made.id)
    whole = next(t for t in store.trials(made.id) if t.baseline == "unquantized")
    coarse = next(t for t in store.trials(made.id) if t.baseline == "uniform-int2")
    values = [t.measurements["lm_eval:letters", "report"].value for t in (whole, coarse)]
    assert values[0] > values[1]
    assert ("lm_eval:letters", "search") not in whole.measurements


def test_tasks_that_cannot_be_loaded_are_one_line(chooser, study_tree, task_file, tmp_path):
    store = Store.open(f"sqlite:///{tmp_path}/autoq.db")
    path = task_file()
    path.write_text(path.read_text() + "process_docs: !function os.system\n")
    for source, fragment in ((path, "must not use YAML tags"), (tmp_path / "none.yaml", "No such file")):
        with pytest.raises(DataRefused) as refused:
            create_study(store, study(study_tree, chooser, source, ["lm_eval:letters", SIZE]))
        assert str(refused.value).startswith("tasks.letters: lm-eval cannot load")
        assert fragment in str(refused.value)
        assert "\n" not in str(refused.value)
    spec = study(study_tree, chooser, path, ["lm_eval:no_such_task_anywhere", SIZE])
    with pytest.raises(DataRefused, match=r"tasks\.no_such_task_anywhere: lm-eval cannot load"):
        create_study(store, spec)
