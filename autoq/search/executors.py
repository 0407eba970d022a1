"""Executors: where assignments are evaluated. In this process here; on Ray actors in `workers/`.

The controller sees only this protocol. A worker gets a `Job` and gives back a `Result`; it knows
nothing of the database or of Optuna.
"""

from __future__ import annotations

import abc
import collections
import contextlib
import dataclasses
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from autoq.errors import AutoQError
from autoq.search.allowance import allowance, is_shortage
from autoq.spec import StudySpec

if TYPE_CHECKING:
    from autoq.evaluation import Evaluator


MAX_ATTEMPTS = 2  # what took two workers down is not tried again


@dataclass(frozen=True)
class Job:
    """One call of an evaluator's method: `action` with `arguments`.

    `key` comes back with the result (a trial's number, a stage's name); `attempt` counts dispatches
    of the same key, so that a late result of an earlier one can be told apart. An `exclusive` job
    (timing) runs while no other job does, and one with a `device` on a worker whose device has that in its name:
    numbers of two devices must not be compared. A job that takes longer than `limit_seconds` is stopped and
    fails with `TimeLimit`; one that allocates more than `limit_bytes` beyond what its worker had is refused
    them and fails with `MemoryLimit`.
    """

    key: str
    action: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 1
    exclusive: bool = False
    limit_seconds: float | None = None
    limit_bytes: int | None = None
    device: str | None = None


class TimeLimit(AutoQError):
    """A job ran past its time limit."""

    @classmethod
    def of(cls, job: Job) -> TimeLimit:
        """The error of a job that was stopped."""
        return cls(f"{job.action!r} of {job.key!r} ran past its limit of {job.limit_seconds:g} s")


class MemoryLimit(AutoQError):
    """A job allocated more than its memory limit."""

    @classmethod
    def of(cls, job: Job) -> MemoryLimit:
        """The error of a job that was refused more memory."""
        limit = f"{(job.limit_bytes or 0) / 1e6:,.0f} MB"
        return cls(f"{job.action!r} of {job.key!r} needs more than its limit of {limit} beside the model")


@dataclass(frozen=True)
class Failure:
    """Why a job failed: exception type, one-line message, traceback text; `crashed` if the worker died."""

    error: str
    message: str
    traceback: str = ""
    crashed: bool = False

    @classmethod
    def of(cls, problem: BaseException) -> Failure:
        """The record of an exception."""
        lines = str(problem).splitlines()
        text = "".join(traceback.format_exception(problem))
        return cls(type(problem).__name__, lines[0] if lines else type(problem).__name__, text)


@dataclass(frozen=True)
class Result:
    """What came of a job: `value` or `failure`, the seconds it took and the worker that ran it."""

    job: Job
    value: Any = None
    failure: Failure | None = None
    seconds: float = 0.0
    worker: str = ""


@dataclass(frozen=True)
class WorkerView:
    """A worker as its executor sees it: `host:pid`, `waiting` for room, `loading`, `idle` or `busy`, the key of its
    job, its process id where that is one of this machine's, its device, and the bytes that it last had resident."""

    name: str
    state: Literal["waiting", "loading", "idle", "busy"]
    key: str | None = None
    process: int | None = None
    device: str | None = None
    memory_bytes: int | None = None


class Executor(abc.ABC):
    """Runs jobs on evaluators of one study. Use as a context manager; leaving it ends all workers.

    `loading_seconds` is how long the last evaluator took to build, 0 while there is none.
    """

    loading_seconds: float = 0.0

    @abc.abstractmethod
    def submit(self, job: Job) -> None:
        """Queue a job. Jobs start in the order of submission. Not after `close`."""

    @abc.abstractmethod
    def next(self, timeout: float | None = None) -> Result | None:
        """The next finished job, waiting up to `timeout` seconds (None: as long as it takes).

        Returns None on time-out or if nothing is queued or running. A job whose worker died comes
        back once, as a failure with `crashed` set, and the executor starts another worker.

        Raises what building an evaluator raised, for then no job can ever run, and `WorkerLost` when
        workers die again and again without finishing a job.
        """

    def ready(self) -> Result | None:
        """A finished job that is there already, without waiting and without working for it; None where there is none.

        An executor that runs jobs in `next` never has one. Raises what `next` does.
        """
        return None

    @abc.abstractmethod
    def close(self) -> None:
        """End all workers at once; unfinished jobs are lost. Can be called again."""

    def workers(self) -> list[WorkerView]:
        """What there is of workers at this moment. May be called from another thread."""
        return []

    def clock(self) -> float:
        """Seconds that pass as jobs run, from any beginning."""
        return time.monotonic()

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def completed(executor: Executor, jobs: Iterable[Job]) -> Iterator[Result]:
    """Run jobs to their end; yields one result each, as they come, failures included.

    A job whose worker died is tried again, `MAX_ATTEMPTS` times in all. What comes twice, or late, of an attempt that
    is over or of another stage, is dropped. Raises `AutoQError` where the executor has nothing more to give.
    """
    out: dict[str, int] = {}  # key -> the attempt that is waited for
    for job in jobs:
        executor.submit(job)
        out[job.key] = job.attempt
    while out:
        result = executor.next()
        if result is None:
            raise AutoQError("the workers stopped before their jobs were done")
        if out.get(result.job.key) != result.job.attempt:
            continue
        if result.failure is not None and result.failure.crashed and result.job.attempt < MAX_ATTEMPTS:
            executor.submit(dataclasses.replace(result.job, attempt=result.job.attempt + 1))
            out[result.job.key] += 1
            continue
        del out[result.job.key]
        yield result


