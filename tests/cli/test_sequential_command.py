"""`autoq sequential` on a real study of a small model that was trained: a trial of its own, exported and verified."""

import json

import pytest
from typer.testing import CliRunner

from autoq.cli import app
from autoq.search.controller import create_study, run_study
from autoq.search.lineage import unsequenced
from autoq.search.sequencing import is_better, sequence_trial
from autoq.spec import build_spec
from autoq.store import Store, results

KL, SIZE = "kl_nats_per_token", "size_bytes"


@pytest.fixture(scope="module")
def folder(trained_models, trained_model_dir, tmp_path_factory):
    """A folder with the database of a finished study and its cache."""
    folder = tmp_path_factory.mktemp("sequential-study")
    (folder / "text.txt").write_text(trained_models.documentation())
    spec = {
        "name": "tiny",
        "model": {"id": str(trained_model_dir("llama")), "dtype": "bfloat16"},
        "data": {
            "source": str(folder / "text.txt"),
            **{f"{part}_tokens": 512 for part in ("calibration", "search", "report")},
            "window_tokens": 64,
        },
        "target": {"name": "torch-cpu"},
        "space": {"schemes": ["keep", "gptq-int4-g32", "rtn-int8-channel-sym"]},
        "objectives": [KL, SIZE],
        "sampler": {"name": "random", "seeds": 0},
        "budget": {"trials": 8, "stop_confidence": None},
        "workers": {"cpus": 1},
    }
    with pytest.MonkeyPatch.context() as patch, Store.open(str(folder / "autoq.db")) as store:
        patch.setenv("AUTOQ_CACHE", str(folder / "cache"))
        run_study(store, create_study(store, build_spec(spec)).id)
        patch.chdir(folder)
        yield folder


@pytest.fixture
def autoq(folder):
    runner = CliRunner(env={"COLUMNS": None, "NO_COLOR": None, "FORCE_COLOR": None})
    return lambda *arguments: runner.invoke(app, list(arguments))


@pytest.fixture
def parent(folder):
    """The number of a trial that holds all three schemes, its last layers made by gptq or not."""
    with Store.open(str(folder / "autoq.db")) as store:
        study = store.study("tiny")
        for trial in store.trials(study.id, states=("complete",), with_assignments=True):
            if len(set(map(str, trial.assignment.values()))) == 3 and trial.parent is None:
                return trial.number
    raise AssertionError("no such trial")


def test_a_trial_in_sequence_is_measured_listed_exported_and_verified(autoq, parent, tmp_path):
    done = autoq("sequential", "tiny", str(parent), "--json", "--quiet")
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["origin"], found["parent"], found["state"]) == ("sequential", parent, "complete")
    assert found["derivation"]["tokens"] == 512
    assert found["measurements"][KL]["part"] == "report"
    assert found["search"][KL]["part"] == "search"
    before = json.loads(autoq("trials", "tiny", "--json").stdout)["trials"][parent]
    assert found["assignment"] == before["assignment"]
    assert found["hash"] != before["hash"]
    assert found["measurements"][SIZE]["value"] == before["measurements"][SIZE]["value"]
    differ = json.loads(autoq("diff", "tiny", str(parent), str(found["number"]), "--json").stdout)["layers"]
    assert len(differ) == found["derivation"]["layers"]
    assert all("#" in pair["b"] and pair["a"].startswith(("gptq", "rtn")) for pair in differ.values())
    # Once more it is the same trial, and words say which of the two is better.
    again = autoq("sequential", "tiny", str(parent))
    assert again.exit_code == 0, again.stderr
    assert f"this is trial {found['number']}, which was made likewise before" in " ".join(again.stderr.split())
    assert "loading" not in again.stderr
    assert f"trial {found['number']} is trial {parent}, quantized in sequence" in again.stdout
    with Store.open("autoq.db") as store:
        better = is_better(store, store.trial(store.study("tiny").id, found["number"]))
    value, was = found["search"][KL]["value"], before.get("search", {}).get(KL, before["measurements"][KL])["value"]
    assert better == (value < was)
    assert ("it is no better than" in again.stdout) == (not better)
    out = tmp_path / "out"
    assert autoq("export", "tiny", str(found["number"]), "--out", str(out)).exit_code == 0
    checked = autoq("verify", str(out), "--json")
    assert checked.exit_code == 0, checked.stdout + checked.stderr
    checks = {check["name"]: check["ok"] for check in json.loads(checked.stdout)["checks"]}
    assert checks["formats"] and checks["outputs"] and checks[KL] and checks["bytes"]


@pytest.mark.parametrize(
    ("trial", "message"),
    [
        ("unquantized", "no layer of the assignment is quantized"),
        ("99", "has no trial 99"),
        ("nothing", "has no trial 'nothing'"),
    ],
)
def test_what_cannot_be_is_one_line(autoq, folder, trial, message):
    done = autoq("sequential", "tiny", trial, "--quiet")
    assert done.exit_code == 2
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    with Store.open(str(folder / "autoq.db")) as store:
        assert store.study("tiny").state == "finished"


def test_a_trial_in_sequence_is_not_one_to_start_from(autoq, folder, parent):
    with Store.open(str(folder / "autoq.db")) as store:
        found = sequence_trial(store, store.study("tiny").id, parent)
    done = autoq("sequential", "tiny", str(found.number))
    assert done.exit_code == 2
    assert f"trial {found.number} of 'tiny' was quantized in sequence already, from trial {parent}" in done.stderr


def test_a_worse_one_is_stored_and_said_to_be(autoq, folder, parent):
    with Store.open(str(folder / "autoq.db")) as store:
        study = store.study("tiny")
        found = sequence_trial(store, study.id, parent)
        with store._database.writing() as connection:
            connection.exec_driver_sql(
                f"update measurements set value = 99 where trial_id = {found.id} and part = 'search' "
                f"and objective = '{KL}'"
            )
            results.seal(connection, found.id)
        assert is_better(store, store.trial(study.id, found.number)) is False
    told = autoq("sequential", "tiny", str(parent)).stdout
    assert f"it is no better than trial {parent} on the search part: export that one" in told


def test_all_of_the_frontier_are_done_once_each(autoq, folder):
    with Store.open(str(folder / "autoq.db")) as store:
        study = store.study("tiny")
        wanted = unsequenced(store, study.id)
        assert wanted
    done = autoq("sequential", "tiny", "--json")
    assert done.exit_code == 0, done.stderr
    made = json.loads(done.stdout)["trials"]
    refused = [number for number in wanted if f"trial {number} is left out" in " ".join(done.stderr.split())]
    assert [trial["parent"] for trial in made] == [number for number in wanted if number not in refused]
    assert all(trial["origin"] == "sequential" and trial["measurements"][KL]["part"] == "report" for trial in made)
    with Store.open(str(folder / "autoq.db")) as store:
        for trial in store.frontier(study.id, with_assignments=True):
            if any(trial.number == other["number"] for other in made):
                assert trial.assignment.trained
    again = autoq("sequential", "tiny", "--quiet")
    if not refused:
        assert again.exit_code == 2
        assert "is left to be quantized in sequence" in again.stderr


def test_several_go_on_past_one_that_cannot_be(autoq, parent):
    done = autoq("sequential", "tiny", "unquantized", str(parent), str(parent), "--json")
    assert done.exit_code == 0, done.stderr
    assert [trial["parent"] for trial in json.loads(done.stdout)["trials"]] == [parent]
    assert "is left out: no layer of the assignment is quantized" in " ".join(done.stderr.split())
