"""Making a trial better by request: what is queued, what is refused, and what a real runner makes of it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys

import pytest
from starlette.testclient import TestClient

from autoq.search import holding
from autoq.search.controller import create_study, run_study
from autoq.search.observer import Observer
from autoq.search.training import HOW, MAX_STEPS
from autoq.service import requests, runner, schemas
from autoq.service.app import create_app
from autoq.service.settings import Settings
from autoq.spec import build_spec
from autoq.store import Descent, Store

KL, SIZE = "kl_nats_per_token", "size_bytes"
TRIALS = "/api/v1/studies/mine/trials"
DIGEST = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def client(server):
    return server.client("ada-submitter")


def job_of(server, study="mine"):
    return server.store.table(server.store.study(study).id, "job")


def test_a_trial_is_queued_to_be_quantized_in_sequence(server, client):
    answer = client.post(f"{TRIALS}/3/sequential")
    assert answer.status_code == 200, answer.text
    assert schemas.StudyAnswer.model_validate(answer.json(), strict=True).state == "queued"
    assert job_of(server) == {"kind": "sequential", "trial": 3}
    assert server.app.state.scheduler.woken == 1
    again = client.post(f"{TRIALS}/3/sequential")
    assert (again.status_code, again.json()["error"]["message"]) == (409, "study 'mine' is queued already")
    # A study that was to be added to and is cancelled is finished, as before.
    assert client.post("/api/v1/studies/mine/cancel").json()["state"] == "finished"


def test_a_trial_is_queued_to_be_trained(server, client):
    answer = client.post(f"{TRIALS}/3/recover", json={"steps": 7, "how": "blocks"})
    assert (answer.status_code, answer.json()["state"]) == (200, "queued")
    training = {"steps": 7, "tokens": None, "windows": 1, "rate": 1.0, "seed": 0, "how": "blocks"}
    assert job_of(server) == {"kind": "recover", "trial": 3, "training": training}
    body = requests.RecoverBody.model_json_schema()
    assert (tuple(body["properties"]["how"]["enum"]), body["properties"]["steps"]["maximum"]) == (HOW, MAX_STEPS)


@pytest.mark.parametrize("what", ["sequential", "recover"])
def test_it_is_the_owners_to_do(server, what):
    body = None if what == "sequential" else {"steps": 3}
    for who, status in (("bob-submitter", 404), ("ada-viewer", 403), ("ada-admin", 200)):
        assert server.client(who).post(f"{TRIALS}/3/{what}", json=body).status_code == status, who
    assert job_of(server, "theirs") is None or job_of(server, "theirs")["kind"] == "run"


def derived(store, study_id, parent, origin):
    """A complete trial that was made of another one."""
    number = 1 + max(trial.number for trial in store.trials(study_id))
    found = store.trial(study_id, parent)
    own, measured = found.assignment, [m for (_, part), m in found.measurements.items() if part == "search"]
    name = next(name for name, scheme in own.items() if str(scheme) != "keep")
    made = type(own)(own, {name: DIGEST})
    trial = store.start_trial(study_id, number, made, origin, descent=Descent(parent, {"steps": 5}, {DIGEST: b"x"}))
    assert store.finish_trial(trial.id, 1, measured, {}, 1.0, "local")
    return number


def test_what_cannot_be_is_refused_before_it_is_queued(server, client):
    store = server.store
    study = store.study("mine")
    made = derived(store, study.id, 3, "sequential")
    for path, body, status, line in (
        ("0/sequential", None, 422, "no layer of the assignment is quantized, trained ones aside (trial 0 of 'mine')"),
        ("0/recover", {"steps": 3}, 422, "trial 0 of 'mine' has nothing to train"),
        ("8/sequential", None, 422, "trial 8 of 'mine' is failed; only a complete one can be quantized in sequence"),
        ("8/recover", {"steps": 3}, 422, "trial 8 of 'mine' is failed; only a complete one can be trained"),
        ("3/sequential", None, 409, f"trial 3 of 'mine' was quantized in sequence before: it is trial {made}"),
        (f"{made}/sequential", None, 422, f"trial {made} of 'mine' was quantized in sequence already, from trial 3"),
        ("99/sequential", None, 404, "no trial 99"),
        ("99/recover", {"steps": 3}, 404, "no trial 99"),
        ("x/sequential", None, 422, "number"),
        ("3/recover", {}, 422, "steps: is required"),
        ("3/recover", {"steps": 0}, 422, "steps: must be at least 1 (got 0)"),
        ("3/recover", {"steps": 3, "how": "all"}, 422, "how: 'all' is not one of 'model' or 'blocks'"),
        ("3/recover", {"steps": 3, "rate": 0}, 422, "rate: must be more than 0.0 (got 0)"),
        ("3/recover", {"steps": 3, "stepz": 4}, 422, "stepz: "),
    ):
        refused = client.post(f"{TRIALS}/{path}", json=body)
        assert (refused.status_code, line in refused.json()["error"]["message"]) == (status, True), refused.text
    assert store.study(study.id).state == "finished"
    store.set_state(study.id, "running")
    refused = client.post(f"{TRIALS}/4/sequential")
    assert (refused.status_code, refused.json()["error"]["message"]) == (409, "study 'mine' is running already")


def test_what_was_made_of_a_trial_is_asked_for(server, client):
    study = server.store.study("mine").id
    made = [derived(server.store, study, 3, "sequential"), derived(server.store, study, 4, "recover")]
    for parent, expected in ((3, made[:1]), (4, made[1:]), (5, [])):
        found = client.get(TRIALS, params={"parent": parent})
        told = schemas.TrialsAnswer.model_validate(found.json(), strict=True)
        assert [trial.number for trial in told.trials] == expected
    assert client.get(TRIALS, params={"parent": "x"}).status_code == 422


def test_one_user_queues_no_more_than_is_allowed(server):
    import dataclasses

    limits = dataclasses.replace(server.app.state.settings.limits, waiting_studies=0)
    server.app.state.settings = dataclasses.replace(server.app.state.settings, limits=limits)
    client = server.client("ada-submitter")
    assert client.post(f"{TRIALS}/3/sequential").status_code == 429
    assert client.post(f"{TRIALS}/3/recover", json={"steps": 3}).status_code == 429


# Real ones


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory):
    """A folder with a finished study of a tiny model, and its cache."""
    folder = tmp_path_factory.mktemp("improving")
    tokens = {f"{part}_tokens": 64 for part in ("calibration", "search", "report")}
    spec = {
        "name": "mine",
        "model": {"id": str(tiny_model_dir("llama")), "dtype": "float32"},
        "data": {**tokens, "window_tokens": 32},
        "target": {"name": "generic"},
        "space": {"methods": ["rtn"]},
        "objectives": [KL, SIZE],
        "sampler": {"name": "random", "seeds": 0},
        "budget": {"trials": 4, "stop_confidence": None},
        "workers": {"cpus": 1},
    }
    with pytest.MonkeyPatch.context() as patch, Store.open(str(folder / "autoq.db")) as store:
        patch.setenv("AUTOQ_CACHE", str(folder / "cache"))
        run_study(store, create_study(store, build_spec(spec)).id)
    return folder


@pytest.fixture
def real(finished, tmp_path, monkeypatch):
    """The database of that study, and its cache, for a test to change."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    with Store.open(str(tmp_path / "autoq.db")) as store:
        yield store


