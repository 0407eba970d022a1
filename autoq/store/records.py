"""What the store gives back: frozen records, and the JSON shapes that CLI, API and Python share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from autoq.assignment import Assignment
from autoq.measurement import Measurement, Part

if TYPE_CHECKING:
    from autoq.spec import StudySpec

StudyState = Literal["created", "queued", "running", "finished", "interrupted", "cancelled", "failed"]
TrialState = Literal["running", "complete", "stopped", "failed", "duplicate"]
Origin = Literal["baseline", "seed", "sampler", "refine", "recover", "sequential"]


class StudyObjective(NamedTuple):
    """One objective of a study: its name, its unit, and `minimize` or `maximize`."""

    name: str
    unit: str
    direction: str

    def to_json(self) -> dict[str, str]:
        """`{"name", "unit", "direction"}`."""
        return self._asdict()


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None


def _moment(text: str | None) -> datetime | None:
    return datetime.fromisoformat(text) if text else None


_STUDY_MOMENTS = ("started_at", "finished_at", "queued_at")


def _study_fields(document: Mapping[str, Any]) -> dict[str, Any]:
    """What study and summary have in common, from their JSON."""
    plain = ("id", "state", "message", "owner", "priority", "changes")
    return {
        **{name: document[name] for name in plain},
        "name": document["study"],
        "objectives": tuple(StudyObjective(**objective) for objective in document["objectives"]),
        "created_at": datetime.fromisoformat(document["created_at"]),
        **{name: _moment(document[name]) for name in _STUDY_MOMENTS},
    }


@dataclass(frozen=True)
class StudyRecord:
    """One study, without its trials.

    `spec` is the spec as plain data, `study_spec()` the validated object. `plan` is what `save_plan`
    stored, or None. `changes` counts the changes of the study and of its trials. `owner` is the user of a server
    who submitted it, None where whoever has the database made it. `request` is what its controller shall do after
    the trials that are out: `cancel`, or `yield` to another study; None: go on.
    """

    id: int
    name: str
    spec: Mapping[str, Any]
    objectives: tuple[StudyObjective, ...]
    state: StudyState
    message: str | None
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    sampler_attrs: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    changes: int
    owner: str | None = None
    priority: int = 0
    queued_at: datetime | None = None
    request: str | None = None

    @property
    def directions(self) -> tuple[str, ...]:
        """`minimize` or `maximize` for each objective."""
        return tuple(objective.direction for objective in self.objectives)

    def study_spec(self) -> StudySpec:
        """The spec, validated again. Raises `SpecError` where this version no longer knows a field."""
        from autoq.spec import build_spec

        return build_spec(self.spec)

    def to_json(self) -> dict[str, Any]:
        """The study as one JSON document; plan and sampler state are internal and stay out."""
        return {
            "id": self.id,
            "study": self.name,
            "state": self.state,
            "message": self.message,
            "owner": self.owner,
            "priority": self.priority,
            "changes": self.changes,
            "objectives": [objective.to_json() for objective in self.objectives],
            "spec": dict(self.spec),
            "created_at": _iso(self.created_at),
            "queued_at": _iso(self.queued_at),
            "started_at": _iso(self.started_at),
            "finished_at": _iso(self.finished_at),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> StudyRecord:
        """The inverse of `to_json`, without plan and sampler state; what else the document has is left alone."""
        return cls(**_study_fields(document), spec=document["spec"], sampler_attrs={}, plan=None)


@dataclass(frozen=True)
class StudySummary:
    """One line of the list of studies: its state and how many trials ended how."""

    id: int
    name: str
    model: str
    target: str
    objectives: tuple[StudyObjective, ...]
    state: StudyState
    message: str | None
    running: int
    complete: int
    stopped: int
    failed: int
    duplicate: int
    frontier: int
    changes: int
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    owner: str | None = None
    priority: int = 0
    queued_at: datetime | None = None
    workers: int = 0  # that were seen at it lately

    def to_json(self) -> dict[str, Any]:
        """The line as JSON."""
        return {
            "id": self.id,
            "study": self.name,
            "model": self.model,
            "target": self.target,
            "state": self.state,
            "message": self.message,
            "owner": self.owner,
            "priority": self.priority,
            "changes": self.changes,
            "objectives": [objective.to_json() for objective in self.objectives],
            "trials": {
                "running": self.running,
                "complete": self.complete,
                "stopped": self.stopped,
                "failed": self.failed,
                "duplicate": self.duplicate,
            },
            "frontier": self.frontier,
            "workers": self.workers,
            "created_at": _iso(self.created_at),
            "queued_at": _iso(self.queued_at),
            "started_at": _iso(self.started_at),
            "finished_at": _iso(self.finished_at),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> StudySummary:
        """The inverse of `to_json`; what else the document has is left alone."""
        named = {name: document[name] for name in ("model", "target", "frontier")}
        return cls(**_study_fields(document), **named, **document["trials"], workers=document.get("workers", 0))


@dataclass(frozen=True)
class TrialError:
    """Why a trial failed: the exception's type, its first line and the traceback."""

    type: str
    message: str
    traceback: str

    def to_json(self) -> dict[str, str]:
        """`{"type", "message", "traceback"}`."""
        return {"type": self.type, "message": self.message, "traceback": self.traceback}


