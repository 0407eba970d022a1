"""Patience with a database that is away: what writes under a lease waits for it and goes on.

    store = store.under(study_id, epoch, Patience(600.0))
    store.finish_trial(...)      # returns once the result is stored, however often the server went down meanwhile

`steady` makes every method of a class begin again where the database went away in the middle of it (`StoreAway`),
after a pause that grows from a tenth of a second to five, until `seconds` are over; then the error goes out, with the
time that was waited. Without patience, which is how a server and the command line open a database, the first error
goes out.

A method may begin again because nothing of it was stored: a transaction that did not come to its commit never is. Where
the connection dies between a commit and its answer nobody knows, and PostgreSQL's own word (`pg_xact_status`) is not
reliable after a crash, which may give a transaction's number to another one. So a transaction on a study under a lease
writes a number of its own into the lease, and whoever is in doubt reads it back (`Database.writing`). What takes no
lock on a study can be repeated as it is: it replaces.
"""

from __future__ import annotations

import functools
import inspect
import random
import time
from collections.abc import Callable
from typing import Any, TypeVar

from autoq.errors import StoreAway

FIRST_SECONDS, MOST_SECONDS = 0.1, 5.0
_Class = TypeVar("_Class", bound=type)


class Patience:
    """How long one study waits for its database, and what it says while it does.

    `keeps` names what is held in memory meanwhile; `advice` says what to do where the wait was in vain. `tell` gets one
    line when a wait begins and one when it is over.
    """

    def __init__(self, seconds: float, advice: str = "") -> None:
        self.seconds, self.advice = seconds, advice
        self.keeps = ""
        self.tell: Callable[[str], None] = lambda _: None
        self.waits = 0  # outages that were waited for
        self._since: float | None = None  # on the monotonic clock
        self._pauses = 0
        self._over = False

    def end(self) -> None:
        """Wait no more: who runs the study wants it to end."""
        self._over = True

    def wait(self, problem: StoreAway) -> None:
        """Pause after a failure. Raises `StoreAway` once the time is over, and goes on to do so."""
        now = time.monotonic()
        if self._over or self.seconds <= 0:
            raise problem
        if self._since is None:
            self._since, self._pauses, self.waits = now, 0, self.waits + 1
            kept = f"; {self.keeps} is kept" if self.keeps else ""
            self.tell(f"{problem}; waiting for it, {_shown(self.seconds)} at most{kept}")
        if now - self._since >= self.seconds:
            self._over = True
            lost = f"; {self.keeps} could not be stored" if self.keeps else ""
            raise StoreAway(f"{problem}, after {_shown(self.seconds)} of waiting{lost}{self.advice}") from problem
        pause = min(MOST_SECONDS, FIRST_SECONDS * 2.0 ** min(self._pauses, 10)) * random.uniform(0.5, 1.0)  # noqa: S311
        self._pauses += 1
        try:
            time.sleep(min(pause, self._since + self.seconds - now))
        except BaseException:  # an interrupt: what is done of it must not wait again
            self._over = True
            raise

    def answered(self) -> None:
        """The database has answered."""
        if self._since is not None:
            waited, self._since = time.monotonic() - self._since, None
            self.tell(f"the database answers again, after {_shown(waited)}")


def _shown(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s" if seconds >= 1 else f"{seconds:.1f} s"


def steady(kind: _Class) -> _Class:
    """Let the public methods of a class of the store, inherited ones too, begin again while its patience lasts."""
    for name in dir(kind):
        method = inspect.getattr_static(kind, name)
        if inspect.isfunction(method) and not name.startswith("_"):
            setattr(kind, name, _again(method))
    return kind


def _again(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        patience: Patience | None = self._database.patience
        if patience is None:
            return method(self, *arguments, **named)
        while True:
            try:
                found = method(self, *arguments, **named)
            except StoreAway as problem:
                patience.wait(problem)
            else:
                patience.answered()
                return found

    return call
