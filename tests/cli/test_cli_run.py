"""search and resume: what reaches the controller, and how a run ends. The controller is a stand-in."""

import json
import os
import signal
import subprocess
import sys
import time
import types

import pytest

from autoq.errors import AutoQError
from autoq.measurement import Measurement
from autoq.search.controller import raise_budget
from autoq.store import Store

from .conftest import OBJECTIVES, mixed


@pytest.fixture
def controller(monkeypatch):
    """A controller that creates the study and then does what `controller.act` says."""
    fake = types.ModuleType("autoq.search.controller")
    fake.specs = []

    def create_study(store, spec):
        fake.specs.append(spec)
        return store.create_study(spec, OBJECTIVES)

    def finish(store, study_id, observer):
        observer.study(
            "demo", {"model": "m", "layers": 3, "searched": 3, "choices": 4, "trials": 1, "sampler": "nsga2"}
        )
        observer.stage("search", 1)
        trial = store.start_trial(study_id, 0, mixed("keep", "keep", "keep"), "sampler")
        values = [Measurement(name, 1.5, unit, "measured", "search", 0.1) for name, unit, _ in OBJECTIVES]
        store.finish_trial(trial.id, 1, values, {}, 0.1, "local")
        observer.trial(store.trial(study_id, 0), 1, 1)
        store.set_state(study_id, "finished")

    def run_study(store, study_id, observer=None, make=None):
        fake.act(store, study_id, observer)

    fake.act, fake.create_study, fake.run_study, fake.raise_budget = finish, create_study, run_study, raise_budget
    monkeypatch.setitem(sys.modules, "autoq.search.controller", fake)
    return fake


def test_options_change_the_spec(autoq, controller):
    result = autoq(
        *["search", "demo", "--executor", "ray", "--workers", "3", "--trials", "7", "--name", "no"],
        *["--set", "sampler.seed=5", "--set", "constraints.size_bytes.max=90MB", "--db", "other.db"],
    )
    assert result.exit_code == 0
    (spec,) = controller.specs
    assert (spec.workers.executor, spec.workers.count, spec.budget.trials, spec.name) == ("ray", 3, 7, "no")
    assert (spec.sampler.seed, spec.constraints["size_bytes"].max) == (5, 90e6)
    with Store.open("other.db", create=False) as store:
        assert store.study("no").state == "finished"


def test_recipes_of_the_line_come_after_those_of_the_spec(autoq, controller):
    line = ["search", "demo", "--name", "fresh", "--set", "recipes=[a.json]", "--seed-from", "out", "--seed-from", "b"]
    assert autoq(*line).exit_code == 0
    assert controller.specs[0].recipes == ("a.json", "out", "b")


def test_progress_goes_to_stderr_and_the_frontier_to_stdout(autoq, controller):
    result = autoq("search", "demo", "--name", "fresh")
    assert result.stderr.splitlines() == [
        "checking fresh against demo:smollm2 and torch-cpu",
        "study demo of m: 3 layers, 3 searched, 4 choices at most, 1 trials, nsga2 sampler",
        "searching",
        "1/1 trials; best so far: kl_nats_per_token 1.500 nats/token, size_bytes 2 B, latency_decode_ms 1.500 ms",
        "better at the same bytes: autoq sequential fresh TRIAL; ship it: autoq export fresh TRIAL --out DIR",
    ]
    assert result.stdout.splitlines()[2].split()[:2] == ["0", "sampler"]


def test_quiet_json_is_one_document_and_nothing_else(autoq, controller):
    result = autoq("search", "demo", "--name", "fresh", "--quiet", "--json")
    assert result.stderr == ""
    document = json.loads(result.stdout)
    assert (document["study"], len(document["trials"])) == ("fresh", 1)


def test_a_taken_name_is_said(autoq, controller):
    assert "the name demo is taken; this study is demo-2\n" in autoq("search", "demo").stderr
    # Who hears nothing of it takes the results of the other study for these.
    assert autoq("search", "demo", "--quiet").stderr == "the name demo is taken; this study is demo-3\n"


def test_a_bad_spec_creates_no_database(autoq, controller, tmp_path):
    assert autoq("search", "demo", "--set", "budget.trials=0", "--db", "new.db").exit_code == 2
    assert not (tmp_path / "new.db").exists()


