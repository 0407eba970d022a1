"""Executors: where assignments are evaluated. In this process here; on Ray actors in `workers/`.

The controller sees only this protocol. A worker gets a `Job` and gives back a `Result`; it knows
nothing of the database or of Optuna.
"""

from __future__ import annotations

import abc
import collections
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from autoq.errors import AutoQError
from autoq.spec import StudySpec

if TYPE_CHECKING:
    from autoq.evaluation import Evaluator


@dataclass(frozen=True)
class Job:
    """One call of an evaluator's method: `action` with `arguments`.

    `key` comes back with the result (a trial's number, a stage's name); `attempt` counts dispatches
    of the same key, so that a late result of an earlier one can be told apart. An `exclusive` job
    (timing) runs while no other job does.
    """

    key: str
    action: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    attempt: int = 1
    exclusive: bool = False


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


class Executor(abc.ABC):
    """Runs jobs on evaluators of one study. Use as a context manager; leaving it ends all workers."""

    @abc.abstractmethod
    def submit(self, job: Job) -> None:
        """Queue a job. Jobs start in the order of submission."""

    @abc.abstractmethod
    def next(self, timeout: float | None = None) -> Result | None:
        """The next finished job, waiting up to `timeout` seconds (None: as long as it takes).

        Returns None on time-out or if nothing is queued or running. A job whose worker died comes
        back as a failure with `crashed` set, and the executor starts another worker.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """End all workers at once; unfinished jobs are lost."""

    def __enter__(self) -> Executor:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run(evaluator: Evaluator, job: Job, worker: str) -> Result:
    """Run one job on an evaluator; every exception but an interrupt becomes a failure record."""
    import time

    start = time.perf_counter()
    try:
        value = getattr(evaluator, job.action)(**job.arguments)
    except Exception as problem:
        return Result(job, None, Failure.of(problem), time.perf_counter() - start, worker)
    return Result(job, value, None, time.perf_counter() - start, worker)


class LocalExecutor(Executor):
    """Runs jobs one after another in this process, when the controller asks for results."""

    def __init__(self, spec: StudySpec, make: Callable[[StudySpec], Evaluator]) -> None:
        self._spec = spec
        self._make = make
        self._evaluator: Evaluator | None = None
        self._queue: collections.deque[Job] = collections.deque()

    def submit(self, job: Job) -> None:
        self._queue.append(job)

    def next(self, timeout: float | None = None) -> Result | None:
        if not self._queue:
            return None
        if self._evaluator is None:
            # Not an error of the job: a model that cannot be loaded ends the study.
            self._evaluator = self._make(self._spec)
        return run(self._evaluator, self._queue.popleft(), "local")

    def close(self) -> None:
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
    from autoq.evaluation import Evaluator

    return LocalExecutor(spec, Evaluator)
