"""What the queue takes and gives back: frozen records with the JSON that API and command line share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from typing import Any, Literal, NamedTuple

ExportState = Literal["queued", "running", "finished", "failed", "removed"]
WorkerState = Literal["loading", "idle", "busy"]
RequestKind = Literal["cancel", "yield"]
JOB, CLOCK, CRASHES, LOG = "job", "clock", "crashes", "log"  # tables of a study that the queue keeps
LOADING = "loading"  # how long its model took to load
RUN: Mapping[str, Any] = {"kind": "run"}
WAITS = ("queued", "running")


@dataclass(frozen=True)
class Prepared:
    """What a checked spec becomes a study with: all of it JSON.

    `objectives` are (name, unit, `minimize` or `maximize`), `tables` the study's tables by name. `facts` say what the
    check found: layers, variables, choices, the least and the largest size.
    """

    objectives: Sequence[Sequence[str]]
    tables: Mapping[str, Any]
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Prepared:
        """The inverse of `to_json`."""
        return cls(**data)


@dataclass(frozen=True)
class LeaseRecord:
    """Who runs a study: `holder` names a process (see `store.holders`), None once it has let go. `epoch` counts the
    holders that the study has had; `until` is when the lease ends unless it is renewed, on the clock of leases, and
    `live` whether it has not ended and its holder is not known to be dead."""

    study_id: int
    holder: str | None
    epoch: int
    until: datetime
    live: bool


class RemovalRecord(NamedTuple):
    """A study that was removed: the number and name it had, whose it was, how many trials went with it, by whom."""

    id: int
    name: str
    owner: str | None
    trials: int
    user: str | None
    removed_at: datetime

    def to_json(self) -> dict[str, Any]:
        """As API and command line tell it."""
        told = self._asdict() | {"study": self.name, "removed_at": self.removed_at.isoformat()}
        del told["name"]
        return told


class StudyInLine(NamedTuple):
    """A study that waits: whose it is, and what its place depends on."""

    id: int
    owner: str | None
    priority: int
    queued_at: datetime


@dataclass(frozen=True)
class WorkerRecord:
    """A process that evaluates, as its controller last saw it. `id` is `host:pid`; `trial` is the number of the trial
    that it is at."""

    id: str
    node: str
    device: str
    state: WorkerState
    study_id: int | None = None
    study: str | None = None
    trial: int | None = None
    memory_bytes: int | None = None
    started_at: datetime | None = None
    seen_at: datetime | None = None

    def to_json(self) -> dict[str, Any]:
        """The worker as JSON."""
        return _plain(self)


@dataclass(frozen=True)
class ExportRecord:
    """One export. `progress` says what it is at; `result` has `manifest`, `verify` and `lines` once it is finished."""

    id: int
    study_id: int
    study: str
    trial: int
    target: str
    user: str | None
    state: ExportState
    message: str | None
    progress: Mapping[str, Any] | None
    result: Mapping[str, Any] | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None

    def to_json(self) -> dict[str, Any]:
        """The export as JSON. Which process writes it is nobody's business."""
        told = _plain(self)
        if self.progress is not None:
            told["progress"] = {key: value for key, value in self.progress.items() if key in ("stage", "since")}
        return told


def _plain(record: Any) -> dict[str, Any]:
    return {name: value.isoformat() if isinstance(value, datetime) else value for name, value in vars(record).items()}
