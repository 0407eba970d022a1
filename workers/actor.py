"""What runs in a worker process: one evaluator, built once, and one job at a time.

Everything crosses the process boundary as pickled bytes. Ray would otherwise hand out arrays that are
read-only views of its shared memory, and that memory is gone after shutdown.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import psutil
import ray
from ray import cloudpickle

from autoq import device
from autoq.assignment import Assignment
from autoq.errors import AutoQError
from autoq.search.executors import Failure, Job, Result, run
from autoq.spec import StudySpec

from .exchange import Neighbours
from .files import Parcel, Wants, WantsParcels, placed, trained_layers
from .machines import machine

Make = Callable[[StudySpec], Any]


def pack(value: object) -> bytes:
    """Pickled bytes; functions and classes that cannot be imported elsewhere travel by value."""
    packed: bytes = cloudpickle.dumps(value)
    return packed


def unpack(packed: bytes) -> Any:
    """The value that `pack` made bytes of. Both ends are this study's own processes."""
    return pickle.loads(packed)  # noqa: S301


def portable(problem: Exception) -> bytes:
    """An exception as bytes that are sure to unpack, with its traceback here as a note.

    Not every exception survives pickling; one that does not becomes an `AutoQError` with its type and
    message.
    """
    problem.add_note("in the worker:\n" + "".join(traceback.format_exception(problem)))
    try:
        packed = pack(problem)
        unpack(packed)
    except Exception:
        replacement = AutoQError(f"{type(problem).__name__}: {problem}")
        replacement.add_note(problem.__notes__[-1])
        return pack(replacement)
    return packed


class About(NamedTuple):
    """What a worker is: `host:pid`, process id, machine, Ray's name of its node, device, and bytes resident."""

    name: str
    pid: int
    machine: str
    node: str
    device: str
    memory_bytes: int


@dataclass(frozen=True)
class Loaded:
    """A worker is ready after so many seconds, on this device."""

    seconds: float
    device: str


class Worker:
    """The actor's class. `load` comes first; a job needs the evaluator that it builds.

    Either may want files of the machine of the study first: then it answers with what it wants, packed as all answers
    are, and goes on when it is given that by `feed`, which answers the same way.
    """

    def __init__(self) -> None:
        self._evaluator: Any = None
        self._name = f"{socket.gethostname()}:{os.getpid()}"
        self._elsewhere = False
        self._device = device.fingerprint()
        self._steps: Generator[Wants, bytes, bytes] | None = None

    def identity(self) -> About:
        """What this worker is now. Also asked to see whether it is alive."""
        memory = psutil.Process().memory_info().rss
        node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""
        return About(self._name, os.getpid(), machine(), node, self._device, memory)

    def load(self, recipe: bytes, home: str, environment: Mapping[str, str | None], folder: str) -> bytes:
        """Build the evaluator from packed (make, spec); gives a packed `Loaded`, or the packed exception.

        Before that, on the machine `home`, set the variables in `environment` (None: unset) and go to `folder`, so that
        paths, caches and threads are what they would be in the process that runs the study, which runs there. On
        another one have the files that the study names.
        """
        return self._begin(self._load(recipe, home, environment, folder))

    def run(self, packed: bytes) -> bytes:
        """Run a packed `Job`; gives a packed `Result`."""
        return self._begin(self._run(unpack(packed)))

    def meet(self, register: list[Any]) -> None:
        """There are workers on other machines, whose banks are asked from now on (`autoq.workers.exchange`)."""
        if (bank := getattr(self._evaluator, "bank", None)) is not None:
            bank.neighbours = Neighbours(register[0], self._name)

    def feed(self, content: bytes) -> bytes:
        """Go on with what was wanted."""
        steps = self._steps
        assert steps is not None
        return self._go_on(lambda: steps.send(content))

    def _go_on(self, step: Callable[[], Wants]) -> bytes:
        try:
            return pack(step())
        except StopIteration as end:
            self._steps = None
            answer: bytes = end.value
            return answer

    def _begin(self, steps: Generator[Wants, bytes, bytes]) -> bytes:
        self._steps = steps
        return self._go_on(lambda: next(steps))

    def _load(
        self, recipe: bytes, home: str, environment: Mapping[str, str | None], folder: str
    ) -> Generator[Wants, bytes, bytes]:
        try:
            self._elsewhere = machine() != home
            make, spec = unpack(recipe)
            if self._elsewhere:
                parcels: tuple[Parcel, ...] = unpack((yield WantsParcels()))
                spec = yield from placed(spec, parcels)
            else:
                for name, value in environment.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value
                tempfile.tempdir = None
                os.chdir(folder)
            start = time.perf_counter()
            self._evaluator = make(spec)
            self._device = getattr(self._evaluator, "fingerprint", self._device)
        except Exception as problem:
            return portable(problem)
        return pack(Loaded(time.perf_counter() - start, self._device))

    def _run(self, job: Job) -> Generator[Wants, bytes, bytes]:
        try:
            assignment = job.arguments.get("assignment")
            if self._elsewhere and isinstance(assignment, Assignment):
                yield from trained_layers(assignment)
        except AutoQError as problem:
            return pack(Result(job, None, Failure.of(problem), worker=self._name))
        result = run(self._evaluator, job, self._name)
        try:
            return pack(result)
        except Exception as problem:
            return pack(dataclasses.replace(result, value=None, failure=Failure.of(problem)))
