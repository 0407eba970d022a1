"""Reading studies and trials: a handful of statements, however many there are."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import sqlalchemy as sa

from autoq.assignment import Assignment
from autoq.errors import StoreError
from autoq.measurement import Measurement, Part
from autoq.store import models as m
from autoq.store.checksum import checksum
from autoq.store.clock import worker_counts
from autoq.store.records import StudyObjective, StudyRecord, StudySummary, TrialError, TrialRecord, TrialState

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_TRIAL = (
    *(column for column in m.trials.c if column.name != "assignment"),
    m.trials.c.assignment.label("hash"),
    m.studies.c.name.label("study"),
    m.frontier.c.trial_id.label("frontier_id"),
)


# id, number, state, origin, baseline, duplicate_of, feasible, on the frontier, created_at, finished_at, seconds,
# sampler's attributes as JSON text
TrialRow = tuple[Any, ...]
# trial's id, objective, part, kind, value, standard error, unit, detail as JSON text
MeasurementRow = tuple[Any, ...]


def pack(assignment: Assignment) -> bytes:
    """The stored form: zlib of the canonical JSON. 210 layers are 10 KB of JSON and about 1 KB of this."""
    return zlib.compress(assignment.json.encode(), level=9)


def unpack(body: bytes) -> Assignment:
    """The inverse of `pack`."""
    return Assignment.from_json(zlib.decompress(body).decode())


def pack_values(values: NDArray[np.float32]) -> dict[str, Any]:
    """The stored form of values (windows, tokens). What was not evaluated is NaN and takes no room."""
    windows, tokens = values.shape
    return {"windows": windows, "tokens": tokens, "body": zlib.compress(values.astype("<f4").tobytes())}


def load_values(
    connection: sa.Connection, study_id: int, number: int, objective: str, part: Part
) -> NDArray[np.float32] | None:
    """The values (windows, tokens) behind one measurement, None where none are stored."""
    v, t = m.token_values, m.trials.c
    query = sa.select(v.c.windows, v.c.tokens, v.c.body).select_from(v.join(m.trials))
    query = query.where(t.study_id == study_id, t.number == number, v.c.objective == objective, v.c.part == part)
    row = connection.execute(query).one_or_none()
    if row is None:
        return None
    import numpy as np

    return np.frombuffer(zlib.decompress(row.body), "<f4").reshape(row.windows, row.tokens).astype(np.float32)


def load_trials(
    connection: sa.Connection,
    where: Sequence[sa.ColumnElement[bool]],
    *,
    with_assignments: bool = False,
    only_frontier: bool = False,
    limit: int | None = None,
) -> list[TrialRecord]:
    """The trials for which all conditions hold (on `models.trials`), ordered by study and number."""
    return run_trials(connection, trial_query(where, only_frontier, limit), with_assignments)


class TrialQuery(NamedTuple):
    """Statements that find trials, their measurements and their assignments."""

    trials: sa.Select[Any]
    measurements: sa.Select[Any]
    assignments: sa.Select[Any]


def trial_query(
    where: Sequence[sa.ColumnElement[bool]], only_frontier: bool = False, limit: int | None = None
) -> TrialQuery:
    """What `run_trials` runs; conditions may have parameters."""
    joined = m.trials.join(m.studies).join(
        m.frontier,
        (m.frontier.c.study_id == m.trials.c.study_id) & (m.frontier.c.trial_id == m.trials.c.id),
        isouter=not only_frontier,
    )
    chosen = (
        sa.select(*_TRIAL)
        .select_from(joined)
        .where(*where)
        .order_by(m.trials.c.study_id, m.trials.c.number)
        .limit(limit)
    )
    ids = chosen.with_only_columns(m.trials.c.id, m.trials.c.assignment).subquery()
    v, a = m.measurements, m.assignments
    measured = sa.select(v).join(ids, ids.c.id == v.c.trial_id).order_by(v.c.trial_id, v.c.objective, v.c.part)
    wanted = sa.select(ids.c.assignment).distinct().subquery()
    return TrialQuery(chosen, measured, sa.select(a).join(wanted, wanted.c.assignment == a.c.hash))


def run_trials(
    connection: sa.Connection, query: TrialQuery, with_assignments: bool, parameters: Mapping[str, Any] | None = None
) -> list[TrialRecord]:
    """The trials that a query finds."""
    rows = connection.execute(query.trials, parameters).all()
    measured = load_measurements(connection, query.measurements, parameters) if rows else {}
    assignments = {}
    if rows and with_assignments:
        assignments = {row.hash: unpack(row.body) for row in connection.execute(query.assignments, parameters)}
    if with_assignments and (lost := next((row for row in rows if row.hash not in assignments), None)) is not None:
        raise StoreError(f"trial {lost.number} of study {lost.study!r} is damaged: its assignment is not stored")
    return [_trial(row, measured.get(row.id, {}), assignments.get(row.hash)) for row in rows]


def load_columns(
    connection: sa.Connection, where: Sequence[sa.ColumnElement[bool]], limit: int | None = None
) -> tuple[list[TrialRow], list[MeasurementRow]]:
    """Trials and their measurements as plain rows, for whoever reads all of them: a fifth of the time of records.

    Trials in the order of `load_trials`, measurements by trial, objective and part. JSON stays text.
    """
    t, v, f = m.trials.c, m.measurements.c, m.frontier.c
    member = (f.study_id == t.study_id) & (f.trial_id == t.id)
    attrs = sa.type_coerce(t.sampler_attrs, sa.Text)
    chosen = (
        sa.select(
            *(t.id, t.number, t.state, t.origin, t.baseline, t.duplicate_of, t.feasible, f.trial_id.is_not(None)),
            *(t.created_at, t.finished_at, t.seconds, attrs),
        )
        .select_from(m.trials.join(m.frontier, member, isouter=True))
        .where(*where)
        .order_by(t.study_id, t.number)
        .limit(limit)
    )
    rows = [tuple(row) for row in connection.execute(chosen)]
    ids = chosen.with_only_columns(t.id).subquery()
    values = (v.trial_id, v.objective, v.part, v.kind, v.value, v.stderr, v.unit, sa.type_coerce(v.detail, sa.Text))
    query = sa.select(*values).join(ids, ids.c.id == v.trial_id).order_by(v.trial_id, v.objective, v.part)
    return rows, [tuple(row) for row in connection.execute(query)] if rows else []


def load_measurements(
    connection: sa.Connection, query: sa.Select[Any], parameters: Mapping[str, Any] | None = None
) -> dict[int, dict[tuple[str, Part], Measurement]]:
    """Trial's id -> its measurements, from a query for rows of `models.measurements`."""
    found: dict[int, dict[tuple[str, Part], Measurement]] = {}
    for row in connection.execute(query, parameters):
        trial_id, *values = row
        fields = dict(zip(_MEASUREMENT, values, strict=True))
        found.setdefault(trial_id, {})[fields["objective"], fields["part"]] = Measurement(**fields)
    return found


