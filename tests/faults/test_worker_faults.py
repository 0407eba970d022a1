"""Workers that die, hang and lie: nothing is lost, nothing comes twice, and the rest goes on."""

from __future__ import annotations

import ctypes
import functools
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from ray import cloudpickle

from autoq.assignment import Assignment
from autoq.errors import WorkerLost
from autoq.evaluation import Evaluator
from autoq.measurement import Measurement, Part
from autoq.search.controller import create_study, run_study
from autoq.search.executors import Executor, Job, LocalExecutor, Result, make_evaluator
from autoq.search.observer import Observer
from autoq.spec import StudySpec, WorkersSpec, build_spec
from autoq.statistics import Rival
from autoq.store import Store, TrialRecord
from autoq.workers.executor import RayExecutor
from autoq.workers.session import Session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# Workers cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Fake:
    """An evaluator that does harm when told to."""

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec

    def echo(self, value: Any) -> Any:
        return value

    def pid(self) -> int:
        return os.getpid()

    def nap(self, pid_file: str, seconds: float = 1000.0) -> str:
        Path(pid_file).write_text(str(os.getpid()))
        time.sleep(seconds)
        return "slept"

    def leave(self) -> None:
        os._exit(3)

    def leave_once(self, mark: str) -> str:
        if Path(mark).exists():
            return "done"
        Path(mark).touch()
        os._exit(3)

    def quit(self) -> None:
        sys.exit(0)

    def fault(self) -> None:
        ctypes.string_at(0)

    def hold(self) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    def hoard(self, megabytes: int) -> int:
        return sum(len(piece) for piece in [bytearray(10**6) for _ in range(megabytes)])

    def spend(self) -> None:
        raise MemoryError("cannot allocate 1 TB")


def die(spec: StudySpec) -> Fake:
    os._exit(4)


def spec_for(count: int) -> StudySpec:
    workers = WorkersSpec(executor="ray", count=count, cpus=1)
    return StudySpec.model_validate({"model": {"id": "demo:smollm2"}, "workers": workers})


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    """One Ray for the whole file; what is left of it afterwards is nothing."""
    before = set(psutil.Process().children(recursive=True))
    session = Session(WorkersSpec(executor="ray", count=2, cpus=1))
    folder = session.folder
    started = set(psutil.Process().children(recursive=True)) - before
    assert started
    yield session
    session.close()
    assert folder is not None
    assert not folder.exists()
    assert set(psutil.Process().children(recursive=True)) <= before
    assert not any(process.is_running() for process in started)


@pytest.fixture
def executor(session: Session) -> Iterator[RayExecutor]:
    with RayExecutor(spec_for(1), Fake) as executor:
        yield executor


def drain(executor: Executor) -> list[Result]:
    return list(iter(executor.next, None))


def wait_for(path: Path, seconds: float = 280.0) -> int:
    """The process id that a job has written to `path`."""
    until = time.monotonic() + seconds
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < until
        time.sleep(0.02)
    return int(path.read_text())


def gone(pid: int, seconds: float = 120.0) -> bool:
    until = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True


def test_a_worker_killed_mid_job_costs_that_job_only(session: Session, tmp_path: Path) -> None:
    with RayExecutor(spec_for(2), Fake) as executor:
        executor.submit(Job("victim", "nap", {"pid_file": str(tmp_path / "pid")}, attempt=1))
        for i in range(6):
            executor.submit(Job(str(i), "echo", {"value": i}))
        results = [executor.next() for _ in range(6)]
        os.kill(wait_for(tmp_path / "pid"), signal.SIGKILL)
        crash = executor.next(timeout=280)
        executor.submit(Job("victim", "echo", {"value": "again"}, attempt=2))
        retry = executor.next()
        assert executor.next() is None
    assert sorted(result.value for result in results if result is not None) == list(range(6))
    assert crash is not None
    assert (crash.job.key, crash.job.attempt, crash.value) == ("victim", 1, None)
    assert crash.failure is not None
    assert crash.failure.crashed
    assert crash.failure.error == "WorkerLost"
    assert "died while it ran 'nap' of 'victim'" in crash.failure.message
    assert "\n" not in crash.failure.message
    assert retry is not None
    assert (retry.value, retry.job.attempt) == ("again", 2)


