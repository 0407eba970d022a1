"""`autoq recover`: what it prints and refuses, and how a trained trial is shown by the other commands."""

import json

import pytest

from autoq.assignment import Assignment
from autoq.measurement import Measurement
from autoq.store import Descent, Store

DIGEST = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def trained(database):
    """Trial 9 of the filled database: trial 5, with one layer trained."""
    with Store.open(database) as store:
        study = store.study("demo")
        parent = store.trial(study.id, 5)
        assignment = Assignment(parent.assignment, {"model.layers.0.q_proj": DIGEST})
        trial = store.start_trial(study.id, 9, assignment, "recover", descent=Descent(5, {"steps": 7}, {DIGEST: b"x"}))
        found = [
            Measurement("kl_nats_per_token", 0.3, "nats/token", "measured", "search", 0.01, 2048),
            Measurement("size_bytes", 72e6, "bytes", "computed", "search"),
            Measurement("latency_decode_ms", 11.0, "ms", "predicted", "search"),
        ]
        assert store.finish_trial(trial.id, 1, found, {}, 1.5, "local")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent", "1"], "no study 'absent'; there are demo"),
        (["demo", "99"], "study 'demo' has no trial 99; its trials are 0 to 8"),
        (["demo", "none-such"], "has no trial 'none-such'; give a number, or a baseline: "),
        (["demo", "1", "--steps", "0"], "steps must be from 1 to 1000000 (got 0)"),
        (["demo", "1", "--windows", "0"], "windows must be from 1 to 1000000 (got 0)"),
        (["demo", "1", "--tokens", "0"], "tokens must be at least 1 (got 0)"),
        (["demo", "1", "--how", "layers"], "how must be one of model, blocks (got 'layers')"),
        (["demo", "1", "--rate", "-1"], "rate must be above 0 and below 1000 (got -1)"),
        (["demo", "unquantized"], "trial 0 of 'demo' has nothing to train: integer schemes and codebooks can be"),
        (["demo", "8"], "trial 8 of 'demo' is failed; only a complete one can be trained"),
    ],
)
def test_what_cannot_be_trained_is_said_in_one_line(autoq, arguments, message):
    done = autoq("recover", *arguments)
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.startswith("autoq: ")
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


def test_help_has_examples(autoq):
    done = autoq("recover", "--help")
    assert done.exit_code == 0
    assert "autoq recover demo 23 --steps 200" in done.stdout


def test_trials_and_frontier_name_the_parent(autoq, trained):
    for command in ("trials", "frontier"):
        done = autoq(command, "demo")
        assert "recover 5" in done.stdout, done.stdout
    listed = json.loads(autoq("trials", "demo", "--json").stdout)["trials"]
    found = listed[9]
    assert (found["parent"], found["origin"], found["derivation"]) == (5, "recover", {"steps": 7})
    assert found["assignment"] == listed[5]["assignment"]
    assert found["hash"] != listed[5]["hash"]


def test_pick_takes_it_and_says_from_what_it_was_trained(autoq, trained):
    done = autoq("pick", "demo", "--max", "size_bytes=75MB", "--best", "kl_nats_per_token", "--json")
    found = json.loads(done.stdout)
    assert (found["number"], found["parent"]) == (9, 5)
    assert "parent: 5\n" in autoq("pick", "demo", "--max", "size_bytes=75MB").stdout


def test_diff_with_the_parent_names_the_trained_layers(autoq, trained):
    found = json.loads(autoq("diff", "demo", "5", "9", "--json").stdout)
    assert found["layers"] == {"model.layers.0.q_proj": {"a": "rtn-int3-g64", "b": "rtn-int3-g64#01234567"}}
    assert "1 layer differs" in autoq("diff", "demo", "5", "9").stdout
