"""The queue from end to end: real runners on a real, tiny model, and what comes of it for those who submit."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3

import pytest

from autoq.errors import AutoQError, BadInput, Conflict, UnknownName
from autoq.search.setup import prepare
from autoq.service import jobs, runner
from autoq.service.scheduler import Scheduler
from autoq.shipping.verify import verify
from autoq.spec import build_spec
from autoq.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

KL, SIZE = "kl_nats_per_token", "size_bytes"
WAIT = 900.0


def spec(model, name, seed=0, trials=14, **more):
    return build_spec(
        {
            "name": name,
            "model": {"id": str(model)},
            "target": {"name": "torch-cpu"},
            "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 64, "window_tokens": 32},
            "space": {"methods": ["rtn"]},
            "objectives": [KL, SIZE],
            "sampler": {"name": "random", "seed": seed},
            "budget": {"trials": trials},
            "workers": {"cpus": 1},
            **more,
        }
    )


@pytest.fixture
def submit(store, tiny_model_dir):
    def one(owner, name, **more):
        wanted = spec(tiny_model_dir("llama"), name, **more)
        return store.queue.submit(owner, None, "f", wanted, prepare(wanted))[0].id

    return one


@pytest.fixture
def schedule(store, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = []

    def start(**options):
        scheduler = Scheduler(store, 1, cpus=1, folder=tmp_path / "server", **options)
        scheduler.start()
        started.append(scheduler)
        return scheduler

    yield start
    for scheduler in started:
        scheduler.stop(60)


def outcome(address, study_id):
    """What of a study does not depend on the clock, nor on who ran it."""
    with sqlite3.connect(address.removeprefix("sqlite:///")) as connection:
        return connection.execute(
            "select number, origin, baseline, assignment, state, duplicate_of from trials where study_id = ?"
            " order by number",
            (study_id,),
        ).fetchall(), connection.execute(
            "select number, objective, part, value from measurements join trials on trial_id = trials.id"
            " where study_id = ? order by number, objective, part",
            (study_id,),
        ).fetchall()


def test_the_life_of_studies_on_one_slot(store, submit, schedule, until, tmp_path):
    """Two owners' studies by turns, one killed in the middle, end as one that ran alone; then more trials, a
    refinement, and an export."""
    first, second = submit("ann", "first"), submit("bob", "second")
    scheduler = schedule(quantum=10**6)
    until(lambda: any(trial.state == "complete" for trial in store.trials(first)), WAIT)
    store.queue.ask(first, "yield")  # what the policy would do after a quantum
    until(lambda: any(trial.state == "complete" for trial in store.trials(second)), WAIT)
    assert store.study(first).state == "queued"
    os.kill(scheduler._running[second].process.pid, signal.SIGKILL)
    until(lambda: all(store.study(i).state in ("finished", "failed") for i in (first, second)), WAIT)
    assert [store.study(i).state for i in (first, second)] == ["finished"] * 2, scheduler.log(first)
    counts = scheduler.counts()
    assert (counts["yielded"], counts["crashed"], counts["started"]) == (1, 1, 4)
    # Neither turns nor the kill show in what was measured.
    assert outcome(store.address, first) == outcome(store.address, second)
    done = [trial for trial in store.trials(first) if trial.state != "duplicate"]
    assert len(done) == 14
    assert all(trial.state == "complete" for trial in done)
    assert "study first is finished" in scheduler.log(first)

    with pytest.raises(Conflict, match="give it more trials"):
        store.queue.enqueue(first)
    store.queue.enqueue(first, trials=16)
    scheduler.wake()
    until(lambda: store.study(first).state in ("finished", "failed"), WAIT)
    assert store.study(first).state == "finished", scheduler.log(first)
    assert sum(trial.state == "complete" for trial in store.trials(first)) == 16

    record = store.study(first)
    for broken, kind in (({"n": 0}, BadInput), ({"best": "speed"}, UnknownName), ({"maximum": {}}, BadInput)):
        with pytest.raises(kind):
            jobs.refine(store, first, **{"maximum": {SIZE: 1e9}, "minimum": {}, **broken})
    export = store.queue.add_export(first, store.trials(first, states=("complete",))[1].number, None, "ann")
    scheduler.wake()
    until(lambda: store.queue.export(export.id).state in ("finished", "failed"), WAIT)
    found = store.queue.export(export.id)
    assert found.state == "finished", found.message
    assert found.result["verify"]["ok"] is True
    assert [line["title"] for line in found.result["lines"]] == ["run it", "hold it against what was measured"]
    assert found.result["name"] in found.result["lines"][0]["text"]
    folder = scheduler.exporter.path(export.id)
    assert folder == tmp_path / "server" / "exports" / str(export.id)
    # As somebody has it who took it away.
    taken = shutil.copytree(folder, tmp_path / found.result["name"])
    assert verify(taken, latency=False).ok
    assert not list((tmp_path / "server" / "exports").glob("*.work"))
    assert store.study(first).changes > record.changes


def test_a_finished_study_is_refined_through_the_queue(store, submit, schedule, until):
    study = submit("ann", "first", sampler={"name": "frontier", "seeds": 2}, trials=8)
    assert runner.run(store, study) == 0  # here: it is the refinement that gets a process
    assert store.study(study).state == "finished"
    scheduler = schedule()
    had = len(store.trials(study))
    sizes = sorted(trial.values([SIZE])[0] for trial in store.frontier(study))
    jobs.refine(store, study, {SIZE: (sizes[0] + sizes[-1]) / 2}, {}, 1)
    scheduler.wake()
    until(lambda: store.study(study).state == "finished", WAIT)
    added = store.trials(study)[had:]
    said = store.study(study).message
    if not added:  # the model may have nothing that is likely to be better (it differs by processor); then it says so
        assert said is not None
        assert "nothing untried is likely to be better" in said
    else:
        assert said is None
    for trial in added:
        assert (trial.origin, trial.state) == ("refine", "complete")
        assert (KL, "report") in trial.measurements
    with pytest.raises(BadInput, match="a training has"):
        jobs.recover(store, study, 0, {"speed": 3})
    with pytest.raises(AutoQError, match="steps must be from 1"):
        jobs.recover(store, study, 0, {"steps": 0})


def test_a_study_that_fails_says_why_and_is_not_tried_again(store, submit, schedule, until, tmp_path, tiny_model_dir):
    study = submit("ann", "first")
    gone = tmp_path / "gone"
    with Store.open(store.address) as other:
        wanted = spec(gone, "gone")
        prepared = prepare(spec(tiny_model_dir("llama"), "x"))
        broken = other.queue.submit("bob", None, "f", wanted, prepared)[0].id
    store.queue.cancel(study)
    scheduler = schedule()
    until(lambda: store.study(broken).state == "failed", WAIT)
    assert str(gone) in (store.study(broken).message or "")
    until(lambda: not scheduler._running)
    assert scheduler.counts() | {"slots": 1} == scheduler.counts()
    assert (scheduler.counts()["started"], scheduler.counts()["crashed"]) == (1, 0)
    assert store.study(study).state == "cancelled"
