"""What a write does inside its transaction. Every function locks the study's row first, by `lock`.

How trials end is in `results`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple, get_args

import sqlalchemy as sa
from sqlalchemy import exc
from sqlalchemy.dialects import postgresql, sqlite

from autoq.errors import LeaseLost, NotFound, StoreError
from autoq.store import models as m
from autoq.store.database import fence_of
from autoq.store.packing import pack
from autoq.store.records import NewTrial, StudyState, TrialRecord

_TEXT_LIMIT = 65536
# Those that can leave out what is there.
_INSERTS: Mapping[str, Callable[..., Any]] = {"sqlite": sqlite.insert, "postgresql": postgresql.insert}

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
_NEW_TRIALS = sa.insert(m.trials).returning(m.trials.c.id, sort_by_parameter_order=True)


class Locked(NamedTuple):
    """A study whose row this transaction holds, and the number of the change that it makes."""

    id: int
    name: str
    objectives: list[list[str]]
    change: int
    members: str | None  # checksum of the frontier


def lock(connection: sa.Connection, study_id: int) -> Locked:
    """Count one change on a study, which holds its row until the transaction ends.

    Raises `NotFound`, and `LeaseLost` on a fenced connection whose lease on the study somebody else took over.
    """
    return _counted(connection, _COUNT, study_id, f"no study with id {study_id}")


def lock_of(connection: sa.Connection, trial_id: int) -> Locked:
    """The same for the study of a trial."""
    return _counted(connection, _COUNT_OF_TRIAL, trial_id, f"no trial with id {trial_id}")


def _counted(connection: sa.Connection, count: sa.Executable, key: int, missing: str) -> Locked:
    row = connection.execute(count, {"key": key}).one_or_none()
    if row is None:
        raise NotFound(missing)
    study = Locked(*row)
    # Whoever takes a lease holds the study's row too, so what is found here stays true until the commit.
    if (found := fence_of(connection)) is not None and found[0].study_id == study.id:
        fence, receipt = found
        if connection.execute(_MINE, {"key": study.id, "at": fence.epoch, "receipt": receipt}).rowcount == 0:
            raise LeaseLost
    return study


def now() -> datetime:
    """The moment that is stored of what happens now."""
    return datetime.now(UTC)


def as_text(text: str) -> str:
    """Text that every database takes: no NUL, no lone surrogates, the end of what is too long."""
    return text[-_TEXT_LIMIT:].encode("utf-8", "backslashreplace").decode().replace("\0", "\\x00")


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
    values: dict[str, Any] = {"state": state, "message": None if message is None else as_text(message)}
    if state == "running":
        values |= {"started_at": sa.func.coalesce(m.studies.c.started_at, _moment()), "finished_at": None}
    elif state not in ("created", "queued"):
        values["finished_at"] = now()
    set_study(connection, study_id, **values)


def _moment() -> sa.BindParameter[datetime]:
    return sa.literal(now(), m.Moment())


def insert_trials(connection: sa.Connection, study_id: int, new: Sequence[NewTrial]) -> list[TrialRecord]:
    """New trials of a study, a few statements for any number of them. Raises `StoreError` if it has one of that
    number."""
    study = lock(connection, study_id)
    t = m.trials.c
    remembered = [trial.study_sampler_attrs for trial in new if trial.study_sampler_attrs is not None]
    if remembered:
        set_study(connection, study_id, sampler_attrs=dict(remembered[-1]))
    hashes = {trial.number: trial.assignment.hash for trial in new}
    if repeated := {trial.repeats for trial in new if trial.repeats is not None} - hashes.keys():
        originals = sa.select(t.number, t.assignment).where(t.study_id == study_id, t.number.in_(repeated))
        hashes |= {row.number: row.assignment for row in connection.execute(originals)}
    for trial in new:
        assert trial.repeats is None or hashes.get(trial.repeats) == trial.assignment.hash, trial
    bodies = {trial.assignment.hash: trial.assignment for trial in new if trial.repeats is None}
    # Before the layers that they name: a removal holds the table of assignments while it looks for unnamed layers.
    _insert_missing(connection, m.assignments.c.hash, {key: pack(assignment) for key, assignment in bodies.items()})
    for trial in new:
        if trial.descent is not None:
            _insert_missing(connection, m.trained_layers.c.digest, trial.descent.layers)
    began = now()
    rows: list[dict[str, Any]] = [
        {
            "study_id": study_id,
            "number": trial.number,
            "state": "running" if trial.repeats is None else "duplicate",
            "origin": trial.origin,
            "baseline": trial.baseline,
            "assignment": trial.assignment.hash,
            "duplicate_of": trial.repeats,
            "attempt": 1,
            "changed": study.change,
            "sampler_attrs": dict(trial.sampler_attrs),
            "created_at": began,
            "finished_at": None if trial.repeats is None else began,
            "parent": None if trial.descent is None else trial.descent.parent,
            "derivation": None if trial.descent is None else dict(trial.descent.derivation),
        }
        for trial in new
    ]
    try:
        ids = connection.execute(_NEW_TRIALS, rows).scalars().all()
    except exc.IntegrityError:
        numbers = f"a trial {new[0].number}" if len(new) == 1 else f"one of the trials {min(hashes)} to {max(hashes)}"
        raise StoreError(f"study {study.name!r} has {numbers} already; does another process run this study?") from None
    return [
        TrialRecord(
            **{name: value for name, value in row.items() if name != "assignment"},
            id=int(trial_id),
            study=study.name,
            hash=trial.assignment.hash,
            assignment=trial.assignment,
            feasible=None,
            on_frontier=False,
            violations={},
            error=None,
            worker=None,
            seconds=None,
        )
        for trial, row, trial_id in zip(new, rows, ids, strict=True)
    ]


def _insert_missing(connection: sa.Connection, key: sa.Column[str], bodies: Mapping[str, bytes]) -> None:
    """Insert what is known by its content, unless a controller of another study has stored the same."""
    table, rows = key.table, [{key.name: name, "body": body} for name, body in sorted(bodies.items())]
    if not rows:
        return
    if (insert := _INSERTS.get(connection.dialect.name)) is not None:
        connection.execute(insert(table).on_conflict_do_nothing(), rows)
        return
    there = set(connection.execute(sa.select(key).where(key.in_(bodies))).scalars())
    for row in rows:
        if row[key.name] in there:
            continue
        try:
            with connection.begin_nested():
                connection.execute(sa.insert(table), row)
        except exc.IntegrityError:
            pass


def retry(connection: sa.Connection, trial_id: int) -> int:
    """Back to `running` at the next attempt, without what the last one left; the new attempt."""
    study = lock_of(connection, trial_id)
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


def put_shared(connection: sa.Connection, table: sa.Table, key: str, **values: Any) -> None:
    """Store or replace what studies share under `key`. Of two studies that make the same at once, either may win."""
    c = table.c
    values["created_at"] = now()
    if connection.execute(sa.update(table).where(c.key == key).values(**values)).rowcount:
        return
    try:
        with connection.begin_nested():
            connection.execute(sa.insert(table).values(key=key, **values))
    except exc.IntegrityError:
        pass  # Another study stored its own since.
