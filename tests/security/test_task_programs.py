"""Tasks of lm-eval are programs: who may name one, and what one may do all the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from autoq.errors import DataRefused, SpecError
from autoq.service.auth import OPEN, Asker
from autoq.service.settings import Sources
from autoq.service.sources import check_sources
from autoq.spec import build_spec
from autoq.tasks import source_of

lm_eval = pytest.importorskip("lm_eval")

ADA = Asker("ada", "submitter", 1)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """Fields -> a task's file on two examples."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"q": f"q{i}", "a": "yes"}) + "\n" for i in range(2)))

    def write(**fields: object) -> Path:
        told = {
            "task": "mine",
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": str(rows)},
            "test_split": "train",
            "output_type": "loglikelihood",
            "doc_to_text": "{{q}}",
            "doc_to_target": "{{a}}",
            "metric_list": [{"metric": "acc"}],
        }
        path = tmp_path / "task.yaml"
        path.write_text(yaml.safe_dump(told | fields))
        return path

    return write


def loaded(path: Path):
    from autoq.tasks.kinds.lm_eval import _loaded

    _loaded.cache_clear()
    return _loaded(str(path), "tasks.mine")


ESCAPES = (
    "{{ cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}",
    "{{ q.__init__.__func__.__globals__ }}",
    "{{ (q|attr('__class__')).mro() }}",
)


@pytest.mark.parametrize("escape", ESCAPES)
def test_templates_reach_nothing(task, tmp_path, escape):
    canary = tmp_path / "canary"
    with pytest.raises(DataRefused, match=r"is unsafe|has no attribute|is not safely callable"):
        loaded(task(doc_to_text=escape.replace("CANARY", str(canary)) + "{{q}}"))
    assert not canary.exists()


def test_without_the_sandbox_a_template_does_run_code(tmp_path):
    """The control: the same template in the environment that lm-eval brings."""
    from jinja2 import Environment

    canary = tmp_path / "canary"
    Environment().from_string(ESCAPES[0].replace("CANARY", str(canary))).render()
    assert canary.exists()


def test_ordinary_templates_do_what_they_did(task):
    found = loaded(task(doc_to_text="{{ q | regex_replace('q', 'Q') }}: {% if a %}{{ a.upper() }}{% endif %}"))
    assert [found.doc_to_text(doc) for doc in found.eval_docs] == ["Q0: YES", "Q1: YES"]


@pytest.mark.parametrize(
    ("fields", "fragment"),
    [
        ({"metric_list": [{"metric": "METRIC"}]}, "is no metric of lm-eval itself"),
        ({"metric_list": [{"metric": "acc", "hf_evaluate": True}]}, "is no metric of lm-eval itself"),
        ({"metric_list": ["acc"]}, "is no metric of lm-eval itself"),
        ({"use_prompt": "other.yaml:mine"}, "'use_prompt' is not taken from a file"),
        ({"include": "other.yaml"}, "'include' is not taken from a file"),
        ({"class": "os"}, "'class' is not taken from a file"),
        ({"custom_dataset": "x"}, "'custom_dataset' is not taken from a file"),
        ({"process_docs": "x"}, "'process_docs' is not taken from a file"),
        ({"unsafe_code": True}, "'unsafe_code' is not taken from a file"),
        ({"task": ["arc_easy"]}, "must be a mapping with a name under 'task'"),
    ],
)
def test_a_task_brings_no_code_along(task, tmp_path, fields, fragment):
    canary, script = tmp_path / "canary", tmp_path / "metric" / "metric.py"
    script.parent.mkdir()
    script.write_text(f"open({str(canary)!r}, 'w').close()\nimport evaluate\n")
    text = json.dumps(fields).replace("METRIC", str(script.parent))
    with pytest.raises(DataRefused) as refused:
        loaded(task(**json.loads(text)))
    assert fragment in str(refused.value)
    assert not canary.exists()


def test_a_tag_in_a_task_runs_nothing(task, tmp_path):
    canary = tmp_path / "canary"
    (tmp_path / "own.py").write_text(f"open({str(canary)!r}, 'w').close()\ndef f(x): return x\n")
    path = task()
    path.write_text(path.read_text() + "process_docs: !function own.f\n")
    with pytest.raises(DataRefused, match="must not use YAML tags"):
        loaded(path)
    assert not canary.exists()
    lm_eval.tasks.TaskManager(include_defaults=False).load([str(path)])  # the control: as lm-eval itself reads it
    assert canary.exists()


