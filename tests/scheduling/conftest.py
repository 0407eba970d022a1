"""A runner without a model: a real process under a real lease, whose trials take as long as a test wants."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

import pytest

from autoq.spec import build_spec
from autoq.store import Prepared, Store

RUNNER = """
import os, signal, sys, time
from autoq.assignment import Assignment
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.search.holding import StopRequested, holding
from autoq.store import Store

def interrupt(*_):
    raise KeyboardInterrupt

def goes_on(hold, study):
    return hold.store.table(study.id, "go on") is not None

def trials(hold, study):
    seconds = study.spec["data"]["seed"] / 1000
    for trial in hold.store.running_trials(study.id):
        hold.store.fail_trial(trial.id, trial.attempt, "WorkerLost", "left", "", 0.0, "")
    first = len(hold.store.trials(study.id))
    for number in range(first, study.spec["budget"]["trials"]):
        hold.watch()
        schemes = {f"l{place}": parse_scheme(f"rtn-int{2 + number // 7**place % 7}-g64") for place in range(4)}
        trial = hold.store.start_trial(study.id, number, Assignment(schemes), "sampler")
        print("trial", number, file=sys.stderr, flush=True)
        if study.name.startswith("crash"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if study.name.startswith("stubborn"):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1000)
        while study.name.startswith("held") and number == 2 and hold.epoch == 1 and not goes_on(hold, study):
            time.sleep(0.02)
        time.sleep(seconds)
        found = [Measurement("size_bytes", float(number), "bytes", "computed", "search")]
        hold.store.finish_trial(trial.id, 1, found, {}, seconds, f"{os.getpid()}")
        hold.progressed = True

signal.signal(signal.SIGTERM, interrupt)
study_id = int(sys.argv[1])
with Store.open(os.environ["AUTOQ_DB"]) as store, holding(store, study_id, queued=True) as hold:
    study = hold.store.study(study_id)
    if study.state not in ("queued", "running"):
        sys.exit(0)
    hold.store.set_state(study_id, "running")
    try:
        trials(hold, study)
    except (StopRequested, KeyboardInterrupt) as stop:
        hold.store.queue.settle(study_id, hold.state_after(stop, "interrupted"))
    else:
        hold.store.queue.settle(study_id, "finished")
"""


@pytest.fixture
def runner(tmp_path) -> tuple[str, str]:
    """The command of such a runner. Milliseconds of a trial are the spec's `data.seed`; trial 2 of a study by the name
    of `held` ends when the study has a table "go on", or another runner."""
    script = tmp_path / "runner.py"
    script.write_text(RUNNER)
    return (sys.executable, str(script))


@pytest.fixture
def store(tmp_path):
    with Store.open(str(tmp_path / "autoq.db")) as store:
        yield store


@pytest.fixture
def submit(store) -> Callable[..., int]:
    """Queue a study of so many trials of so many milliseconds; its id."""

    def one(owner: str, trials: int = 3, ms: int = 50, name: str = "s", priority: int = 0, **more: object) -> int:
        tree = {"model": {"id": "m"}, "name": name, "budget": {"trials": trials}, "data": {"seed": ms}}
        spec = build_spec(tree | more)
        prepared = Prepared([("size_bytes", "bytes", "minimize")], {"layers": {}})
        return store.queue.submit(owner, None, "f", spec, prepared, priority)[0].id

    return one


def until(true: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait for something to be true."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


@pytest.fixture(name="until")
def _until() -> Callable[..., None]:
    return until
