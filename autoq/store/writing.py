"""What a write does inside its transaction. Every function locks the study's row first, by `lock`."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, get_args

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import postgresql, sqlite

from autoq.assignment import Assignment
from autoq.errors import LeaseLost, NotFinite, NotFound, StoreError
from autoq.measurement import Measurement
from autoq.store import dominance, members
from autoq.store import models as m
from autoq.store.checksum import checksum, members_checksum
from autoq.store.database import fence_of
from autoq.store.loading import load_measurements, load_trials, pack, pack_values
from autoq.store.records import Descent, StudyState, TrialRecord

_TEXT_LIMIT = 65536


# What every result needs, made once: putting a statement together takes as long as running it.
_KEY = sa.bindparam("key", type_=sa.Integer)
_COUNTED = sa.update(m.studies).values(changes=m.studies.c.changes + 1)
_COUNTED = _COUNTED.returning(*(m.studies.c[name] for name in ("id", "name", "objectives", "changes", "members")))
_COUNT = _COUNTED.where(m.studies.c.id == _KEY)
# A trial never moves to another study, so looking it up in the same statement is looking it up under the lock.
_COUNT_OF_TRIAL = _COUNTED.where(
    m.studies.c.id == sa.select(m.trials.c.study_id).where(m.trials.c.id == _KEY).scalar_subquery()
)
_AT = sa.bindparam("at", type_=sa.Integer)
_MINE = sa.update(m.leases).where(m.leases.c.study_id == _KEY, m.leases.c.epoch == _AT)
_NAMED = (m.trials.c.number, m.trials.c.origin, m.trials.c.baseline, m.trials.c.assignment.label("hash"))
_IDENTITY = sa.select(*_NAMED, m.trials.c.parent).where(m.trials.c.id == _KEY)
_END = sa.update(m.trials).where(m.trials.c.id == _KEY, m.trials.c.attempt == _AT, m.trials.c.state == "running")
_FRONTIER = sa.select(m.frontier.c.trial_id, sa.type_coerce(m.frontier.c.point, sa.Text)).where(
    m.frontier.c.study_id == _KEY
)
_NEW_TRIAL, _NEW_MEASUREMENTS, _NEW_VALUES = map(sa.insert, (m.trials, m.measurements, m.token_values))


class _Locked(NamedTuple):
    """A study whose row this transaction holds, and the number of the change that it makes."""

    id: int
    name: str
    objectives: list[list[str]]
    change: int
    members: str | None  # checksum of the frontier


def lock(connection: sa.Connection, study_id: int) -> _Locked:
    """Count one change on a study, which holds its row until the transaction ends.

    Raises `NotFound`, and `LeaseLost` on a fenced connection whose lease on the study somebody else took over.
    """
    return _counted(connection, _COUNT, study_id, f"no study with id {study_id}")


def _lock_of(connection: sa.Connection, trial_id: int) -> _Locked:
    return _counted(connection, _COUNT_OF_TRIAL, trial_id, f"no trial with id {trial_id}")


def _counted(connection: sa.Connection, count: sa.Executable, key: int, missing: str) -> _Locked:
    row = connection.execute(count, {"key": key}).one_or_none()
    if row is None:
        raise NotFound(missing)
    study = _Locked(*row)
    # Whoever takes a lease holds the study's row too, so what is found here stays true until the commit.
    if (found := fence_of(connection)) is not None and found[0].study_id == study.id:
        fence, receipt = found
        if connection.execute(_MINE, {"key": study.id, "at": fence.epoch, "receipt": receipt}).rowcount == 0:
            raise LeaseLost
    return study


def _now() -> datetime:
    return datetime.now(UTC)


def _text(text: str) -> str:
    """Text that every database takes: no NUL, no lone surrogates, the end of what is too long."""
    return text[-_TEXT_LIMIT:].encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


def check_finite(measurements: Sequence[Measurement], violations: Mapping[str, float]) -> None:
    """Raises `NotFinite` for the first number that is NaN or infinite."""
    for measurement in measurements:
        for number in (measurement.value, measurement.stderr or 0.0):
            if not math.isfinite(number):
                raise NotFinite(f"{measurement.objective} came out as {number} ({measurement.part} part)")
    for name, excess in violations.items():
        if not math.isfinite(excess):
            raise NotFinite(f"the excess over the constraint on {name} came out as {excess}")


def put_table(connection: sa.Connection, study_id: int, name: str, body: Any) -> None:
    """Store or replace a named table of a study that `lock` holds, or remove it: None."""
    t = m.tables
    connection.execute(sa.delete(t).where(t.c.study_id == study_id, t.c.name == name))
    if body is not None:
        connection.execute(sa.insert(t).values(study_id=study_id, name=name, body=body))


def set_study(connection: sa.Connection, study_id: int, **values: Any) -> None:
    """Set columns of a study that `lock` holds."""
    connection.execute(sa.update(m.studies).where(m.studies.c.id == study_id).values(**values))


def set_state(connection: sa.Connection, study_id: int, state: StudyState, message: str | None) -> None:
    """Where the study stands. Going on clears the end; the first start stays."""
    assert state in get_args(StudyState), state
    lock(connection, study_id)
    values: dict[str, Any] = {"state": state, "message": None if message is None else _text(message)}
    if state == "running":
        values |= {"started_at": sa.func.coalesce(m.studies.c.started_at, _moment()), "finished_at": None}
    elif state not in ("created", "queued"):
        values["finished_at"] = _now()
    set_study(connection, study_id, **values)


def _moment() -> sa.BindParameter[datetime]:
    return sa.literal(_now(), m.Moment())


def insert_trial(
    connection: sa.Connection,
    study_id: int,
    number: int,
    assignment: Assignment,
    state: str,
    origin: str,
    baseline: str | None,
    sampler_attrs: Mapping[str, Any] | None,
    duplicate_of: int | None = None,
    descent: Descent | None = None,
    study_sampler_attrs: Mapping[str, Any] | None = None,
) -> TrialRecord:
    """A new trial. Raises `StoreError` if the study has a trial of that number."""
    study = lock(connection, study_id)
    t = m.trials.c
    if study_sampler_attrs is not None:
        set_study(connection, study_id, sampler_attrs=dict(study_sampler_attrs))
    if duplicate_of is not None:
        original = sa.select(t.assignment).where(t.study_id == study_id, t.number == duplicate_of)
        assert connection.execute(original).scalar() == assignment.hash, (number, duplicate_of)
    _insert_assignment(connection, assignment)
    _insert_layers(connection, descent.layers if descent else {})
    now = _now()
    values: dict[str, Any] = {
        "study_id": study_id,
        "number": number,
        "state": state,
        "origin": origin,
        "baseline": baseline,
        "assignment": assignment.hash,
        "duplicate_of": duplicate_of,
        "attempt": 1,
        "changed": study.change,
        "sampler_attrs": dict(sampler_attrs or {}),
        "created_at": now,
        "finished_at": now if state == "duplicate" else None,
    }
    if descent is not None:
        values |= {"parent": descent.parent, "derivation": dict(descent.derivation)}
    try:
        done = connection.execute(_NEW_TRIAL, values)
    except exc.IntegrityError:
        raise StoreError(
            f"study {study.name!r} has a trial {number} already; does another process run this study?"
        ) from None
    assert done.inserted_primary_key is not None
    return TrialRecord(
        **{name: value for name, value in values.items() if name != "assignment"},
        id=int(done.inserted_primary_key[0]),
        study=study.name,
        hash=assignment.hash,
        assignment=assignment,
        feasible=None,
        on_frontier=False,
        violations={},
        error=None,
        worker=None,
        seconds=None,
    )


def _insert_layers(connection: sa.Connection, layers: Mapping[str, bytes]) -> None:
    t = m.trained_layers
    for digest, body in layers.items():
        _insert_missing(connection, t, t.c.digest == digest, digest=digest, body=body)


def _insert_assignment(connection: sa.Connection, assignment: Assignment) -> None:
    a = m.assignments
    _insert_missing(connection, a, a.c.hash == assignment.hash, hash=assignment.hash, body=pack(assignment))


def _insert_missing(connection: sa.Connection, table: sa.Table, there: sa.ColumnElement[bool], **values: Any) -> None:
    """Insert what is known by its content, unless a controller of another study has stored the same."""
    if connection.dialect.name == "sqlite":
        connection.execute(sqlite.insert(table).values(**values).on_conflict_do_nothing())
        return
    if connection.dialect.name == "postgresql":
        connection.execute(postgresql.insert(table).values(**values).on_conflict_do_nothing())
        return
    if connection.execute(sa.select(sa.literal(1)).where(sa.exists().where(there))).scalar() is not None:
        return
    try:
        with connection.begin_nested():
            connection.execute(sa.insert(table).values(**values))
    except exc.IntegrityError:
        pass


def retry(connection: sa.Connection, trial_id: int) -> int:
    """Back to `running` at the next attempt, without what the last one left; the new attempt."""
    study = _lock_of(connection, trial_id)
    t = m.trials
    result = ("feasible", "violations", "error_type", "error_message", "traceback", "worker", "seconds")
    cleared = dict.fromkeys((*result, "finished_at", "checksum"))
    again = (
        sa.update(t)
        .where(t.c.id == trial_id, t.c.state.in_(("running", "failed")))
        .values(state="running", attempt=t.c.attempt + 1, changed=study.change, **cleared)
    )
    done = connection.execute(again).rowcount
    query = sa.select(t.c.number, t.c.state, t.c.attempt).where(t.c.id == trial_id)
    number, state, attempt = connection.execute(query).one()
    if done == 0:
        raise StoreError(f"trial {number} of study {study.name!r} is {state} and cannot run again")
    return int(attempt)


def finish(
    connection: sa.Connection,
    trial_id: int,
    attempt: int,
    measurements: Sequence[Measurement],
    violations: Mapping[str, float],
    seconds: float,
    worker: str,
    sampler_attrs: Mapping[str, Any] | None,
    study_sampler_attrs: Mapping[str, Any] | None,
    stopped: bool = False,
) -> bool:
    """The end of a trial that succeeded, and what it does to the frontier; nothing if it was stopped."""
    feasible = all(excess <= 0 for excess in violations.values())
    values = {
        "state": "stopped" if stopped else "complete",
        "feasible": None if stopped else feasible,
        "violations": {name: float(excess) for name, excess in violations.items()},
    }
    study = _end(
        connection, trial_id, attempt, sampler_attrs, study_sampler_attrs,
        values | {"seconds": seconds, "worker": _text(worker)}, measurements,
    )  # fmt: skip
    if study is None:
        return False
    searched = {
        measurement.objective: measurement.value for measurement in measurements if measurement.part == "search"
    }
    missing = [name for name, _, _ in study.objectives if name not in searched]
    assert not missing, f"no search value of {', '.join(missing)}"
    # It was running, and what runs has no measurements to replace.
    _insert_measurements(connection, trial_id, measurements)
    if feasible and not stopped:
        _update_frontier(connection, study, trial_id, [float(searched[name]) for name, _, _ in study.objectives])
    return True


def fail(
    connection: sa.Connection,
    trial_id: int,
    attempt: int,
    error_type: str,
    message: str,
    traceback: str,
    seconds: float,
    worker: str,
    sampler_attrs: Mapping[str, Any] | None,
    study_sampler_attrs: Mapping[str, Any] | None,
) -> bool:
    """The end of a trial that failed."""
    values = {
        "state": "failed",
        "error_type": _text(error_type),
        "error_message": _text(message),
        "traceback": _text(traceback),
        "seconds": seconds,
        "worker": _text(worker),
    }
    return _end(connection, trial_id, attempt, sampler_attrs, study_sampler_attrs, values) is not None


def _end(
    connection: sa.Connection,
    trial_id: int,
    attempt: int,
    sampler_attrs: Mapping[str, Any] | None,
    study_sampler_attrs: Mapping[str, Any] | None,
    values: Mapping[str, Any],
    measurements: Sequence[Measurement] = (),
) -> _Locked | None:
    """Set `values` on a trial that is running at `attempt`, sealed with its `measurements`. If it is not, undo
    everything: None."""
    study = _lock_of(connection, trial_id)
    identity = connection.execute(_IDENTITY, {"key": trial_id}).one()._asdict()
    values = {**values, "checksum": checksum({**identity, "attempt": attempt, **values}, measurements)}
    own = {} if sampler_attrs is None else {"sampler_attrs": dict(sampler_attrs)}
    ended = {"key": trial_id, "at": attempt, "changed": study.change, "finished_at": _now(), **own, **values}
    if connection.execute(_END, ended).rowcount == 0:
        connection.rollback()
        return None
    if study_sampler_attrs is not None:
        set_study(connection, study.id, sampler_attrs=dict(study_sampler_attrs))
    return study


def report(connection: sa.Connection, trial_id: int, measurements: Sequence[Measurement]) -> None:
    """Put report measurements on a complete trial."""
    assert all(measurement.part == "report" for measurement in measurements), "search values end with the trial"
    study = _lock_of(connection, trial_id)
    t = m.trials
    touched = sa.update(t).where(t.c.id == trial_id, t.c.state == "complete").values(changed=study.change)
    if connection.execute(touched).rowcount == 0:
        raise StoreError(f"the trial with id {trial_id} of study {study.name!r} is not complete")
    load_trials(connection, (t.c.id == trial_id,))  # what is damaged is not to be sealed again
    _put_measurements(connection, trial_id, measurements)
    seal(connection, trial_id)


def seal(connection: sa.Connection, trial_id: int) -> None:
    """Give a trial the checksum of what is stored of it now."""
    t = m.trials
    row = connection.execute(sa.select(t, t.c.assignment.label("hash")).where(t.c.id == trial_id)).one()
    own = sa.select(m.measurements).where(m.measurements.c.trial_id == trial_id)
    measured = load_measurements(connection, own).get(trial_id, {})
    connection.execute(
        sa.update(t).where(t.c.id == trial_id).values(checksum=checksum(row._asdict(), measured.values()))
    )


def _put_measurements(connection: sa.Connection, trial_id: int, measurements: Sequence[Measurement]) -> None:
    if not measurements:
        return
    keys = {(measurement.objective, measurement.part) for measurement in measurements}
    # Delete and insert is an upsert in everybody's SQL; the study's lock makes it one step.
    for table in (m.measurements, m.token_values):
        t = table.c
        replaced = sa.or_(*(sa.and_(t.objective == objective, t.part == part) for objective, part in keys))
        connection.execute(sa.delete(table).where(t.trial_id == trial_id, replaced))
    _insert_measurements(connection, trial_id, measurements)


def _insert_measurements(connection: sa.Connection, trial_id: int, measurements: Sequence[Measurement]) -> None:
    keys = {(measurement.objective, measurement.part) for measurement in measurements}
    assert len(keys) == len(measurements), "an objective is measured twice in one part"
    if not measurements:
        return
    rows = [
        measurement.to_json()
        | {"trial_id": trial_id, "objective": measurement.objective, "value": float(measurement.value)}
        for measurement in measurements
    ]
    connection.execute(_NEW_MEASUREMENTS, rows)
    values = [
        {"trial_id": trial_id, "objective": measurement.objective, "part": measurement.part}
        | pack_values(measurement.per_token)
        for measurement in measurements
        if measurement.per_token is not None
    ]
    if values:
        connection.execute(_NEW_VALUES, values)


def _update_frontier(connection: sa.Connection, study: _Locked, trial_id: int, point: Sequence[float]) -> None:
    """Let one feasible point join the stored frontier, and what it dominates leave."""
    f, t = m.frontier, m.trials
    stored = [(row[0], row[1]) for row in connection.execute(_FRONTIER, {"key": study.id})]
    members.check(study.id, study.name, study.members, stored)
    points = {member: _point(text) for member, text in stored}
    added, removed = dominance.update(points, point, [direction for _, _, direction in study.objectives])
    if not added:
        return
    if removed:
        connection.execute(sa.delete(f).where(f.c.study_id == study.id, f.c.trial_id.in_(removed)))
        connection.execute(sa.update(t).where(t.c.id.in_(removed)).values(changed=study.change))
    connection.execute(sa.insert(f).values(study_id=study.id, trial_id=trial_id, point=list(point)))
    left = [(member, text) for member, text in stored if member not in removed]
    now = members_checksum(study.id, [*left, (trial_id, json.dumps(list(point), separators=(",", ":")))])
    set_study(connection, study.id, members=now)
    members.remember(now, frozenset([trial_id, *(member for member, _ in left)]))


@functools.lru_cache(maxsize=16384)
def _point(text: str) -> tuple[float, ...]:
    """The values of a stored point. The same few hundred are read with every result."""
    return tuple(json.loads(text))


def put_shared(connection: sa.Connection, table: sa.Table, key: str, **values: Any) -> None:
    """Store or replace what studies share under `key`. Of two studies that make the same at once, either may win."""
    c = table.c
    values["created_at"] = _now()
    if connection.execute(sa.update(table).where(c.key == key).values(**values)).rowcount:
        return
    try:
        with connection.begin_nested():
            connection.execute(sa.insert(table).values(key=key, **values))
    except exc.IntegrityError:
        pass  # Another study stored its own since.
