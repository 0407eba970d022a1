"""What every executor does, in this process or on Ray."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ray import cloudpickle

from autoq.errors import ModelRefused, UnknownName
from autoq.search.executors import Executor, Job, LocalExecutor, Result, make_executor
from autoq.spec import StudySpec, WorkersSpec
from autoq.workers.executor import RayExecutor
from autoq.workers.session import Session

# Workers cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

Open = Callable[..., Executor]


class Fake:
    """An evaluator without a model."""

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec
        self.calls = 0

    def echo(self, value: Any) -> Any:
        return value

    def count(self) -> int:
        self.calls += 1
        return self.calls

    def nap(self, seconds: float) -> tuple[float, float]:
        """Start and end on the machine's monotonic clock."""
        start = time.monotonic()
        while time.monotonic() < start + seconds:
            time.sleep(0.01)
        return start, time.monotonic()

    def meet(self, folder: Path, name: str, awaited: Sequence[str]) -> bool:
        """Be there until all are; whether they came within two minutes."""
        (folder / name).touch()
        until = time.monotonic() + 120
        while not all((folder / each).exists() for each in awaited) and time.monotonic() < until:
            time.sleep(0.01)
        return all((folder / each).exists() for each in awaited)

    def fail(self, message: str) -> None:
        raise ValueError(message)

    def threads(self) -> int | None:
        return self.spec.workers.cpus

    def handle(self) -> Any:
        return (x for x in ())


class NotPortable(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def refuse(spec: StudySpec) -> Fake:
    raise ModelRefused("model 'nothing' has no weights")


def refuse_name(spec: StudySpec) -> Fake:
    raise UnknownName("method", "gtpq", ["gptq", "rtn"])


def refuse_oddly(spec: StudySpec) -> Fake:
    raise NotPortable("this", "that")


def spec_for(kind: str, count: int) -> StudySpec:
    workers = WorkersSpec(executor="ray", count=count, cpus=1) if kind == "ray" else WorkersSpec()
    return StudySpec.model_validate({"model": {"id": "demo:smollm2"}, "workers": workers})


@pytest.fixture(scope="module")
def ray_session() -> Iterator[Session]:
    session = Session(WorkersSpec(executor="ray", count=2, cpus=1))
    yield session
    session.close()


@pytest.fixture(params=["local", pytest.param("ray", marks=pytest.mark.slow)])
def kind(request: pytest.FixtureRequest) -> str:
    if request.param == "ray":
        request.getfixturevalue("ray_session")
    return str(request.param)


@pytest.fixture
def open_executor(kind: str) -> Iterator[Open]:
    opened: list[Executor] = []

    def open_one(make: Callable[[StudySpec], Any] = Fake, count: int = 1) -> Executor:
        executor = (RayExecutor if kind == "ray" else LocalExecutor)(spec_for(kind, count), make)
        opened.append(executor)
        return executor

    yield open_one
    for executor in opened:
        executor.close()


def drain(executor: Executor) -> list[Result]:
    return list(iter(executor.next, None))


@pytest.mark.parametrize("count", [1, 2])
def test_every_job_comes_back_once_with_its_own_value(open_executor: Open, count: int) -> None:
    executor = open_executor(count=count)
    jobs = [Job(str(i), "echo", {"value": i}, attempt=i % 3 + 1) for i in range(20)]
    for job in jobs:
        executor.submit(job)
    results = drain(executor)
    assert sorted(int(result.job.key) for result in results) == list(range(20))
    for result in results:
        assert result.job is jobs[int(result.job.key)]
        assert result.value == int(result.job.key)
        assert result.failure is None
        assert 0 <= result.seconds < 60
        assert result.worker
    assert executor.next() is None


def test_jobs_start_in_the_order_of_submission(open_executor: Open) -> None:
    executor = open_executor(count=2)
    for i in range(8):
        executor.submit(Job(str(i), "nap", {"seconds": 0.05}))
    starts: dict[str, list[tuple[float, int]]] = {}
    for result in drain(executor):
        starts.setdefault(result.worker, []).append((result.value[0], int(result.job.key)))
    # Of two workers one may be slow to begin what it has long been given; what a worker is given is in order.
    assert sorted(key for each in starts.values() for _, key in each) == list(range(8))
    for each in starts.values():
        assert [key for _, key in sorted(each)] == sorted(key for _, key in each)


def test_one_evaluator_serves_all_jobs_of_a_worker(open_executor: Open) -> None:
    executor = open_executor()
    for i in range(3):
        executor.submit(Job(str(i), "count"))
    assert [result.value for result in drain(executor)] == [1, 2, 3]


def test_an_exception_is_a_failure_with_type_message_and_traceback(open_executor: Open) -> None:
    executor = open_executor()
    executor.submit(Job("a", "fail", {"message": "first line\nsecond line"}))
    executor.submit(Job("b", "no_such_action"))
    executor.submit(Job("c", "echo", {"value": 7}))
    first, second, third = drain(executor)
    assert first.failure is not None
    assert (first.failure.error, first.failure.message, first.failure.crashed) == ("ValueError", "first line", False)
    assert "second line" in first.failure.traceback
    assert "in fail" in first.failure.traceback
    assert first.value is None
    assert second.failure is not None
    assert second.failure.error == "AttributeError"
    assert third.value == 7


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (refuse, ModelRefused, "model 'nothing' has no weights"),
        (refuse_name, UnknownName, "no method 'gtpq'; did you mean 'gptq'? choose from gptq, rtn"),
    ],
)
def test_an_evaluator_that_cannot_be_built_ends_the_study(
    open_executor: Open, make: Callable[[StudySpec], Any], error: type[Exception], message: str
) -> None:
    executor = open_executor(make, count=2)
    executor.submit(Job("a", "echo", {"value": 1}))
    for _ in range(2):
        with pytest.raises(error) as caught:
            executor.next()
        assert type(caught.value) is error
        assert str(caught.value) == message


