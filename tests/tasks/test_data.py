"""Labelled examples: what is read, that its parts are disjoint, and one line for what cannot be used."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoq.errors import DataRefused, SpecError
from autoq.layer import ModelInfo
from autoq.search.setup import pose
from autoq.spec import TaskSpec, build_spec
from autoq.tasks import Source
from autoq.tasks.data import read_rows, split
from autoq.tasks.kinds.choices import Choices
from autoq.tasks.kinds.labels import Labels

INFO = ModelInfo("Tiny", "classification", "float32", 300, 64, (), 0, ("bad", "good"))
COLUMNS = {"text": "the text", "label": "its class"}


def source(path, **more):
    counts = {"search_examples": 1, "report_examples": 1}
    return Source("mine", TaskSpec(source=str(path), **(counts | more)), 0)


@pytest.mark.parametrize("mark", ["", "\ufeff"])
def test_jsonl_and_csv_give_the_same_rows(tmp_path, mark):
    rows = [('a, "b"\nc', "good"), ("naïve\u2028text", "bad")]
    lines = [json.dumps({"sentence": text, "y": label, "more": 1}, ensure_ascii=False) for text, label in rows]
    (tmp_path / "rows.jsonl").write_text(mark + "\n\n".join(lines), encoding="utf-8")
    quoted = [f'"{text.replace(chr(34), 2 * chr(34))}",{label}' for text, label in rows]
    (tmp_path / "rows.csv").write_text(mark + "\n".join(["sentence,y", *quoted]), encoding="utf-8", newline="")
    for name in ("rows.jsonl", "rows.csv"):
        task = source(tmp_path / name, columns={"text": "sentence", "label": "y"})
        assert [tuple(row.values()) for _, row in read_rows(task, COLUMNS)] == rows
        found = Labels().read(task, INFO)
        assert sorted((row["text"], row["label"]) for row in (*found.search, *found.report)) == sorted(
            (text, ["bad", "good"].index(label)) for text, label in rows
        )


def test_a_saved_dataset_is_read(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": ["one", "two"], "label": [0, 1]}).save_to_disk(str(tmp_path / "saved"))
    found = Labels().read(source(tmp_path / "saved"), INFO)
    assert {row["text"] for row in (*found.search, *found.report)} == {"one", "two"}


@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 5), st.integers(0, 2**32 - 1))
def test_parts_are_disjoint_and_the_search_does_not_depend_on_the_report(search, report, more, seed):
    rows = [{"text": str(i // 2)} for i in range(2 * (search + report + more))]  # every row twice
    task = Source("mine", TaskSpec(source="x", search_examples=search, report_examples=report), seed)
    found = split(task, rows)
    texts = [row["text"] for row in (*found.search, *found.report)]
    assert (len(found.search), len(found.report), len(set(texts))) == (search, report, search + report)
    fewer = Source("mine", TaskSpec(source="x", search_examples=search, report_examples=1), seed)
    assert split(fewer, rows).search == found.search
    with pytest.raises(DataRefused, match=f"has {search + report - 1} examples that differ"):
        split(task, rows[: 2 * (search + report - 1)])


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("rows.jsonl", b"", "has 0 examples that differ, and 2 are needed"),
        ("rows.jsonl", b'{"text": "a", "label": 0', "line 1, is not JSON"),
        ("rows.jsonl", b"[1]", "line 1, is no JSON object"),
        (
            "rows.jsonl",
            b'{"text": "a", "label": 0}\n{"text": "a"}',
            "line 2, has no column 'label' (its class); it has text",
        ),
        ("rows.jsonl", b'{"text": "\xe9", "label": 0}', "is not UTF-8 (byte 10 of 25): convert it first"),
        (
            "rows.jsonl",
            b'{"text": "a", "label": "fine"}',
            "label 'fine' is no class of the model; choose from bad",
        ),
        ("rows.jsonl", b'{"text": "a", "label": 2}', "label '2' is no class"),
        ("rows.jsonl", b'{"text": "a", "label": true}', "label 'True' is no class"),
        ("rows.jsonl", b'{"text": " ", "label": 1}', "text must be text that is not empty"),
        ("rows.csv", b"text,label\na,1,2\n", "line 2, has other fields than the header"),
        ("rows.csv", b"text,label\na\n", "line 2, has other fields than the header"),
        ("rows.csv", b'text,label\n"a"b,1\n', "is not CSV"),
        ("rows.parquet", b"PAR1", "is neither a .jsonl nor a .csv file"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, name, content, fragment):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataRefused) as refused:
        Labels().read(source(tmp_path / name), INFO)
    assert fragment in str(refused.value)
    assert str(refused.value).startswith("tasks.mine")
    assert "\n" not in str(refused.value)


def test_a_file_that_is_not_there_and_a_column_that_the_task_does_not_have(tmp_path):
    with pytest.raises(DataRefused, match=r"is not there; give a \.jsonl or a \.csv file"):
        list(read_rows(source(tmp_path / "none.jsonl"), COLUMNS))
    (tmp_path / "rows.csv").write_text("text,label\na,1\n")
    with pytest.raises(DataRefused, match="no column 'sentence'; choose from text, label"):
        list(read_rows(source(tmp_path / "rows.csv", columns={"sentence": "text"}), COLUMNS))


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"prompt": 1, "choices": ["a", "b"], "answer": 0}, "prompt must be text"),
        ({"prompt": "x", "choices": "ab", "answer": 0}, "choices must be a list"),
        ({"prompt": "x", "choices": ["a", "a"], "answer": 0}, "two different texts"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": 2}, "answer must be 0 to 1"),
        ({"prompt": "x", "choices": ["a", "b"], "answer": "c"}, "answer must be 0 to 1"),
    ],
)
def test_questions_without_an_answer_are_refused(row, fragment):
    with pytest.raises(ValueError, match=fragment):
        Choices().check(row, INFO)
    assert Choices().check({"prompt": "", "choices": ["a", "b"], "answer": "b"}, INFO)["answer"] == 1


MINE = {"mine": {"source": "rows.jsonl"}}


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"objectives": ["accuracy"]}, "accuracy: it needs labelled examples: name them under tasks"),
        ({"objectives": ["accuracy:other"], "tasks": MINE}, "no task 'other'; choose from mine"),
        ({"objectives": ["accuracy"], "tasks": {**MINE, "two": MINE["mine"]}}, "say on which task, behind a colon"),
        ({"objectives": ["kl_nats_per_token:mine"], "tasks": MINE}, "is not measured on labelled examples"),
        ({"objectives": ["multiple_choice_accuracy"], "tasks": MINE}, "it needs a causal model"),
        ({"objectives": ["acuracy:mine"], "tasks": MINE}, "no objective 'acuracy'; did you mean 'accuracy'?"),
        ({"objectives": ["size_bytes"], "report": ["bits_per_weight"]}, "put it under objectives"),
        ({"objectives": ["size_bytes"], "report": ["nothing"]}, "no objective 'nothing'"),
        ({"objectives": ["size_bytes"], "tasks": {"a:b": MINE["mine"]}}, "must start with a letter or digit"),
        ({"objectives": ["size_bytes"], "tasks": {"a": {"source": "x", "columnz": {}}}}, "did you mean 'columns'"),
    ],
)
def test_specs_that_do_not_fit(tiny_model_dir, fields, fragment):
    tree = {"model": {"id": str(tiny_model_dir("bert-classifier"))}, "target": {"name": "generic"}}
    with pytest.raises(SpecError) as refused:
        pose(build_spec(tree | fields))
    assert fragment in str(refused.value)
