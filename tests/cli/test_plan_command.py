"""`autoq plan`: a table of 80 columns, one JSON document, and refusals of one line. Nothing is run or written."""

import json

import pytest
from typer.testing import CliRunner

from autoq.cli import app


@pytest.fixture
def autoq(tmp_path, monkeypatch, tiny_model_dir):
    monkeypatch.chdir(tmp_path)
    spec = {
        "name": "tiny",
        "model": {"id": str(tiny_model_dir("llama"))},
        "target": {"name": "generic"},
        "space": {"schemes": ["rtn-int4-g32", "keep"]},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        "workers": {"cpus": 1},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    (tmp_path / "short.yaml").write_text(json.dumps({**spec, "model": {"id": "short"}}))
    (tmp_path / "short").mkdir()
    return lambda *words: CliRunner().invoke(app, ["plan", *words])


def test_the_table_fits_a_terminal_and_writes_nothing(autoq, tmp_path):
    before = {file.name for file in tmp_path.iterdir()}
    result = autoq("spec.yaml", "--trials", "7")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("Predicted for tiny: 7 trials of")
    for what in ("quantizing the bank, CPU", "a trial", "search", "report", "database", "memory of a worker"):
        assert any(line.startswith(what) for line in lines)
    assert {file.name for file in tmp_path.iterdir()} == before


def test_one_document(autoq):
    result = autoq("spec.yaml", "--json", "--workers", "8", "--quiet")
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (document["kind"], document["workers"], document["trials"], document["against"]) == (
        "predicted",
        8,
        96,
        None,
    )


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["nosuch.yaml"], "nosuch.yaml"),
        (["short.yaml"], "has no config.json"),
        (["spec.yaml", "--workers", "0"], "workers.count: must be at least 1 (got 0)"),
        (["spec.yaml", "--trials", "0"], "budget.trials: must be at least 1 (got 0)"),
        (["spec.yaml", "--set", "space.schemes=[]"], "space"),
        (["spec.yaml", "--against", "demo"], "no database at 'autoq.db'"),
    ],
)
def test_refusals_are_one_line(autoq, words, line):
    result = autoq(*words, "--quiet")
    assert result.exit_code == 2, result.output
    assert line in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert not result.stdout