def test_so_does_one_whose_exception_cannot_be_pickled(open_executor: Open) -> None:
    executor = open_executor(refuse_oddly)
    executor.submit(Job("a", "echo", {"value": 1}))
    with pytest.raises(Exception, match="this and that"):
        executor.next()


def test_an_exclusive_job_runs_alone_and_in_its_place(open_executor: Open) -> None:
    executor = open_executor(count=2)
    for i in range(9):
        executor.submit(Job(str(i), "nap", {"seconds": 0.1}, exclusive=i in (0, 4, 5)))
    spans = {int(result.job.key): result.value for result in drain(executor)}
    assert len(spans) == 9
    for i in (0, 4, 5):
        start, end = spans[i]
        assert all(spans[j][1] <= start for j in range(i))
        assert all(spans[j][0] >= end for j in range(i + 1, 9))


def test_a_job_past_its_limit_is_stopped_and_the_next_one_runs(open_executor: Open) -> None:
    executor = open_executor()
    executor.submit(Job("slow", "nap", {"seconds": 60}, limit_seconds=0.5))
    executor.submit(Job("fast", "nap", {"seconds": 0.01}, limit_seconds=30))
    start = time.monotonic()
    first, second = drain(executor)
    assert time.monotonic() - start < 55  # of the 60 that it would take
    assert first.job.key == "slow"
    assert first.failure is not None
    assert (first.failure.error, first.failure.crashed) == ("TimeLimit", False)
    assert first.failure.message == "'nap' of 'slow' ran past its limit of 0.5 s"
    assert 0.5 <= first.seconds < 55
    assert (second.job.key, second.failure) == ("fast", None)


def test_a_result_is_the_callers_own(open_executor: Open) -> None:
    executor = open_executor()
    executor.submit(Job("a", "echo", {"value": np.arange(300_000, dtype=np.float64)}))
    result = executor.next()
    executor.close()
    assert result is not None
    result.value[0] = 5.0
    assert result.value.sum() == 300_000 * 299_999 / 2 + 5


def test_nothing_to_do_is_none_at_once(open_executor: Open) -> None:
    executor = open_executor()
    for timeout in (None, 0, 100):
        start = time.monotonic()
        assert executor.next(timeout) is None
        assert time.monotonic() - start < 90


def test_what_is_ready_comes_without_waiting(open_executor: Open) -> None:
    with open_executor() as executor:
        assert executor.ready() is None
        for i in range(3):
            executor.submit(Job(str(i), "echo", {"value": i}))
        found = []
        while len(found) < 3:
            result = executor.next() if not found else executor.ready() or executor.next()
            assert result is not None
            found.append(result.value)
        assert sorted(found) == [0, 1, 2]
        assert executor.ready() is None


def test_close_drops_what_is_queued_and_can_be_repeated(open_executor: Open) -> None:
    with open_executor() as executor:
        for i in range(3):
            executor.submit(Job(str(i), "nap", {"seconds": 100}))
        start = time.monotonic()
    assert executor.next() is None
    executor.close()
    executor.close()
    assert time.monotonic() - start < 90  # one of them would take longer
    with pytest.raises(AssertionError):
        executor.submit(Job("late", "echo", {"value": 1}))


@pytest.mark.slow
def test_ray_workers_run_side_by_side_and_next_keeps_its_time(ray_session: Session, tmp_path: Path) -> None:
    with RayExecutor(spec_for("ray", 2), Fake) as executor:
        for name in ("a", "b"):
            executor.submit(Job(name, "meet", {"folder": tmp_path, "name": name, "awaited": ("a", "b", "test")}))
        start = time.monotonic()
        assert executor.next(timeout=0) is None
        assert executor.next(timeout=0.2) is None
        assert time.monotonic() - start >= 0.2
        (tmp_path / "test").touch()
        assert [result.value for result in drain(executor)] == [True, True]


@pytest.mark.slow
def test_a_ray_worker_is_told_its_share_of_the_cpus(ray_session: Session) -> None:
    spec = StudySpec.model_validate({"model": {"id": "demo:smollm2"}, "workers": {"executor": "ray", "count": 2}})
    with RayExecutor(spec, Fake) as executor:
        executor.submit(Job("a", "threads"))
        result = executor.next()
    assert result is not None
    assert result.value == ray_session.cpus


@pytest.mark.slow
def test_values_that_cannot_travel_are_failures_of_the_job(ray_session: Session) -> None:
    with RayExecutor(spec_for("ray", 1), Fake) as executor:
        executor.submit(Job("a", "handle"))
        executor.submit(Job("b", "echo", {"value": 1}))
        with pytest.raises(TypeError, match="generator"):
            executor.submit(Job("c", "echo", {"value": (x for x in ())}))
        first, second = drain(executor)
    assert first.failure is not None
    assert first.failure.error == "TypeError"
    assert not first.failure.crashed
    assert second.value == 1


@pytest.mark.slow
def test_the_spec_chooses_the_executor(ray_session: Session) -> None:
    with make_executor(spec_for("local", 1)) as executor:
        assert isinstance(executor, LocalExecutor)
    with make_executor(spec_for("ray", 1)) as executor:
        assert isinstance(executor, RayExecutor)
