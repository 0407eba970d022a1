"""`autoq sensitivity`: a table for people, a document for programs, and nothing made twice."""

import csv
import json

import pytest

import autoq as package
from autoq.display.sensitivity import module_kind
from autoq.errors import AutoQError
from autoq.search.survey import Point, Survey
from autoq.store import Store

LAYERS = [f"model.layers.{i}.{name}" for i in range(8) for name in ("self_attn.q_proj", "mlp.down_proj")]
SURVEY = Survey(
    model="some/model",
    unit="nats/token",
    layers={
        layer: {"rtn-int4-g64": 0.01 * (i + 1), "rtn-int8-channel-sym": 1e-4, "keep": 0.0}
        for i, layer in enumerate(LAYERS)
    },
    sizes={layer: {"rtn-int4-g64": 500_000, "rtn-int8-channel-sym": 1_000_000, "keep": 2_000_000} for layer in LAYERS},
    kept=dict.fromkeys(LAYERS, 2_000_000),
    frontier=[
        Point(8e6, 8e6, 4.0, 1.36, True, "uniform-int4", 1.36),
        Point(12e6, 11.9e6, 6.0, 0.41, False),
        Point(16e6, 16e6, 8.0, 0.0016, True),
    ],
)


@pytest.fixture
def survey(monkeypatch):
    calls = []

    def survey(store, spec, observer):
        calls.append(spec)
        observer.stage("quantize", 1)
        return SURVEY

    monkeypatch.setattr("autoq.search.survey.survey", survey)
    return calls


def test_kinds_of_modules():
    names = ["model.layers.3.self_attn.q_proj", "transformer.h.11.mlp.c_proj", "lm_head", "encoder.layer.0.1.dense"]
    assert [module_kind(name) for name in names] == ["self_attn.q_proj", "mlp.c_proj", "lm_head", "dense"]


def test_the_table_fits_a_terminal_and_says_that_it_predicts(autoq, survey):
    result = autoq("sensitivity", "demo", "--set", "data.seed=3")
    assert result.exit_code == 0, result.stderr
    lines = [line.rstrip() for line in result.stdout.splitlines()]
    assert max(map(len, lines)) <= 80
    assert "… 6 more" in lines
    assert "   8.000 MB        4.000            1.36  1.36  uniform-int4".strip() in [line.strip() for line in lines]
    assert [line for line in lines if "≤0.41" in line]
    assert "These are predictions, not measurements; autoq search measures." in lines
    assert survey[0].data.seed == 3
    assert result.stderr.splitlines() == ["checking demo against demo:smollm2 and torch-cpu", "quantizing layers"]


def test_shares_are_of_the_scheme(autoq, survey):
    text = autoq("sensitivity", "demo", "--quiet").stdout
    row = next(line.split() for line in text.splitlines() if line.startswith("mlp.down_proj"))
    assert row == ["mlp.down_proj", "0.72", "53%", "0.0008", "50%", "0", "0%"]
    assert next(line.split() for line in text.splitlines() if line.startswith("all"))[1:] == ["1.36", "0.0016", "0"]


def test_one_document(autoq, survey, tmp_path):
    result = autoq("sensitivity", "demo", "--json", "--quiet", "--out", "found.json")
    document = json.loads(result.stdout)
    assert result.stderr == ""
    assert json.loads((tmp_path / "found.json").read_text()) == document
    assert (document["model"], document["kind"], document["unit"]) == ("some/model", "predicted", "nats/token")
    assert document["layers"][LAYERS[0]]["rtn-int4-g64"] == 0.01
    assert document["frontier"][0] == {
        "budget_bytes": 8e6,
        "size_bytes": 8e6,
        "bits_per_weight": 4.0,
        "loss": 1.36,
        "exact": True,
        "baseline": "uniform-int4",
        "baseline_loss": 1.36,
    }


def test_rows_of_a_file(autoq, survey, tmp_path):
    assert autoq("sensitivity", "demo", "--out", "found.csv").exit_code == 0
    rows = list(csv.DictReader((tmp_path / "found.csv").read_text().splitlines()))
    assert len(rows) == 3 * len(LAYERS)
    assert rows[0]["layer"] == LAYERS[0]
    assert float(rows[0]["predicted_loss_per_byte_saved"]) == pytest.approx(0.01 / 1.5e6)
    assert [row["predicted_loss_per_byte_saved"] for row in rows if row["scheme"] == "keep"] == [""] * len(LAYERS)


@pytest.mark.parametrize(
    ("arguments", "code", "fragment"),
    [
        (["demo", "--out", "found.txt"], 2, "must end with .json or .csv"),
        (
            ["demo", "--out", "nowhere/found.csv", "--quiet"],
            2,
            "--out 'nowhere/found.csv': there is no folder 'nowhere'",
        ),
        (["nowhere.yaml"], 2, "no spec file 'nowhere.yaml'"),
        (["demo", "--set", "sampler.sed=1"], 2, "did you mean 'seed'?"),
    ],
)
def test_mistakes_end_in_one_line(autoq, survey, arguments, code, fragment):
    result = autoq("sensitivity", *arguments)
    assert (result.exit_code, result.stdout) == (code, "")
    assert fragment in result.stderr
    assert result.stderr.count("\n") == 1


def test_an_interrupt_says_how_to_go_on(autoq, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("autoq.search.survey.survey", interrupted)
    result = autoq("sensitivity", "demo", "--quiet")
    assert result.exit_code == 130
    assert result.stderr == "autoq: interrupted; what was found is kept, the same command goes on\n"


def test_in_python_it_is_a_frame(survey, database):
    frame = package.sensitivity("demo")
    assert frame.shape == (len(LAYERS), 3)
    assert frame.loc[LAYERS[3], "rtn-int4-g64"] == pytest.approx(0.04)
    assert (frame.attrs["unit"], frame.attrs["kind"]) == ("nats/token", "predicted")
    assert frame.attrs["frontier"][1]["exact"] is False


@pytest.mark.slow
def test_a_search_takes_over_what_was_found(autoq, tiny_model_dir, tmp_path, database, monkeypatch):
    """With a real model: the study after it neither calibrates into another file nor quantizes to predict."""
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.yaml").write_text(
        f"name: tiny\nmodel: {{id: '{tiny_model_dir('llama')}'}}\ntarget: {{name: generic}}\n"
        "data: {calibration_tokens: 64, search_tokens: 64, report_tokens: 64, window_tokens: 32}\n"
        "space: {schemes: [rtn-int3-g32, rtn-int4-g32]}\nobjectives: [kl_nats_per_token, size_bytes]\n"
        "budget: {trials: 12}\nsampler: {seeds: 2}\n",
        encoding="utf-8",
    )
    found = autoq("sensitivity", "tiny.yaml", "--json")
    assert found.exit_code == 0, found.stderr
    assert "quantizing layers" in found.stderr
    searched = autoq("search", "tiny.yaml", "--json")
    assert searched.exit_code == 0, searched.stderr
    assert "quantizing layers" not in searched.stderr
    with Store.open(database) as store:
        assert store.table(store.study("tiny").id, "sensitivity") == json.loads(found.stdout)["layers"]


def test_what_fails_fails(autoq, monkeypatch):
    def broken(*_):
        raise AutoQError("sensitivities: no room")

    monkeypatch.setattr("autoq.search.survey.survey", broken)
    result = autoq("sensitivity", "demo", "--quiet")
    assert (result.exit_code, result.stderr) == (1, "autoq: sensitivities: no room\n")