@pytest.mark.parametrize("action", ["leave", "quit", "fault"])
def test_every_way_to_die_is_a_crash_and_the_queue_survives(executor: Executor, action: str) -> None:
    executor.submit(Job("before", "echo", {"value": 1}))
    executor.submit(Job("death", action))
    executor.submit(Job("after", "echo", {"value": 2}))
    before, death, after = drain(executor)
    assert (before.job.key, before.value) == ("before", 1)
    assert death.job.key == "death"
    assert death.failure is not None
    assert death.failure.crashed
    assert death.worker == before.worker
    assert (after.job.key, after.value) == ("after", 2)
    assert after.worker != before.worker


def test_a_death_that_is_the_clusters_is_no_fault_of_the_job(
    executor: RayExecutor, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray ends all workers of a process that has lost its node. So jobs might end two of them, and be given up."""
    monkeypatch.setattr(executor._session, "answers", lambda: False)
    executor.submit(Job("a", "leave_once", {"mark": str(tmp_path / "mark")}))
    (result,) = drain(executor)
    assert (result.value, result.failure, result.job.attempt) == ("done", None, 1)
    assert executor._deaths == 0


def test_running_out_of_memory_politely_is_an_ordinary_failure(executor: Executor) -> None:
    executor.submit(Job("a", "spend"))
    executor.submit(Job("b", "echo", {"value": 1}))
    first, second = drain(executor)
    assert first.failure is not None
    assert (first.failure.error, first.failure.crashed) == ("MemoryError", False)
    assert second.worker == first.worker


def test_a_memory_hungry_job_is_ended_at_its_limit_and_harms_nobody(session: Session) -> None:
    with RayExecutor(spec_for(2), Fake) as executor:
        executor.submit(Job("hungry", "hoard", {"megabytes": 3000}, limit_bytes=300 * 10**6))
        for key in "abc":
            executor.submit(Job(key, "hoard", {"megabytes": 100}, limit_bytes=300 * 10**6))
        results = {result.job.key: result for result in drain(executor)}
        failure = results.pop("hungry").failure
        assert failure is not None
        assert (failure.error, failure.crashed) == ("MemoryLimit", False)
        assert {result.value for result in results.values()} == {10**8}
        # The worker that was refused is as good as the other one.
        for key in "defg":
            executor.submit(Job(key, "hoard", {"megabytes": 100}))
        assert len({result.worker for result in drain(executor) if result.value == 10**8}) == 2


def test_a_frozen_process_is_ended_at_the_time_limit(executor: Executor) -> None:
    executor.submit(Job("pid", "pid"))
    result = executor.next()
    assert result is not None
    executor.submit(Job("frozen", "hold", limit_seconds=1.0))
    executor.submit(Job("next", "echo", {"value": 1}))
    frozen, following = drain(executor)
    assert frozen.failure is not None
    assert (frozen.failure.error, frozen.failure.crashed) == ("TimeLimit", False)
    assert following.value == 1
    assert gone(result.value)


def test_a_worker_that_died_idle_costs_no_job(executor: Executor) -> None:
    executor.submit(Job("pid", "pid"))
    result = executor.next()
    assert result is not None
    os.kill(result.value, signal.SIGKILL)
    executor.submit(Job("a", "echo", {"value": 1}))
    executor.submit(Job("b", "echo", {"value": 2}))
    assert [(r.job.key, r.value) for r in drain(executor)] == [("a", 1), ("b", 2)]


def test_an_exclusive_job_that_kills_its_worker_comes_back_once(executor: Executor) -> None:
    executor.submit(Job("a", "leave", exclusive=True))
    executor.submit(Job("b", "echo", {"value": 1}, exclusive=True))
    first, second = drain(executor)
    assert first.failure is not None
    assert first.failure.crashed
    assert second.value == 1


def test_deaths_without_end_end_the_study(executor: Executor) -> None:
    for i in range(9):
        executor.submit(Job(str(i), "leave"))
    keys = [result.job.key for result in (executor.next() for _ in range(5)) if result is not None]
    assert keys == ["0", "1", "2", "3", "4"]
    for _ in range(2):
        with pytest.raises(
            WorkerLost, match=r"^5 workers died in a row .*; the last: .* died while it ran 'leave' of '4'"
        ):
            executor.next()


def test_a_finished_job_between_deaths_sets_the_count_back(executor: Executor) -> None:
    for i in range(8):
        executor.submit(Job(str(i), "leave" if i != 3 else "spend"))
    assert len(drain(executor)) == 8


class Fragile(Evaluator):
    """The real evaluator, that two assignments kill.

    The assignments' hashes are the names of files in a folder: `halt` waits to be killed the first time, `die` dies
    whenever it is measured.
    """

    def __init__(self, spec: StudySpec, folder: Path) -> None:
        super().__init__(spec)
        self.folder = folder

    def measure(self, assignment: Assignment, part: Part, rival: Rival | None = None) -> list[Measurement]:
        fate = self.folder / assignment.hash
        if part == "search" and fate.exists():
            if fate.read_text() == "die":
                ctypes.string_at(0)
            fate.rename(self.folder / "met")
            (self.folder / "pid").write_text(str(os.getpid()))
            time.sleep(1000)
        return super().measure(assignment, part, rival)


class KillOnce(Observer):
    """Kills the waiting worker, from a thread, and keeps what it is told."""

    def __init__(self, folder: Path) -> None:
        self.notes: list[str] = []
        self.ended: list[int] = []
        self.killer = threading.Thread(target=lambda: os.kill(wait_for(folder / "pid"), signal.SIGKILL))
        self.killer.start()

    def trial(self, trial: TrialRecord, done: int, budget: int) -> None:
        self.ended.append(trial.number)

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_a_real_study_outlives_its_workers(
    session: Session, tiny_model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    tree = {
        "model": {"id": str(tiny_model_dir("llama"))},
        "data": {"calibration_tokens": 256, "search_tokens": 256, "report_tokens": 128, "window_tokens": 64},
        "target": {"name": "generic"},
        "space": {"schemes": ["rtn-int2-g32", "rtn-int4-g32", "rtn-int8-channel-sym"]},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        "budget": {"trials": 20},
        "sampler": {"name": "random", "seeds": 4},
        "workers": {"executor": "ray", "count": 2, "cpus": 1},
    }
    fates = tmp_path / "fates"
    fates.mkdir()
    with Store.open(str(tmp_path / "autoq.db")) as store:
        calm = create_study(store, build_spec(tree))
        run_study(store, calm.id, make=lambda spec: LocalExecutor(spec, make_evaluator))
        expected = store.trials(calm.id)
        sampled = [trial for trial in expected if trial.origin == "sampler"]
        halted, doomed = sampled[1], sampled[4]
        (fates / halted.hash).write_text("halt")
        (fates / doomed.hash).write_text("die")
        rough = create_study(store, build_spec(tree))
        observer = KillOnce(fates)
        make = functools.partial(RayExecutor, make=functools.partial(Fragile, folder=fates))
        assert run_study(store, rough.id, observer, make).state == "finished"
        observer.killer.join()
        trials = store.trials(rough.id)
    assert sorted(observer.ended) == [trial.number for trial in trials] == list(range(len(expected)))
    # A random sampler proposes the same whatever it is told, so every other trial is as in the calm study.
    assert [trial.hash for trial in trials] == [trial.hash for trial in expected]
    for trial, same in zip(trials, expected, strict=True):
        assert trial.attempt == (2 if trial.number in (halted.number, doomed.number) else 1)
        if trial.number != doomed.number:
            # What it took differs: each worker has hidden states of its own trials.
            found, wanted = (t.measurements["kl_nats_per_token", "search"] for t in (trial, same))
            assert (trial.state, found.value, found.stderr, found.n) == (
                same.state,
                wanted.value,
                wanted.stderr,
                wanted.n,
            )
    failed = trials[doomed.number]
    assert (failed.state, failed.measurements) == ("failed", {})
    assert failed.error is not None
    assert failed.error.type == "WorkerLost"
    assert re.fullmatch(
        rf"quarantined after 2 crashes: \S+:\d+ died while it ran 'measure' of 'trial-{doomed.number}': "
        "Fatal Python error: Segmentation fault",
        failed.error.message,
    )
    assert "in measure" in failed.error.traceback
    assert sorted(observer.notes) == sorted(
        f"trial {number}: the worker died; trying once more" for number in (halted.number, doomed.number)
    )


def test_a_model_that_kills_whoever_loads_it_ends_the_study(session: Session) -> None:
    with RayExecutor(spec_for(1), die) as executor:
        executor.submit(Job("a", "echo", {"value": 1}))
        with pytest.raises(WorkerLost, match="died while it loaded the model"):
            executor.next()
