"""What can go wrong, as one small family of exceptions.

Every error that a user can cause or meet derives from `AutoQError`. The docstring of a class is its
default message. `exit_code` is what the command line ends with: 1 for a failure, 2 for bad input.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Iterable
from typing import Any


class AutoQError(Exception):
    """Something failed; run again with --debug for the traceback."""

    exit_code = 1
    field: str | None = None  # which one of the input it is about, as a path, where that is known

    def __init__(self, message: str | None = None) -> None:
        super().__init__(message or inspect.cleandoc(self.__doc__ or ""))

    def __reduce__(self) -> tuple[Any, ...]:
        # Errors cross process boundaries, and children's constructors take other arguments.
        return _restored, (type(self), str(self)), self.__dict__


def _restored(kind: type[AutoQError], message: str) -> AutoQError:
    problem = kind.__new__(kind)
    AutoQError.__init__(problem, message)
    return problem


class BadInput(AutoQError):
    """The input is not usable."""

    exit_code = 2


def restore(name: str, message: str) -> AutoQError:
    """The error of the class of that name, which another process met; an `AutoQError` where there is none."""
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, AutoQError):
        return _restored(kind, message)
    return AutoQError(f"{name}: {message}")


class UnknownName(BadInput):
    """A name that is not among the choices."""

    def __init__(self, kind: str, name: object, choices: Iterable[str]) -> None:
        known = sorted(choices)
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"; did you mean {near[0]!r}? choose" if near else "; choose"
        listed = ", ".join(known) or "(there are none)"
        super().__init__(f"no {kind} {str(name)!r}{hint} from {listed}")


class SpecError(BadInput):
    """The study spec is not valid."""


class SchemeRefused(BadInput):
    """A scheme that a method or a target cannot run on a layer."""


class ModelRefused(BadInput):
    """The model cannot be used."""


class DataRefused(BadInput):
    """The data cannot be used."""


class NotFound(BadInput):
    """There is no such study or trial."""


class StoreError(AutoQError):
    """The database cannot be used."""


class StoreAway(StoreError):
    """The database does not answer."""


class NotFinite(AutoQError):
    """A measurement came out as NaN or infinite."""


class KernelMismatch(AutoQError):
    """A kernel does not compute what the dequantized weights compute."""


class ExportBroken(AutoQError):
    """The export is not what was written."""


class WorkerLost(AutoQError):
    """A worker died while it evaluated an assignment."""


class Conflict(BadInput):
    """What is asked for does not go with what is there."""


class LimitReached(AutoQError):
    """There is as much as is allowed already."""


class GaveUp(AutoQError):
    """It took more time or memory than it may."""


class Unavailable(AutoQError):
    """What is to answer cannot at the moment."""


class StudyBusy(AutoQError):
    """Another process runs the study."""


class LeaseLost(AutoQError):
    """Another process runs the study now; this one stops and writes nothing more."""


class Stopped(AutoQError):
    """The study was asked to stop."""