@pytest.mark.parametrize("database_option", [[], ["--db", "other.db"]])
def test_ctrl_c_says_how_to_go_on(autoq, controller, database_option):
    def interrupted(store, study_id, observer):
        raise KeyboardInterrupt

    controller.act = interrupted
    result = autoq("search", "demo", "--name", "fresh", *database_option)
    assert result.exit_code == 130
    line = result.stderr.splitlines()[-1]
    assert line.startswith("autoq: interrupted; go on with: autoq resume fresh")
    assert ("other.db" in line) == bool(database_option)


def test_sigterm_is_ctrl_c(autoq, controller):
    before = signal.getsignal(signal.SIGTERM)

    def terminated(store, study_id, observer):
        os.kill(os.getpid(), signal.SIGTERM)
        signal.pause()

    controller.act = terminated
    assert autoq("search", "demo", "--name", "fresh").exit_code == 130
    assert signal.getsignal(signal.SIGTERM) is before


class Dropping:
    """An object whose destructor is interrupted, which Python reports and forgets."""

    def __del__(self):
        raise KeyboardInterrupt


def test_an_interrupt_that_python_drops_is_not_lost(autoq, controller):
    before = sys.unraisablehook

    def interrupted(store, study_id, observer):
        Dropping()
        until = time.monotonic() + 100
        while time.monotonic() < until:
            time.sleep(0.01)

    controller.act = interrupted
    result = autoq("search", "demo", "--name", "fresh")
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == "autoq: interrupted; go on with: autoq resume fresh"
    assert sys.unraisablehook is before


def test_ctrl_c_after_the_result_is_no_error(database):
    """Python's own end calls what libraries registered, where an interrupt would show a traceback."""
    script = (
        "import atexit, os, signal, sys; from autoq.cli import main;"
        "atexit.register(lambda: os.kill(os.getpid(), signal.SIGINT)); sys.argv = ['autoq', 'studies']; main()"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    assert "demo" in done.stdout


def test_a_failed_study_ends_with_its_reason(autoq, controller):
    def failed(store, study_id, observer):
        raise AutoQError("the model is gone")

    controller.act = failed
    result = autoq("search", "demo", "--name", "fresh")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.endswith("autoq: the model is gone\n")


def test_resume_goes_on_and_shows_the_frontier(autoq, controller, database):
    with Store.open(database) as store:
        store.set_state(1, "interrupted")
    controller.act = lambda store, study_id, observer: store.set_state(study_id, "finished")
    result = autoq("resume", "demo", "--json")
    assert len(json.loads(result.stdout)["trials"]) == 5


def test_resume_with_more_trials_goes_on_with_a_finished_study(autoq, controller, database):
    def act(store, study_id, observer):
        assert store.study(study_id).study_spec().budget.trials == 64
        controller.specs.append("ran")

    controller.act = act
    assert autoq("resume", "demo", "--trials", "64").exit_code == 0
    assert controller.specs == ["ran"]
    for trials in ("5", "0", "-1"):
        result = autoq("resume", "demo", "--trials", trials)
        assert result.exit_code == 2
        assert f"trials must be more than the 8 that study 'demo' has had (got {trials})" in result.stderr
    with Store.open(database) as store:
        assert store.study("demo").study_spec().budget.trials == 64


def test_resume_of_a_finished_study_runs_nothing(autoq, controller):
    controller.act = None
    result = autoq("resume", "demo")
    assert result.exit_code == 0
    assert "study demo is finished" in result.stderr


def test_a_study_that_another_process_runs_is_not_touched(autoq, database, controller):
    from autoq.store import holders

    with Store.open(database) as store:
        store.set_state(1, "running")
        assert store.queue.acquire(1, "other-host:4711:0:0", 600) == 1
        before = store.study(1)
    for more in ([], ["--trials", "99"]):
        result = autoq("resume", "demo", *more)
        assert result.exit_code == 1
        assert result.stderr == "autoq: study 'demo' is being run by other-host:4711\n"
    with Store.open(database) as store:
        assert store.study(1) == before
        store.queue.release(1, 1)
        # A process of this machine that is gone holds nothing.
        assert store.queue.acquire(1, f"{holders.host()}:999999999:{holders._namespace()}:1.00", 600) == 2
    controller.act = lambda store, study_id, observer: store.set_state(study_id, "finished")
    result = autoq("resume", "demo")
    assert result.exit_code == 0
    assert "did not end properly" in result.output
