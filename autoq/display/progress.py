"""The progress of a running study: a live display in a terminal, a line now and then elsewhere.

Both write to standard error, so that standard output holds results alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from autoq.display import numbers
from autoq.display.tables import console
from autoq.search.observer import Observer

if TYPE_CHECKING:
    from autoq.store import TrialRecord

PLAIN_INTERVAL_SECONDS = 10.0
S = TypeVar("S", bound="Tally")

STAGES = {
    "load": "loading the model",
    "calibrate": "calibrating",
    "quantize": "quantizing layers",
    "time": "timing kernels",
    "search": "searching",
    "report": "measuring the frontier on the report data",
}


class Tally(Observer):
    """Counts what an observer shows. `best` holds the lowest or highest value of each objective so far.

    Use as a context manager: leaving it ends the display, whatever happened.
    """

    def __init__(self, maximize: frozenset[str] = frozenset()) -> None:
        self.maximize = maximize
        self.best: dict[str, tuple[float, str]] = {}
        self.failed = 0
        self.done = 0
        self.budget = 0
        self._began = time.monotonic()
        self._before = 0

    def __enter__(self: S) -> S:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the display."""

    def start_search(self, done: int) -> None:
        """Trials per minute are counted from here; `done` of them were there before."""
        self._began, self._before = time.monotonic(), done

    def count(self, trial: TrialRecord, done: int, budget: int) -> None:
        """Take one finished trial into account."""
        self.done, self.budget = done, budget
        self.failed += trial.state == "failed"
        if trial.state != "complete" or not trial.feasible:
            return
        for (name, part), measurement in trial.measurements.items():
            if part != "search":
                continue
            known = self.best.get(name)
            better = known is None or (
                measurement.value > known[0] if name in self.maximize else measurement.value < known[0]
            )
            if better:
                self.best[name] = (measurement.value, measurement.unit)

    def pace(self) -> str:
        """Trials per minute of this run, and the time that the rest will take at that pace."""
        fresh, seconds = self.done - self._before, time.monotonic() - self._began
        if fresh <= 0 or seconds <= 0:
            return ""
        left = (self.budget - self.done) * seconds / fresh
        return f"{60 * fresh / seconds:.1f} trials/min, {numbers.duration(left)} left"

    def best_line(self) -> str:
        """The best of each objective, each from a trial of its own."""
        each = (f"{name} {numbers.quantity(value, unit)}" for name, (value, unit) in self.best.items())
        return "best so far: " + ", ".join(each) if self.best else ""


def _facts(name: str, facts: Mapping[str, Any]) -> str:
    known = [f"{facts[key]} {label}" for key, label in _FACTS.items() if facts.get(key) is not None]
    model = f" of {facts['model']}" if facts.get("model") else ""
    return f"study {name}{model}" + (f": {', '.join(known)}" if known else "")


_FACTS = {
    "layers": "layers",
    "searched": "searched",
    "choices": "choices at most",
    "trials": "trials",
    "sampler": "sampler",
}


class RichObserver(Tally):
    """A bar for the stage, the pace, and the best so far, redrawn in place."""

    def __init__(self, out: Console, maximize: frozenset[str] = frozenset()) -> None:
        super().__init__(maximize)
        self.out = out
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=out,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._stage = ""
        self._live = Live(get_renderable=self._picture, console=out, transient=True, refresh_per_second=4)
        self._live.start()

    def _picture(self) -> Group:
        lines = []
        if self._stage == "search":
            failed = f", {self.failed} failed" if self.failed else ""
            lines = [Text((self.pace() + failed).lstrip(", ")), Text(self.best_line(), overflow="fold")]
        return Group(self._bar, *(line for line in lines if line.plain))

    def close(self) -> None:
        """End the display."""
        self._live.stop()

    def study(self, name: str, facts: Mapping[str, Any]) -> None:
        """Say what is searched."""
        self.out.print(Text(_facts(name, facts)))

    def stage(self, name: str, total: int | None) -> None:
        """Start over with the next stage."""
        self._stage = name
        self._bar.reset(self._task, total=total, description=STAGES.get(name, name))

    def advance(self, steps: int = 1) -> None:
        """Count steps; in the search, those of an earlier run."""
        if self._stage == "search":
            self.start_search(steps)
        self._bar.advance(self._task, steps)

    def trial(self, trial: TrialRecord, done: int, budget: int) -> None:
        """Count one more trial."""
        self.count(trial, done, budget)
        self._bar.update(self._task, completed=done, total=budget)
        if trial.error is not None:
            self.out.print(Text(f"trial {trial.number} failed: {trial.error.type}: {trial.error.message}"))

    def note(self, text: str) -> None:
        """Say one line."""
        self.out.print(Text(text))


class PlainObserver(Tally):
    """One line a stage, and one for the search every ten seconds: for logs and pipes."""

    def __init__(self, out: Console, maximize: frozenset[str] = frozenset()) -> None:
        super().__init__(maximize)
        self.out = out
        self._stage = ""
        self._last = time.monotonic()

    def _say(self, text: str) -> None:
        self.out.print(Text(text), soft_wrap=True)

    def study(self, name: str, facts: Mapping[str, Any]) -> None:
        """Say what is searched."""
        self._say(_facts(name, facts))

    def stage(self, name: str, total: int | None) -> None:
        """Start over with the next stage."""
        self._stage, self._last = name, time.monotonic()
        self._say(STAGES.get(name, name) + (f" ({total})" if total is not None and total > 1 else ""))

    def advance(self, steps: int = 1) -> None:
        """Count steps; in the search, those of an earlier run."""
        if self._stage == "search":
            self.start_search(steps)

    def trial(self, trial: TrialRecord, done: int, budget: int) -> None:
        """Count one more trial."""
        self.count(trial, done, budget)
        if trial.error is not None:
            self._say(f"trial {trial.number} failed: {trial.error.type}: {trial.error.message}")
        now = time.monotonic()
        if now - self._last >= PLAIN_INTERVAL_SECONDS or done == budget:
            self._last = now
            failed = f"{self.failed} failed" if self.failed else ""
            parts = [f"{done}/{budget} trials", failed, self.pace() if done < budget else "", self.best_line()]
            self._say("; ".join(part for part in parts if part))

    def note(self, text: str) -> None:
        """Say one line."""
        self._say(text)


def default_observer(maximize: frozenset[str] = frozenset()) -> Tally:
    """What fits standard error: the live display on a terminal, else plain lines."""
    out = console(stderr=True)
    return RichObserver(out, maximize) if out.is_terminal else PlainObserver(out, maximize)
