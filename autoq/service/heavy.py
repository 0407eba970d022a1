"""What the server has done by others: questions that need a model, and the running of what is queued."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from autoq.spec import StudySpec
from autoq.store import Prepared


class Backroom(Protocol):
    """A process that has the models' libraries, asked without holding up the event loop."""

    async def prepare(self, spec: StudySpec) -> Prepared:
        """Check a spec against model and target; what its study begins with. Raises `BadInput` in one line."""

    def known(self, spec: StudySpec) -> Prepared | None:
        """What `prepare` would give at once, None where it would have to ask."""

    async def offer(
        self, study_id: int, maximum: Mapping[str, Any], minimum: Mapping[str, Any], best: str | None
    ) -> dict[str, Any]:
        """What a study's model would have within limits; see `autoq.search.offers.offer_json`."""


class Scheduler(Protocol):
    """What runs the queue."""

    problem: str | None
    """Why it cannot at the moment; None: it can."""

    @property
    def alive(self) -> bool:
        """Whether it looks at the queue, and can."""

    def wake(self) -> None:
        """Something was queued or cancelled: look at once."""

    def counts(self) -> dict[str, int]:
        """What it has started, what gave way, what crashed, and its slots."""