# One trial by study and number, put together once: it is read after every result.
ONE_TRIAL = trial_query((m.trials.c.study_id == sa.bindparam("of"), m.trials.c.number == sa.bindparam("at")))

# The columns are the fields of `Measurement`, but for the trial and the values per token.
_MEASUREMENT = [column.name for column in m.measurements.c][1:]


def _trial(row: Any, measured: dict[tuple[str, Part], Measurement], assignment: Assignment | None) -> TrialRecord:
    if row.checksum is not None and row.checksum != checksum(row._asdict(), measured.values()):
        raise StoreError(
            f"trial {row.number} of study {row.study!r} is damaged: what is stored of it is not what was measured; "
            "go back to a copy of the database"
        )
    error = None
    if row.error_type is not None:
        error = TrialError(row.error_type, row.error_message, row.traceback)
    return TrialRecord(
        id=row.id,
        study_id=row.study_id,
        study=row.study,
        number=row.number,
        state=row.state,
        origin=row.origin,
        baseline=row.baseline,
        hash=row.hash,
        duplicate_of=row.duplicate_of,
        attempt=row.attempt,
        changed=row.changed,
        feasible=row.feasible,
        on_frontier=row.frontier_id is not None,
        violations=row.violations or {},
        sampler_attrs=row.sampler_attrs,
        error=error,
        worker=row.worker,
        seconds=row.seconds,
        created_at=row.created_at,
        finished_at=row.finished_at,
        parent=row.parent,
        derivation=row.derivation,
        measurements=measured,
        assignment=assignment,
    )


def load_study(connection: sa.Connection, where: sa.ColumnElement[bool]) -> StudyRecord | None:
    """The one study for which the condition holds, None if there is none."""
    row = connection.execute(sa.select(m.studies).where(where)).one_or_none()
    return None if row is None else _study(row)


def load_studies(connection: sa.Connection, ids: Sequence[int]) -> dict[int, StudyRecord]:
    """The studies of those ids by id, in one statement."""
    rows = connection.execute(sa.select(m.studies).where(m.studies.c.id.in_(ids))) if ids else ()
    return {row.id: _study(row) for row in rows}


def _study(row: Any) -> StudyRecord:
    return StudyRecord(**row._asdict() | {"objectives": _objectives(row.objectives)})


def load_summaries(connection: sa.Connection, ids: Sequence[int] | None = None) -> list[StudySummary]:
    """All studies, or those of `ids`, oldest first, with their counts: as many statements for any number of them."""
    t, f, s = m.trials.c, m.frontier.c, m.studies.c

    def kept(query: sa.Select[Any], column: sa.ColumnElement[int]) -> sa.Select[Any]:
        return query if ids is None else query.where(column.in_(ids))

    ended = kept(sa.select(t.study_id, t.state, sa.func.count()), t.study_id).group_by(t.study_id, t.state)
    counts: dict[int, dict[str, int]] = {}
    for study_id, state, count in connection.execute(ended):
        counts.setdefault(study_id, {})[state] = count
    workers = worker_counts(connection)
    members = kept(sa.select(f.study_id, sa.func.count()), f.study_id).group_by(f.study_id)
    on_frontier = {row[0]: row[1] for row in connection.execute(members)}
    columns = (s.id, s.name, s.spec, s.objectives, s.state, s.message, s.changes)
    more = (s.created_at, s.started_at, s.finished_at, s.owner, s.priority, s.queued_at)
    query = kept(sa.select(*columns, *more), s.id).order_by(s.id)
    return [
        StudySummary(
            id=row.id,
            name=row.name,
            model=row.spec["model"]["id"],
            target=row.spec["target"]["name"],
            objectives=_objectives(row.objectives),
            state=row.state,
            message=row.message,
            **{state: counts.get(row.id, {}).get(state, 0) for state in get_args(TrialState)},
            frontier=on_frontier.get(row.id, 0),
            workers=workers.get(row.id, 0),
            changes=row.changes,
            created_at=row.created_at,
            started_at=row.started_at,
            finished_at=row.finished_at,
            owner=row.owner,
            priority=row.priority,
            queued_at=row.queued_at,
        )
        for row in connection.execute(query)
    ]


def _objectives(stored: Sequence[Sequence[str]]) -> tuple[StudyObjective, ...]:
    return tuple(StudyObjective(*objective) for objective in stored)
