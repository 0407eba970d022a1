"""The progress of a running study: a live display in a terminal, a line now and then elsewhere.

Both write to standard error, so that standard output holds results alone.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from autoq.display import numbers
from autoq.display.compare import gains, quality_objective
from autoq.display.tables import console
from autoq.search.observer import Observer
from autoq.search.sampler_view import ENDED, sampler_view

if TYPE_CHECKING:
    from autoq.store import StudyObjective, TrialRecord

PLAIN_INTERVAL_SECONDS = 10.0
S = TypeVar("S", bound="Tally")

STAGES = {
    "load": "loading the model",
    "calibrate": "calibrating",
    "quantize": "quantizing layers",
    "time": "timing kernels",
    "search": "searching",
    "recover": "training",
    "sequence": "quantizing block after block",
    "report": "measuring the frontier on the report data",
}


class Tally(Observer):
    """Counts what an observer shows. `best` says in one line what the search has found so far, `view` what
    the sampler's own predictions were worth.

    Use as a context manager: leaving it ends the display, whatever happened.
    """

    def __init__(self, objectives: Sequence[StudyObjective] = ()) -> None:
        self.objectives = objectives
        self.best = self.view = ""
        self._proposed: list[TrialRecord] = []
        self._frontier: list[TrialRecord] = []
        self._baselines: list[TrialRecord] = []
        self.failed = self.stopped = 0
        self.done = 0
        self.budget = 0
        self._loss: float | None = None
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

    def count_step(self, step: int, steps: int, loss: float, seconds_left: float) -> str:
        """Take one step of a training into account; how it stands, in one line."""
        # One step sees little text: what is shown is a running mean.
        self._loss = loss if self._loss is None else 0.9 * self._loss + 0.1 * loss
        left = f", {numbers.duration(seconds_left)} left" if step < steps else ""
        return f"step {step}/{steps}, loss {self._loss:.4g}{left}"

    def start_search(self, done: int) -> None:
        """Trials per minute are counted from here; `done` of them were there before."""
        self._began, self._before = time.monotonic(), done

    def count(self, trial: TrialRecord, done: int, budget: int) -> None:
        """Take one finished trial into account."""
        self.done, self.budget = done, budget
        self.failed += trial.state == "failed"
        self.stopped += trial.state == "stopped"
        quality = quality_objective(self.objectives)
        if trial.origin == "sampler" and trial.state in ENDED and quality is not None:
            self._proposed.append(trial)
            self.view = str(sampler_view(self._proposed, quality.name) or "")
        if trial.state != "complete":
            return
        if trial.baseline is not None:
            self._baselines.append(trial)
        elif trial.on_frontier:
            self._frontier.append(trial)
        else:
            return
        found = gains(self._frontier, self._baselines, self.objectives)
        self.best = f"best so far: {found[0] if found else self._extremes()}"

    def ended(self) -> str:
        """How many trials ended otherwise than complete."""
        counts = ((self.stopped, "stopped early"), (self.failed, "failed"))
        return ", ".join(f"{count} {how}" for count, how in counts if count)

    def _extremes(self) -> str:
        """The best of each objective among searched trials, each from a trial of its own."""
        each = []
        for objective in self.objectives if self._frontier else ():
            values = [trial.values([objective.name])[0] for trial in self._frontier]
            best = min(values) if objective.direction == "minimize" else max(values)
            each.append(f"{objective.name} {numbers.quantity(best, objective.unit)}")
        return ", ".join(each) or "uniform baselines only"

    def pace(self) -> str:
        """Trials per minute of this run, and the time that the rest will take at that pace."""
        fresh, seconds = self.done - self._before, time.monotonic() - self._began
        if fresh <= 0 or seconds <= 0:
            return ""
        left = (self.budget - self.done) * seconds / fresh
        return f"{60 * fresh / seconds:.1f} trials/min, {numbers.duration(left)} left"


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

    def __init__(self, out: Console, objectives: Sequence[StudyObjective] = ()) -> None:
        super().__init__(objectives)
        self.out = out
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=out,
        )
        self._task = self._bar.add_task("starting", total=None)
        self._stage = self._training = ""
        self._live = Live(get_renderable=self._picture, console=out, transient=True, refresh_per_second=4)
        self._live.start()

    def _picture(self) -> Group:
        lines = []
        if self._stage == "search":
            lines = [Text(", ".join(filter(None, (self.pace(), self.ended())))), Text(self.best, overflow="fold")]
            lines.append(Text(self.view, overflow="fold"))
        elif self._stage == "recover":
            lines = [Text(self._training)]
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

    def trained(self, step: int, steps: int, loss: float, seconds_left: float) -> None:
        """Count one more step."""
        self._training = self.count_step(step, steps, loss, seconds_left)
        self._bar.update(self._task, completed=step, total=steps)

    def note(self, text: str) -> None:
        """Say one line."""
        self.out.print(Text(text))


class PlainObserver(Tally):
    """One line a stage, and one every ten seconds within it: for logs and pipes."""

    def __init__(self, out: Console, objectives: Sequence[StudyObjective] = ()) -> None:
        super().__init__(objectives)
        self.out = out
        self._stage = ""
        self._last = time.monotonic()
        self._steps, self._total = 0, 0

    def _due(self) -> bool:
        """Whether it is time for another line; if so, the next one is due ten seconds from now."""
        now = time.monotonic()
        due = now - self._last >= PLAIN_INTERVAL_SECONDS
        self._last = now if due else self._last
        return due

    def _say(self, text: str) -> None:
        self.out.print(Text(text), soft_wrap=True)

    def study(self, name: str, facts: Mapping[str, Any]) -> None:
        """Say what is searched."""
        self._say(_facts(name, facts))

    def stage(self, name: str, total: int | None) -> None:
        """Start over with the next stage."""
        self._stage, self._last = name, time.monotonic()
        self._steps, self._total = 0, total or 0
        self._say(STAGES.get(name, name) + (f" ({total})" if total is not None and total > 1 else ""))

    def advance(self, steps: int = 1) -> None:
        """Count steps; in the search, those of an earlier run."""
        if self._stage == "search":
            self.start_search(steps)
            return
        self._steps += steps
        if self._steps < self._total and self._due():
            self._say(f"{STAGES.get(self._stage, self._stage)}: {self._steps}/{self._total}")

    def trial(self, trial: TrialRecord, done: int, budget: int) -> None:
        """Count one more trial."""
        self.count(trial, done, budget)
        if trial.error is not None:
            self._say(f"trial {trial.number} failed: {trial.error.type}: {trial.error.message}")
        if self._due() or done == budget:
            parts = [
                f"{done}/{budget} trials",
                self.ended(),
                self.pace() if done < budget else "",
                self.best,
                self.view,
            ]
            self._say("; ".join(part for part in parts if part))

    def trained(self, step: int, steps: int, loss: float, seconds_left: float) -> None:
        """Count one more step. The first tells where the training stands and how long it will take."""
        first = self._loss is None
        line = self.count_step(step, steps, loss, seconds_left)
        if self._due() or first or step == steps:
            self._say(line)

    def note(self, text: str) -> None:
        """Say one line."""
        self._say(text)


def default_observer(objectives: Sequence[StudyObjective] = ()) -> Tally:
    """What fits standard error: the live display on a terminal, else plain lines."""
    out = console(stderr=True)
    return RichObserver(out, objectives) if out.is_terminal else PlainObserver(out, objectives)
