"""What the commands that only read are asked for, and by whom they are answered: a database, or a server.

`Reader` is the protocol. `StoreReader` answers from a store, `autoq.client.Server` over HTTP.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from autoq import documents

if TYPE_CHECKING:
    from autoq.display.hindsight import Hindsight
    from autoq.store import Store, StudyRecord, StudySummary, TrialRecord, TrialState

Limits = Mapping[str, str]


@dataclass(frozen=True)
class Frontier:
    """The frontier of a study within limits, the baselines within them, which points are no better than which beyond
    noise, and what the study's own numbers say of it."""

    study: StudyRecord
    points: list[TrialRecord]
    baselines: list[TrialRecord]
    ties: Mapping[int, Sequence[int]]
    hindsight: Hindsight

    def to_json(self) -> dict[str, Any]:
        """What `autoq frontier --json` prints."""
        return documents.document(self.study, self.points, self.ties) | self.hindsight.to_json()


class Reader(Protocol):
    """Answers what commands show. Studies are named by name or id; `NotFound` is raised for one that is not there."""

    def studies(self) -> list[tuple[StudySummary, Hindsight]]:
        """All studies, oldest first."""

    def study(self, name: str) -> StudyRecord:
        """One study."""

    def summary(self, name: str) -> StudySummary:
        """How one study stands."""

    def trials(
        self, study: str, states: Sequence[TrialState] | None, limit: int | None, with_assignments: bool
    ) -> list[TrialRecord]:
        """The trials of a study in the order of their numbers, in one of `states`, at most `limit`."""

    def frontier(self, study: str, maximum: Limits, minimum: Limits, with_assignments: bool) -> Frontier:
        """The frontier within limits."""

    def pick(self, study: str, maximum: Limits, minimum: Limits, best: str | None) -> dict[str, Any]:
        """The frontier's best trial within limits, with its assignment and `no_better_than`, as JSON."""

    def diff(self, study: str, a: str, b: str) -> dict[str, Any]:
        """What differs between two trials, each a number or a baseline's name, as JSON."""

    def report(self, study: str) -> bytes:
        """The study as one HTML file."""

    def tokens(self) -> list[dict[str, Any]]:
        """All tokens as JSON, oldest first; none of them has its secret."""

    def offered(self, what: str) -> list[dict[str, Any]]:
        """What there is to choose from: of `methods`, `targets`, `objectives` or `samplers`, as JSON."""


class StoreReader:
    """Answers from a store."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def studies(self) -> list[tuple[StudySummary, Hindsight]]:
        """All studies, oldest first."""
        from autoq.display.hindsight import stored_hindsight

        return [(summary, stored_hindsight(self.store, summary.id)) for summary in self.store.studies()]

    def study(self, name: str) -> StudyRecord:
        """One study."""
        return self.store.study(name)

    def summary(self, name: str) -> StudySummary:
        """How one study stands."""
        [found] = self.store.feed.summaries([self.store.study(name).id])
        return found

    def trials(
        self, study: str, states: Sequence[TrialState] | None, limit: int | None, with_assignments: bool
    ) -> list[TrialRecord]:
        """The trials of a study in the order of their numbers, in one of `states`, at most `limit`."""
        record = self.store.study(study)
        return self.store.trials(record.id, states=states, with_assignments=with_assignments, limit=limit)

    def frontier(self, study: str, maximum: Limits, minimum: Limits, with_assignments: bool) -> Frontier:
        """The frontier within limits."""
        from autoq.display.hindsight import hindsight
        from autoq.display.ties import stored_ties

        record = self.store.study(study)
        points = self.store.frontier(record.id, with_assignments=with_assignments)
        points, uniform = documents.within(record, points, documents.baselines(self.store, record), maximum, minimum)
        return Frontier(record, points, uniform, stored_ties(self.store, record, points), hindsight(self.store, record))

    def pick(self, study: str, maximum: Limits, minimum: Limits, best: str | None) -> dict[str, Any]:
        """The frontier's best trial within limits, with its assignment and `no_better_than`, as JSON."""
        from autoq.study import pick

        record = self.store.study(study)
        chosen = pick(record, self.store.frontier(record.id), maximum, minimum, best)
        others = documents.tied(self.store, record, chosen, maximum, minimum)
        found = self.store.trial(record.id, chosen.number).to_json()
        return found | {"no_better_than": [trial.number for trial in others]}

    def diff(self, study: str, a: str, b: str) -> dict[str, Any]:
        """What differs between two trials, each a number or a baseline's name, as JSON."""
        from autoq.display import diff

        record = self.store.study(study)
        left, right = (documents.named_trial(self.store, record, text) for text in (a, b))
        layers, caches = documents.layers(self.store, record), self.store.table(record.id, "caches")
        return diff.document(record, left, right, layers, caches)

    def report(self, study: str) -> bytes:
        """The study as one HTML file."""
        reports = importlib.import_module("autoq.dashboards.report")
        text: str = reports.html(self.store, self.store.study(study).id)
        return text.encode()

    def tokens(self) -> list[dict[str, Any]]:
        """All tokens as JSON, oldest first; none of them has its secret."""
        return [record.to_json() for record in self.store.accounts.list()]

    def offered(self, what: str) -> list[dict[str, Any]]:
        """What there is to choose from here, as JSON. No database is asked."""
        return documents.offered(what)
