"""Reading studies and trials: a handful of statements, however many there are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NamedTuple, get_args

import sqlalchemy as sa

from autoq.assignment import Assignment
from autoq.errors import StoreError
from autoq.measurement import Measurement, Part
from autoq.store import models as m
from autoq.store.checksum import WAY_OUT, checksum_of_rows, own_of, row_of, spaced, unsealed
from autoq.store.clock import worker_counts
from autoq.store.members import damaged, members, members_of
from autoq.store.packing import unpack, unpack_values
from autoq.store.records import (
    StudyObjective,
    StudyRecord,
    StudyState,
    StudySummary,
    TrialError,
    TrialRecord,
    TrialState,
)

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

OWN = (  # of a trial, by the names that its record has
    *(column for column in m.trials.c if column.key not in ("assignment", "derivation")),
    m.trials.c.assignment.label("hash"),
    m.trials.c.derivation.label("derivation"),
)
_TRIAL = (
    *OWN,
    m.studies.c.name.label("study"),
    m.studies.c.members.label("members"),
    m.frontier.c.trial_id.label("frontier_id"),
)


# id, number, state, origin, baseline, duplicate_of, feasible, on the frontier, created_at, finished_at, seconds,
# sampler's attributes as JSON text
TrialRow = tuple[Any, ...]
# trial's id, objective, part, kind, value, standard error, unit, detail as JSON text
MeasurementRow = tuple[Any, ...]


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
    return unpack_values(row.windows, row.tokens, row.body)


def load_trials(
    connection: sa.Connection,
    where: Sequence[sa.ColumnElement[bool]],
    *,
    with_assignments: bool = False,
    only_frontier: bool = False,
    limit: int | None = None,
    whole: bool = False,
) -> list[TrialRecord]:
    """The trials for which all conditions hold (on `models.trials`), ordered by study and number. `whole`: the frontier
    of each study must be among them."""
    query = trial_query(where, only_frontier, limit)
    return run_trials(connection, query, with_assignments, whole=whole or only_frontier)


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
    connection: sa.Connection,
    query: TrialQuery,
    with_assignments: bool,
    parameters: Mapping[str, Any] | None = None,
    whole: bool = False,
) -> list[TrialRecord]:
    """The trials that a query finds; `whole`: with all of their studies' frontiers."""
    rows = connection.execute(query.trials, parameters).all()
    for study_id, study, stored in {(row.study_id, row.study, row.members) for row in rows}:
        ids = members(connection, study_id, study, stored)
        own = {row.id: row.frontier_id is not None for row in rows if row.study_id == study_id}
        if ids is not None and (any(on != (i in ids) for i, on in own.items()) or (whole and ids - own.keys())):
            raise damaged(study)
    measured = load_measurements(connection, query.measurements, parameters) if rows else {}
    assignments = {}
    if rows and with_assignments:
        assignments = {row.hash: unpack(row.body) for row in connection.execute(query.assignments, parameters)}
    if with_assignments and (lost := next((row for row in rows if row.hash not in assignments), None)) is not None:
        raise StoreError(
            f"trial {lost.number} of study {lost.study!r} is damaged: its assignment is not stored; {WAY_OUT}"
        )
    return [_trial(row, measured.get(row.id, {}), assignments.get(row.hash)) for row in rows]


def load_columns(
    connection: sa.Connection, where: Sequence[sa.ColumnElement[bool]], limit: int | None = None
) -> tuple[list[TrialRow], list[MeasurementRow]]:
    """Trials and their measurements as plain rows, for whoever reads all of them: a third of the time of records.

    Trials in the order of `load_trials`, measurements by trial, objective and part. JSON stays text. As records are,
    they are held against their checksums.
    """
    t, v, f = m.trials.c, m.measurements.c, m.frontier.c
    member = (f.study_id == t.study_id) & (f.trial_id == t.id)
    attrs = sa.type_coerce(t.sampler_attrs, sa.Text)
    chosen = (
        sa.select(
            *(t.id, t.number, t.state, t.origin, t.baseline, t.duplicate_of, t.feasible, f.trial_id.is_not(None)),
            *(t.created_at, t.finished_at, t.seconds, attrs),
            *(t.assignment, t.attempt, sa.type_coerce(t.violations, sa.Text), t.error_type, t.error_message),
            *(t.parent, t.checksum, t.study_id),
        )
        .select_from(m.trials.join(m.frontier, member, isouter=True))
        .where(*where)
        .order_by(t.study_id, t.number)
        .limit(limit)
    )
    rows = connection.execute(chosen).all()
    ids = chosen.with_only_columns(t.id).subquery()
    values = (v.trial_id, v.objective, v.part, v.kind, v.value, v.stderr, v.unit, sa.type_coerce(v.detail, sa.Text))
    query = sa.select(*values, v.n, v.device).join(ids, ids.c.id == v.trial_id)
    found = connection.execute(query.order_by(v.trial_id, v.objective, v.part)).all() if rows else []
    measured: dict[int, list[tuple[Any, ...]]] = {}
    for trial_id, objective, part, kind, value, stderr, unit, detail, n, device in found:
        own = (objective, part, kind, value, stderr, unit, n, device, spaced(detail))
        measured.setdefault(trial_id, []).append(own)
    known = {study_id: members_of(connection, study_id) for study_id in {row[-1] for row in rows}}
    for row in rows:
        trial_id, number, state, origin, baseline, duplicate_of, feasible, on_frontier, _, _, seconds, _ = row[:12]
        assignment, attempt, violations, error_type, error, parent, stored, study_id = row[12:]
        study, ids_there = known[study_id]
        if ids_there is not None and on_frontier != (trial_id in ids_there):
            raise damaged(study)
        if stored is not None:
            excess = json.loads(violations) if violations not in (None, "{}") else {}
            fields = (number, state, origin, baseline, assignment, duplicate_of, attempt, feasible, excess)
            ended = (error_type, error, seconds, parent)
            hold(stored, study, number, (*fields, *ended), measured.get(trial_id, ()))
        unsealed(row[11])
    return [tuple(row[:12]) for row in rows], [tuple(row[:8]) for row in found]


