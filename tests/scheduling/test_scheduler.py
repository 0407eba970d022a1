"""The scheduler with real processes that are killed, cancelled, preempted and left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from dataclasses import replace

import psutil
import pytest

from autoq.search.holding import holding
from autoq.service.scheduler import Scheduler
from autoq.store import holders


@pytest.fixture
def schedule(store, runner, tmp_path):
    """Start a scheduler; every one is stopped at the end."""
    started = []

    def start(slots=1, **options):
        options = {"quantum": 0.5, "folder": tmp_path / "server", "runner": runner, **options}
        scheduler = Scheduler(store, slots, **options)
        scheduler.start()
        started.append(scheduler)
        return scheduler

    yield start
    for scheduler in started:
        scheduler.stop(5)
        assert scheduler._running == {}


def state(store, study_id):
    return store.study(study_id).state


def ended(store, study_id):
    return [(trial.number, trial.state) for trial in store.trials(study_id)]


def complete(count):
    return [(number, "complete") for number in range(count)]


def test_what_is_queued_runs_and_ends(store, submit, schedule, until):
    ids = [submit("ann"), submit("bob")]
    scheduler = schedule(slots=2)
    until(lambda: all(state(store, i) == "finished" for i in ids))
    assert [ended(store, i) for i in ids] == [complete(3)] * 2
    until(lambda: scheduler.counts()["studies_running"] == 0 and not scheduler._running)
    assert scheduler.counts() | {"slots": 2} == {
        "studies_queued": 0, "studies_running": 0, "exports_queued": 0, "exports_running": 0,
        "started": 2, "yielded": 0, "crashed": 0, "busy": 0, "slots": 2, "places": 2,
    }  # fmt: skip
    assert scheduler.log(ids[0]) == "trial 0\ntrial 1\ntrial 2\n"
    assert scheduler.problem is None


@pytest.mark.slow
def test_two_owners_on_one_slot_take_turns_and_both_end_with_what_they_should_have(store, submit, schedule, until):
    first, second = submit("ann", 30, 100), submit("bob", 30, 100)
    scheduler = schedule()
    until(lambda: all(state(store, i) == "finished" for i in (first, second)))
    assert ended(store, first) == ended(store, second) == complete(30)
    # By turns: the second one had begun long before the first one had ended.
    began = min(trial.created_at for trial in store.trials(second))
    assert began < store.trial(first, 29).created_at
    assert scheduler.counts()["yielded"] >= 2
    assert scheduler.counts()["crashed"] == 0


def test_a_runner_that_is_killed_is_followed_by_another(store, submit, schedule, until):
    study = submit("ann", 5, name="held")
    scheduler = schedule()
    until(lambda: len(ended(store, study)) == 3)
    scheduler._running[study].process.send_signal(signal.SIGKILL)
    until(lambda: state(store, study) == "finished")
    assert scheduler.counts()["crashed"] == 1
    assert ended(store, study) == [*complete(2), (2, "failed"), (3, "complete"), (4, "complete")]
    assert scheduler.log(study)


def test_what_crashes_again_and_again_is_given_up_with_the_reason(store, submit, schedule, until):
    study = submit("ann", name="crash", trials=200)
    scheduler = schedule()
    # Each run ends the trial that the last one left, which is progress; without it four are enough.
    until(lambda: scheduler.counts()["crashed"] >= 2)
    message = store.study(study).message or ""
    assert "SIGSEGV (a fault in native code)" in message or state(store, study) == "running"
    store.queue.cancel(study)
    until(lambda: state(store, study) == "cancelled")


def test_a_runner_that_cannot_start_is_tried_four_times(store, submit, schedule, until, tmp_path):
    study = submit("ann")
    schedule(runner=(sys.executable, "-c", "import sys; sys.stderr.write('no such thing'); sys.exit(3)"))
    until(lambda: state(store, study) == "failed")
    assert store.study(study).message == (
        "its process ended with code 3; its log says why, 4 times without a new trial"
    )
    assert store.table(study, "log") == {"text": "no such thing"}


def test_cancelled_in_the_middle_it_stops_after_its_trial_and_resumes_to_more(store, submit, schedule, until):
    study = submit("ann", 400, 100)
    scheduler = schedule()
    until(lambda: len(ended(store, study)) >= 2)
    assert store.queue.cancel(study).request == "cancel"
    scheduler.wake()
    until(lambda: state(store, study) == "cancelled")
    had = ended(store, study)
    assert had == complete(len(had))
    assert len(had) < 400
    until(lambda: study not in scheduler._running)
    store.queue.enqueue(study, trials=len(had) + 2)
    scheduler.wake()
    until(lambda: state(store, study) == "finished")
    assert ended(store, study) == complete(len(had) + 2)


def test_a_trial_that_does_not_end_is_ended_by_force_when_it_is_cancelled(store, submit, schedule, until):
    study = submit("ann", name="stubborn")
    schedule(patience=0.3)
    until(lambda: ended(store, study))
    store.queue.cancel(study)
    until(lambda: state(store, study) == "cancelled")


def test_stopping_leaves_everything_queued_and_no_process(store, submit, schedule, until):
    ids = [submit("ann", 400, 100), submit("bob", 400, 100)]
    scheduler = schedule(slots=2)
    until(lambda: all(len(ended(store, i)) >= 1 for i in ids))
    pids = [slot.process.pid for slot in scheduler._running.values()]
    scheduler.stop(60)
    assert [state(store, i) for i in ids] == ["queued"] * 2
    assert [trial for i in ids for trial in ended(store, i) if trial[1] != "complete"] == []
    assert not any(psutil.pid_exists(pid) for pid in pids)


SERVER = """
import sys, time
from pathlib import Path
from autoq.service.scheduler import Scheduler
from autoq.store import Store
scheduler = Scheduler(Store.open(sys.argv[1]), 1, folder=Path(sys.argv[2]), runner=(sys.executable, sys.argv[3]))
scheduler.start()
time.sleep(1000)
"""


@pytest.mark.slow
def test_a_server_that_is_killed_leaves_its_runner_which_the_next_one_knows(
    store, submit, schedule, until, tmp_path, runner
):
    study, other = submit("ann", 5, name="held"), submit("bob", 2)
    command = [sys.executable, "-c", textwrap.dedent(SERVER), store.address, str(tmp_path / "server"), runner[1]]
    with subprocess.Popen(command) as server:
        until(lambda: len(ended(store, study)) == 3)
        server.kill()
    process = holders.process_of(store.queue.lease(study).holder)
    assert process is not None, "the runner went with its server"
    scheduler = schedule(quantum=1000.0)
    until(lambda: study in scheduler._running)
    assert scheduler._running[study].process is None
    assert scheduler.counts()["started"] == 0
    store.put_table(study, "go on", {})
    until(lambda: state(store, study) == "finished" and state(store, other) == "finished")
    assert ended(store, study) == complete(5)
    assert {trial.worker for trial in store.trials(study)} == {str(process.pid)}, "it was started twice"
    assert scheduler.counts()["started"] == 1


@pytest.mark.slow
def test_what_dies_with_its_server_is_queued_again_by_the_next_one(store, submit, schedule, until, tmp_path, runner):
    study = submit("ann", 5, name="held")
    command = [sys.executable, "-c", textwrap.dedent(SERVER), store.address, str(tmp_path / "server"), runner[1]]
    with subprocess.Popen(command) as server:
        until(lambda: len(ended(store, study)) == 3)
        server.kill()
        os.kill(holders.process_of(store.queue.lease(study).holder).pid, signal.SIGKILL)
    assert state(store, study) == "running"
    scheduler = schedule()
    until(lambda: state(store, study) == "finished")
    assert len(ended(store, study)) == 5
    assert scheduler.counts()["crashed"] == 1


def test_studies_that_were_never_queued_are_none_of_its_business(store, submit, schedule, until):
    queued = submit("ann")
    own = store.create_study(store.study(queued).study_spec(), [("size_bytes", "bytes", "minimize")])
    store.set_state(own.id, "running")  # as a killed `autoq search` leaves it
    scheduler = schedule()
    until(lambda: state(store, queued) == "finished")
    assert state(store, own.id) == "running"
    assert scheduler.counts()["crashed"] == 0


def test_a_queued_study_that_somebody_runs_elsewhere_is_not_run_twice(store, submit, schedule, until):
    study, other = submit("ann"), submit("bob")
    with holding(store, study):
        scheduler = schedule(slots=2)
        until(lambda: state(store, other) == "finished")
        assert ended(store, study) == []
        assert scheduler.counts()["started"] == 1
    until(lambda: state(store, study) == "finished")


def test_a_server_loads_no_model():
    probe = (
        "import sys, autoq.service.scheduler, autoq.service.exporting, autoq.service.jobs\n"
        "print(sorted({'torch', 'transformers', 'optuna', 'ray', 'plotly', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, timeout=200)
    assert done.stdout.strip() == "[]"


def test_a_cluster_is_a_pool_of_its_own(store, submit, schedule, until):
    """One slot here and three places on a cluster: what runs there takes none here, and as many there as it has
    workers."""

    def cluster(count):
        return {"executor": "ray", "address": "10.0.0.5:6379", "count": count}

    wide, narrow, third = (
        submit("ann", ms=10**5, workers=cluster(count), trials=1000, name=f"on{count}-{i}")
        for i, count in enumerate((2, 1, 1))
    )
    mine = [submit("ann", ms=10**5, trials=1000, name=f"here{i}") for i in range(2)]
    on_ray = submit("ann", trials=1000, workers={"executor": "ray", "count": 1}, name="ray-here")
    scheduler = schedule(places=3, quantum=10**6)
    until(
        lambda: {study_id for study_id in list(scheduler._running) if ended(store, study_id)} == {wide, narrow, mine[0]}
    )
    assert [state(store, i) for i in (third, mine[1], on_ray)] == ["queued"] * 3
    assert {(slot.pool, slot.width) for slot in list(scheduler._running.values())} == {
        ("", 1), ("10.0.0.5:6379", 2), ("10.0.0.5:6379", 1)
    }  # fmt: skip
    store.queue.cancel(wide)
    os.kill(scheduler._running[wide].process.pid, signal.SIGTERM)
    until(lambda: state(store, third) == "running")
    assert state(store, mine[1]) == "queued"


def test_a_study_that_loads_for_long_has_long_turns(store, submit, schedule, until):
    slow = submit("ann", ms=20, trials=10**4, name="slow")
    scheduler = schedule(quantum=0.1)
    until(lambda: ended(store, slow))
    store.put_table(slow, "loading", {"seconds": 1000.0})
    until(lambda: scheduler._running[slow].loading == 1000.0)
    quick = submit("bob", ms=20)
    until(lambda: scheduler._usage[""].get("ann", 0) > scheduler._usage[""].get("bob", 0) + 0.3)
    assert state(store, quick) == "queued"
    assert store.queue.request(slow) is None
    scheduler._running[slow].loading = 0.001
    until(lambda: state(store, quick) == "finished")
    store.queue.cancel(slow)


def test_what_ends_well_while_it_is_looked_at_has_not_crashed(store, submit, schedule, until):
    """It was running when the database was asked, and its process was gone when that was looked up."""
    study = submit("ann")
    scheduler = schedule()
    scheduler.stop()
    epoch = store.queue.acquire(study, holders.holder(), 60)
    store.set_state(study, "running")
    found = [(record, replace(lease, live=False)) for record, lease in store.queue.running()]
    store.queue.settle(study, "finished")
    store.queue.release(study, epoch)
    scheduler._grace = 0.0
    scheduler._adopt(found)
    assert state(store, study) == "finished"
    assert scheduler.counts()["crashed"] == 0
