from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import pytest

from autoq.errors import AutoQError, ModelRefused, UnknownName
from autoq.search.executors import Job, Result
from autoq.spec import StudySpec
from autoq.workers.actor import Loaded, Worker, machine, pack, portable, unpack
from autoq.workers.files import WantsParcels

SPEC = StudySpec.model_validate({"model": {"id": "demo:smollm2"}})


class Fake:
    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec

    def double(self, value: int) -> int:
        return 2 * value

    def lock(self) -> Any:
        return (x for x in ())


def elsewhere(worker: Worker, make: Any) -> Any:
    """What a worker on another machine answers to `load`, of a study that names no files."""
    wanted = unpack(worker.load(pack((make, SPEC)), "elsewhere", {"AUTOQ_TEST": "1"}, "gone"))
    assert wanted == WantsParcels()
    return unpack(worker.feed(pack(())))


class Odd(Exception):
    def __init__(self, one: str, two: str) -> None:
        super().__init__(f"{one} and {two}")


def raised(problem: Exception) -> Exception:
    try:
        raise problem
    except Exception as caught:
        return caught


@pytest.mark.parametrize(
    "problem", [ValueError("a"), ModelRefused("no weights"), AutoQError(), UnknownName("method", "x", ["y"])]
)
def test_an_exception_travels_with_its_type_message_and_origin(problem: Exception) -> None:
    back = unpack(portable(raised(problem)))
    assert type(back) is type(problem)
    assert str(back) == str(problem)
    assert "in raised" in back.__notes__[0]


@pytest.mark.parametrize("problem", [Odd("this", "that"), ValueError(x for x in ())], ids=["arguments", "content"])
def test_one_that_cannot_travel_keeps_its_type_and_message_in_words(problem: Exception) -> None:
    back = unpack(portable(raised(problem)))
    assert type(back) is AutoQError
    assert str(back) == f"{type(problem).__name__}: {problem}"
    assert "in raised" in back.__notes__[0]


def test_a_worker_loads_once_and_runs_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", tempfile.gettempdir())
    monkeypatch.setenv("AUTOQ_GONE", "x")
    monkeypatch.setattr("tempfile.tempdir", tempfile.tempdir)
    monkeypatch.chdir(Path.cwd())
    worker = Worker()
    environment = {"TMPDIR": str(tmp_path), "AUTOQ_GONE": None, "AUTOQ_NEVER": None}
    assert isinstance(unpack(worker.load(pack((Fake, SPEC)), machine(), environment, str(tmp_path))), Loaded)
    assert tempfile.gettempdir() == str(tmp_path)
    assert "AUTOQ_GONE" not in os.environ
    assert Path.cwd() == tmp_path
    job = Job("7", "double", {"value": 4}, attempt=2)
    result = unpack(worker.run(pack(job)))
    assert isinstance(result, Result)
    assert (result.job, result.value, result.failure, result.worker) == (job, 8, None, worker.identity()[0])


def test_a_failed_load_is_an_answer(tmp_path: Path) -> None:
    def refuse(spec: StudySpec) -> Fake:
        raise ModelRefused(f"cannot load {spec.model.id}")

    problem = elsewhere(Worker(), refuse)
    assert type(problem) is ModelRefused
    assert str(problem) == "cannot load demo:smollm2"


def test_so_is_a_folder_that_is_not_there(tmp_path: Path) -> None:
    problem = unpack(Worker().load(pack((Fake, SPEC)), machine(), {}, str(tmp_path / "gone")))
    assert type(problem) is FileNotFoundError


def test_on_another_machine_its_own_surroundings_stay() -> None:
    here = Path.cwd()
    assert isinstance(elsewhere(Worker(), Fake), Loaded)
    assert "AUTOQ_TEST" not in os.environ
    assert Path.cwd() == here


def test_a_value_that_cannot_travel_is_a_failure() -> None:
    worker = Worker()
    elsewhere(worker, Fake)
    result = unpack(worker.run(pack(Job("7", "lock"))))
    assert result.value is None
    assert result.failure.error == "TypeError"
