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
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ray import cloudpickle

from autoq.errors import AutoQError
from autoq.search.executors import Failure, Job, run
from autoq.spec import StudySpec

Make = Callable[[StudySpec], Any]


def pack(value: object) -> bytes:
    """Pickled bytes; functions and classes that cannot be imported elsewhere travel by value."""
    packed: bytes = cloudpickle.dumps(value)
    return packed


def unpack(packed: bytes) -> Any:
    """The value that `pack` made bytes of. Both ends are this study's own processes."""
    return pickle.loads(packed)  # noqa: S301


def machine() -> str:
    """What tells this machine, or container, from others: its name and the run of its kernel."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{socket.gethostname()} {boot.read_text().strip() if boot.is_file() else ''}"


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


class Worker:
    """The actor's class. `load` comes first; a job needs the evaluator that it builds."""

    def __init__(self) -> None:
        self._evaluator: Any = None
        self._name = f"{socket.gethostname()}:{os.getpid()}"

    def identity(self) -> tuple[str, int]:
        """`host:pid`, and the process id. Also asked to see whether the worker is alive."""
        return self._name, os.getpid()

    def load(self, recipe: bytes, home: str, environment: Mapping[str, str | None], folder: str) -> bytes:
        """Build the evaluator from packed (make, spec); gives a packed None, or the packed exception.

        Before that, on the machine `home`, set the variables in `environment` (None: unset) and go to `folder`, so that
        paths, caches and threads are what they would be in the process that runs the study, which runs there.
        """
        try:
            if machine() == home:
                for name, value in environment.items():
                    if value is None:
                        os.environ.pop(name, None)
                    else:
                        os.environ[name] = value
                tempfile.tempdir = None
                os.chdir(folder)
            make, spec = unpack(recipe)
            self._evaluator = make(spec)
        except Exception as problem:
            return portable(problem)
        return pack(None)

    def run(self, packed: bytes) -> bytes:
        """Run a packed `Job`; gives a packed `Result`."""
        job: Job = unpack(packed)
        result = run(self._evaluator, job, self._name)
        try:
            return pack(result)
        except Exception as problem:
            return pack(dataclasses.replace(result, value=None, failure=Failure.of(problem)))