def run(evaluator: Evaluator, job: Job, worker: str) -> Result:
    """Run one job on an evaluator; every exception but an interrupt becomes a failure record."""
    start = time.perf_counter()
    try:
        with allowance(job.limit_bytes):
            value = getattr(evaluator, job.action)(**job.arguments)
    except Exception as problem:
        if job.limit_bytes is not None and is_shortage(problem):
            limit = MemoryLimit.of(job)
            limit.__cause__ = problem  # its traceback tells where the job was
            problem = limit
        return Result(job, None, Failure.of(problem), time.perf_counter() - start, worker)
    return Result(job, value, None, time.perf_counter() - start, worker)


def make_evaluator(spec: StudySpec) -> Evaluator:
    """The evaluator of a study. Imports torch, so it is called where jobs run and not before."""
    from autoq.evaluation import Evaluator

    return Evaluator(spec)


class _Alarm(BaseException):
    """The alarm clock rang. Not an `Exception`, so that no handler of the evaluator swallows it."""


@contextlib.contextmanager
def _alarm(seconds: float | None) -> Iterator[None]:
    """Raise `_Alarm` in the body after `seconds`. Without effect off the main thread or without SIGALRM."""
    if seconds is None or threading.current_thread() is not threading.main_thread() or not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: object) -> None:
        raise _Alarm

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, ring)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, handler)
        if left:  # somebody else's alarm, which still is to ring
            signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 1e-3), interval)


class LocalExecutor(Executor):
    """Runs jobs one after another in this process, when the controller asks for results.

    A time limit is an alarm signal: it stops Python code between two operations, not one long
    operation, and it exists on the main thread only; elsewhere jobs take as long as they take. After
    it the evaluator, which stopped halfway, is built anew.
    """

    def __init__(self, spec: StudySpec, make: Callable[[StudySpec], Evaluator]) -> None:
        self._spec = spec
        self._make = make
        self._evaluator: Evaluator | None = None
        self._queue: collections.deque[Job] = collections.deque()
        self._running: Job | None = None
        self._closed = False

    def submit(self, job: Job) -> None:
        """Queue a job; nothing runs before `next`."""
        assert not self._closed
        self._queue.append(job)

    def next(self, timeout: float | None = None) -> Result | None:
        """Run the next job to its end; `timeout` cannot end it."""
        if not self._queue:
            return None
        if self._evaluator is None:
            # Not an error of the job: a model that cannot be loaded ends the study.
            start = time.perf_counter()
            self._evaluator = self._make(self._spec)
            self.loading_seconds = time.perf_counter() - start
        job = self._running = self._queue.popleft()
        start = time.perf_counter()
        try:
            with _alarm(job.limit_seconds):
                return run(self._evaluator, job, "local")
        except _Alarm as alarm:
            self._evaluator = None
            problem = TimeLimit.of(job)
            problem.__cause__ = alarm  # its traceback tells where the job was
            return Result(job, None, Failure.of(problem), time.perf_counter() - start, "local")
        finally:
            self._running = None

    def workers(self) -> list[WorkerView]:
        """This process."""
        job = self._running
        name = f"{socket.gethostname()}:{os.getpid()}"
        state: Literal["loading", "idle", "busy"] = "busy" if job else "loading" if self._evaluator is None else "idle"
        return [WorkerView(name, state, job.key if job else None, os.getpid())]

    def close(self) -> None:
        """Forget queued jobs and the evaluator."""
        self._closed = True
        self._queue.clear()
        self._evaluator = None


def make_executor(spec: StudySpec) -> Executor:
    """The executor that the spec names. Raises `AutoQError` where Ray is asked for and not installed."""
    if spec.workers.executor == "ray":
        import importlib

        try:
            module = importlib.import_module("autoq.workers.executor")
        except ModuleNotFoundError as problem:
            if problem.name != "ray":
                raise
            raise AutoQError("workers.executor is 'ray' but Ray is not installed: pip install 'autoq[ray]'") from None
        executor: Executor = module.RayExecutor(spec)
        return executor
    return LocalExecutor(spec, make_evaluator)