def hold(stored: str, study: str, number: int, own: Sequence[Any], measured: Iterable[Sequence[Any]]) -> None:
    """Raises `StoreError` where a trial's columns and measurements (of `checksum_of_rows`) have another checksum."""
    try:
        same = stored == checksum_of_rows(own, measured)
    except (TypeError, ValueError):  # a number that is a text by now
        same = False
    if not same:
        raise StoreError(
            f"trial {number} of study {study!r} is damaged: what is stored of it is not what was measured; {WAY_OUT}"
        )


def measurement_row(row: Mapping[str, Any]) -> tuple[Any, ...]:
    """What `checksum_of_rows` takes of a row of `models.measurements`."""
    return row_of(Measurement(**{name: row[name] for name in _MEASUREMENT}))


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
    columns = row._asdict()
    if row.checksum is not None:
        hold(row.checksum, row.study, row.number, own_of(columns), map(row_of, measured.values()))
    return as_record(columns | {"on_frontier": row.frontier_id is not None}, measured, assignment)


def as_record(
    columns: Mapping[str, Any], measured: dict[tuple[str, Part], Measurement], assignment: Assignment | None = None
) -> TrialRecord:
    """A trial from its columns, its assignment's `hash`, the name of its `study` and whether it is `on_frontier`."""
    error = None
    if columns["error_type"] is not None:
        error = TrialError(columns["error_type"], columns["error_message"], columns["traceback"])
    special: dict[str, Any] = {"violations": columns["violations"] or {}, "error": error, "measurements": measured}
    return TrialRecord(**{name: columns[name] for name in _COLUMNS}, **special, assignment=assignment)


_COLUMNS = [f.name for f in fields(TrialRecord) if f.name not in ("violations", "error", "measurements", "assignment")]


def load_study(connection: sa.Connection, where: sa.ColumnElement[bool]) -> StudyRecord | None:
    """The one study for which the condition holds, None if there is none."""
    row = connection.execute(sa.select(m.studies).where(where)).one_or_none()
    return None if row is None else _study(row)


def load_studies(connection: sa.Connection, ids: Sequence[int]) -> dict[int, StudyRecord]:
    """The studies of those ids by id, in one statement."""
    rows = connection.execute(sa.select(m.studies).where(m.studies.c.id.in_(ids))) if ids else ()
    return {row.id: _study(row) for row in rows}


def _study(row: Any) -> StudyRecord:
    columns = row._asdict()
    del columns["members"]
    if row.state not in get_args(StudyState):
        raise ValueError(f"study {row.name!r} is in state {row.state!r}")
    return StudyRecord(**columns | {"objectives": _objectives(row.objectives)})


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
    columns = (s.id, s.name, s.spec, s.objectives, s.state, s.message, s.changes, s.members)
    more = (s.created_at, s.started_at, s.finished_at, s.owner, s.priority, s.queued_at)
    rows = connection.execute(kept(sa.select(*columns, *more), s.id).order_by(s.id)).all()
    for row in rows:
        if row.members is not None and row.members.partition(":")[0] != str(on_frontier.get(row.id, 0)):
            raise damaged(row.name)
        if row.state not in get_args(StudyState) or not counts.get(row.id, {}).keys() <= set(get_args(TrialState)):
            raise ValueError(f"study {row.name!r} or a trial of it is in a state that there is not")
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
        for row in rows
    ]


def _objectives(stored: Sequence[Sequence[str]]) -> tuple[StudyObjective, ...]:
    return tuple(StudyObjective(*objective) for objective in stored)
