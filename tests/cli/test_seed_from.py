"""`autoq search --seed-from`: a picked trial goes into another study, and what is no recipe writes nothing."""

import json

import pytest

from autoq.store import Store


@pytest.fixture
def spec(tiny_model_dir, tmp_path, database):
    path = tmp_path / "tiny.yaml"
    path.write_text(
        f"name: tiny\nmodel: {{id: '{tiny_model_dir('llama')}'}}\ntarget: {{name: generic}}\n"
        "data: {calibration_tokens: 64, search_tokens: 64, report_tokens: 64, window_tokens: 32}\n"
        "space: {schemes: [rtn-int3-g32, rtn-int4-g32]}\nobjectives: [kl_nats_per_token, size_bytes]\n"
        "budget: {trials: 11, report_points: 1}\nsampler: {seeds: 2}\n",
        encoding="utf-8",
    )
    return str(path)


def test_a_picked_trial_starts_another_study(autoq, spec, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    first = autoq("search", spec, "--quiet")
    assert first.exit_code == 0, first.stderr
    picked = json.loads(
        autoq("pick", "tiny", "--best", "kl_nats_per_token", "--max", "size_bytes=1MB", "--json").stdout
    )
    mixed = picked["assignment"] | {"model.layers.0.mlp.up_proj": "rtn-int8-channel-sym"}
    (tmp_path / "mine.json").write_text(json.dumps(picked | {"assignment": mixed}), encoding="utf-8")
    again = autoq("search", spec, "--quiet", "--name", "again", "--seed-from", "mine.json")
    assert again.exit_code == 0, again.stderr
    found = json.loads(autoq("trials", "again", "--json").stdout)["trials"]
    (mine,) = [trial for trial in found if trial["baseline"] == "recipe:mine"]
    assert (mine["assignment"], mine["state"]) == (mixed, "complete")
    assert "recipe:mine" in autoq("frontier", "again").stdout


def test_what_is_no_recipe_writes_nothing(autoq, spec, database):
    result = autoq("search", spec, "--quiet", "--seed-from", "nowhere.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "autoq: recipe 'nowhere.json': No such file or directory\n"
    with Store.open(database) as store:
        assert [summary.name for summary in store.studies()] == ["demo"]