@dataclass(frozen=True)
class Descent:
    """Where a trial comes from that was made of another one: its parent's number, how it was made (any JSON), and
    the layers that no method makes again from the assignment, digest -> content."""

    parent: int
    derivation: Mapping[str, Any]
    layers: Mapping[str, bytes]


@dataclass(frozen=True)
class NewTrial:
    """A trial that is to begin; see `Store.start_trials`.

    `repeats` is the number of another trial of the study that has the same assignment: then this one ends before it
    begins, as a duplicate. `study_sampler_attrs` are what the sampler remembers of the study from now on, None where
    nothing has changed.
    """

    number: int
    assignment: Assignment
    origin: Origin
    baseline: str | None = None
    sampler_attrs: Mapping[str, Any] = field(default_factory=dict)
    study_sampler_attrs: Mapping[str, Any] | None = None
    repeats: int | None = None
    descent: Descent | None = None


@dataclass(frozen=True)
class Ending:
    """How an attempt of a trial ended: with `measurements`, of all tokens unless it was `stopped`, or by an `error`.

    Attributes that are None stay as they are. See `Store.end_trials`.
    """

    trial_id: int
    attempt: int
    seconds: float
    worker: str
    measurements: Sequence[Measurement] = ()
    violations: Mapping[str, float] = field(default_factory=dict)
    stopped: bool = False
    error: TrialError | None = None
    sampler_attrs: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TrialRecord:
    """One trial. `id` is unique in the database, `number` within its study.

    `assignment` is None unless it was asked for; `hash` is always there. `measurements` is keyed by
    (objective, part). A duplicate has no measurements of its own: `duplicate_of` is the number of the
    trial that has them. A stopped trial was seen to be worse than another one before all tokens were
    evaluated: its measurements are of the tokens that were, and their detail says so. `feasible` is
    None until the trial is complete. `violations` maps a constraint to its excess, feasible at <= 0.
    `attempt` counts dispatches. `changed` is the study's count of changes when this trial last changed. `parent` is
    the number of the trial that it was made of, and `derivation` says how; None for what was proposed.
    """

    id: int
    study_id: int
    study: str
    number: int
    state: TrialState
    origin: Origin
    baseline: str | None
    hash: str
    duplicate_of: int | None
    attempt: int
    changed: int
    feasible: bool | None
    on_frontier: bool
    violations: Mapping[str, float]
    sampler_attrs: Mapping[str, Any]
    error: TrialError | None
    worker: str | None
    seconds: float | None
    created_at: datetime
    finished_at: datetime | None
    parent: int | None = None
    derivation: Mapping[str, Any] | None = None
    measurements: Mapping[tuple[str, Part], Measurement] = field(default_factory=dict)
    assignment: Assignment | None = None

    def values(self, objectives: Iterable[str], part: Part = "search") -> tuple[float, ...]:
        """The measured values of `objectives`, in that order. Raises `KeyError` for one that is missing."""
        return tuple(self.measurements[name, part].value for name in objectives)

    def best_measurements(self) -> dict[str, Measurement]:
        """Per objective the report measurement where there is one, else the search measurement."""
        best: dict[str, Measurement] = {}
        for (name, part), measurement in self.measurements.items():
            if part == "report" or name not in best:
                best[name] = measurement
        return best

    def to_json(self) -> dict[str, Any]:
        """The trial as JSON. `search` holds the search values of what `measurements` gives as report values."""
        best = self.best_measurements()
        return {
            "study": self.study,
            "number": self.number,
            "state": self.state,
            "origin": self.origin,
            "baseline": self.baseline,
            "feasible": self.feasible,
            "on_frontier": self.on_frontier,
            "hash": self.hash,
            "duplicate_of": self.duplicate_of,
            "parent": self.parent,
            "derivation": None if self.derivation is None else dict(self.derivation),
            "assignment": None if self.assignment is None else self.assignment.untrained(),
            "measurements": {name: measurement.to_json() for name, measurement in best.items()},
            "search": {
                name: measurement.to_json()
                for (name, part), measurement in self.measurements.items()
                if part == "search" and best[name].part == "report"
            },
            "violations": dict(self.violations),
            "error": None if self.error is None else self.error.to_json(),
            "seconds": self.seconds,
            "worker": self.worker,
            "created_at": _iso(self.created_at),
            "finished_at": _iso(self.finished_at),
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> TrialRecord:
        """The inverse of `to_json`; what a document does not say (ids, sampler state) is 0 or empty."""
        plain = (
            *("study", "number", "state", "origin", "baseline", "hash", "duplicate_of", "feasible", "on_frontier"),
            *("violations", "worker", "seconds", "parent", "derivation"),
        )
        told = {name: Measurement.from_json(name, found) for name, found in document["measurements"].items()}
        told_of_search = {name: Measurement.from_json(name, found) for name, found in document["search"].items()}
        measured = [*told_of_search.values(), *told.values()]
        return cls(
            **{name: document[name] for name in plain},
            id=0,
            study_id=0,
            attempt=0,
            changed=0,
            sampler_attrs={},
            error=None if document["error"] is None else TrialError(**document["error"]),
            created_at=datetime.fromisoformat(document["created_at"]),
            finished_at=_moment(document["finished_at"]),
            measurements={(m.objective, m.part): m for m in measured},
            assignment=None if document["assignment"] is None else Assignment.from_dict(document["assignment"]),
        )