KILLED = """
import os, signal, sys
from autoq.search.observer import Observer
from autoq.service import runner

class Kills(Observer):
    def stage(self, name, total):
        self.name = name

    def advance(self, steps=1):
        if self.name == "sequence":
            os.kill(os.getpid(), signal.SIGKILL)

runner._log = Kills
sys.exit(runner.main(sys.argv[1:]))
"""


@pytest.mark.timeout(600)
def test_a_runner_that_is_killed_and_one_that_gives_way_make_one_trial(real, monkeypatch):
    store, study = real, real.study("mine")
    monkeypatch.setattr(holding, "LOOK_SECONDS", 0.0)
    had = store.trials(study.id)
    parent = next(trial.number for trial in had if trial.baseline == "uniform-int5")
    app = create_app(store, Settings(hosts=("*",)))
    with TestClient(app, base_url="http://localhost") as client:
        assert client.post(f"{TRIALS}/{parent}/sequential").json()["state"] == "queued"

        environment = os.environ | {"AUTOQ_DB": store.address}
        command = [sys.executable, "-c", KILLED, str(study.id)]
        killed = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert (store.study(study.id).state, len(store.trials(study.id))) == ("running", len(had))

        # The next one gives way once the trial is measured, before it is reported.
        class GivesWay(Observer):
            def stage(self, name, total):
                if name == "report":
                    store.queue.ask(study.id, "yield")

        with monkeypatch.context() as patch:
            patch.setattr(runner, "_log", GivesWay)
            patch.setattr(holding, "_NEW", {"load", "sequence"})  # it has got something done
            assert runner.run(store, study.id) == 0
        assert store.study(study.id).state == "queued"
        (found,) = store.trials(study.id)[len(had) :]
        assert (found.state, (KL, "report") in found.measurements) == ("complete", False)

        assert runner.run(store, study.id) == 0
        assert (store.study(study.id).state, store.study(study.id).message) == ("finished", None)
        (found,) = store.trials(study.id)[len(had) :]
        assert (found.origin, found.parent, found.state) == ("sequential", parent, "complete")
        assert (KL, "report") in found.measurements
        size = store.trial(study.id, parent).measurements[SIZE, "search"].value
        assert found.measurements[SIZE, "search"].value == size

        again = client.post(f"{TRIALS}/{parent}/sequential")
        assert (again.status_code, f"it is trial {found.number}" in again.json()["error"]["message"]) == (409, True)
        # What is found out by the model alone is said on the study, which stays finished.
        store.queue.enqueue(study.id, job={"kind": "sequential", "trial": found.number})
        assert runner.run(store, study.id) == 1
        said = store.study(study.id)
        assert (said.state, said.message.partition(": trial")[0]) == ("finished", "sequential")

        client.post(f"{TRIALS}/{parent}/recover", json={"steps": 2})
        assert runner.run(store, study.id) in (0, 1)  # two steps may make nothing better; then it says so
        record = store.study(study.id)
        assert record.state == "finished"
        trained = [trial for trial in store.trials(study.id) if trial.origin == "recover"]
        assert len(trained) == 1 or record.message.startswith("recover: ")