@pytest.mark.parametrize("name", ["/srv/task.yaml", "task.yaml", "../task.yml", "a/b", "", "x" * 101, "a b", "é"])
def test_an_objective_names_no_file(name, tmp_path, monkeypatch):
    from autoq import plugins
    from autoq.tasks import TaskKind

    kind = plugins.load("tasks.kinds", "lm_eval", TaskKind)
    with pytest.raises(SpecError):
        source_of(f"lm_eval:{name}", kind, build_spec({"model": {"id": "demo:smollm2"}, "objectives": ["size_bytes"]}))


def test_what_is_no_task_of_lm_eval_is_no_file_either(task, tmp_path, monkeypatch):
    """lm-eval itself takes a name that it does not know for a path, and runs what it finds there."""
    from autoq.tasks.kinds import lm_eval as kind

    # As the whole list, which takes seconds to make: it does not know these names either.
    monkeypatch.setattr(kind, "_own_tasks", lambda: lm_eval.tasks.TaskManager(include_defaults=False))
    monkeypatch.chdir(tmp_path)
    for name in ("task.YAML", "task", "folder"):
        (tmp_path / name).write_text(task().read_text())
        for path in (Path(name), tmp_path / name):
            with pytest.raises(DataRefused, match="it has no such task"):
                loaded(path)
    assert lm_eval.tasks.TaskManager(include_defaults=False).load(["task.YAML"])["tasks"]  # the control


@pytest.mark.parametrize("hub", [False, True])
@pytest.mark.parametrize("suffix", ["yaml", "yml", "YAML"])
def test_a_users_spec_names_no_program(tmp_path, hub, suffix):
    (tmp_path / f"task.{suffix}").write_text("task: mine")
    sources = Sources(data=(tmp_path,), hub=hub)
    model = {"model": {"id": "demo:smollm2"}}
    named = {"tasks": {"mine": {"source": f"{tmp_path}/task.{suffix}"}}, "objectives": ["lm_eval:mine", "size_bytes"]}
    direct = {"objectives": [f"lm_eval:{tmp_path}/task.{suffix}", "size_bytes"]}
    report = {"report": [f"lm_eval:{tmp_path}/task.{suffix}"]}
    for fields, field in ((named, "tasks.mine.source"), (direct, "objectives"), (report, "objectives")):
        with pytest.raises(SpecError, match=f"^{field}: "):
            check_sources(build_spec(model | fields), ADA, sources)
        check_sources(build_spec(model | fields), OPEN, sources)


def test_lm_evals_own_tasks_are_of_the_hub():
    spec = build_spec({"model": {"id": "demo:smollm2"}, "objectives": ["lm_eval:arc_easy", "size_bytes"]})
    check_sources(spec, ADA, Sources(hub=True))
    with pytest.raises(SpecError, match=r"^objectives: lm_eval:arc_easy: must name a task of the study"):
        check_sources(spec, ADA, Sources())


def test_a_link_in_a_users_folder_leads_nowhere(tmp_path):
    """Also where the link is inside of the folder that is named, or further down."""
    (tmp_path / "secret").write_text("x")
    root = tmp_path / "data"
    (root / "ada" / "deep").mkdir(parents=True)
    (root / "ada" / "text.txt").write_text("x")
    spec = build_spec({"model": {"id": "demo:smollm2"}, "data": {"source": f"{root}/ada"}})
    check_sources(spec, ADA, Sources(data=(root,)))
    inside = root / "ada" / "deep" / "inside.txt"
    inside.symlink_to(root / "ada" / "text.txt")  # as the hub's own cache has its files
    check_sources(spec, ADA, Sources(data=(root,)))
    for target in (tmp_path / "secret", tmp_path, "../../../secret", "/etc"):
        link = root / "ada" / "deep" / "link.txt"
        link.symlink_to(target)
        with pytest.raises(SpecError, match=r"^data\.source: "):
            check_sources(spec, ADA, Sources(data=(root,)))
        link.unlink()
