"""What a running study tells whoever watches: the command line, a notebook, a log."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoq.store import TrialRecord


class Observer:
    """Gets every step of a study as it happens. Does nothing by itself; override what you show.

    A trial is in the database before it is told of here.
    """

    def study(self, name: str, facts: Mapping[str, Any]) -> None:
        """The study starts or goes on: model, layers, free layers, choices, trials done, sampler …"""

    def stage(self, name: str, total: int | None) -> None:
        """A stage begins, of so many steps: `load`, `calibrate`, `quantize`, `time`, `search`, `recover`, `sequence` or
        `report`."""

    def advance(self, steps: int = 1) -> None:
        """So many steps of the current stage are done."""

    def trial(self, trial: TrialRecord, done: int, budget: int) -> None:
        """A trial ended (complete, stopped, failed or duplicate) and is stored; `done` of `budget` trials count."""

    def reported(self, trial: TrialRecord) -> None:
        """A frontier point has its report measurements."""

    def trained(self, step: int, steps: int, loss: float, seconds_left: float) -> None:
        """A training took step number `step` of `steps`, at a mean loss of `loss` over what it saw in it."""

    def note(self, text: str) -> None:
        """One line worth knowing."""
