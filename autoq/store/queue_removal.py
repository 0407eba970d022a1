"""Removing a study: its row and all that is its own, and what nobody else's trials need any more.

Two transactions. The first takes the study away at once, whatever its size; from then on nobody sees any of it. The
second clears out what no trial stands for any longer: assignments, which studies share by their hash, and trained
layers. When a process dies between the two, the next removal does both.

What was removed is not forgotten: `removals` says who removed which study and when, and its number is never given to
another one (SQLite would reuse the last), so whoever still follows an old study by its number finds none.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import sqlalchemy as sa

from autoq.assignment import Assignment
from autoq.errors import Conflict
from autoq.store import models as m
from autoq.store.clock import database_time
from autoq.store.database import Database
from autoq.store.leases import lease_of
from autoq.store.loading import load_study
from autoq.store.queue_records import WAITS, RemovalRecord
from autoq.store.writing import lock

_ROWS = 5000  # of stored assignments, read at a time


class StudyRemoval:
    """The removals of one database; a part of `Queue`."""

    _database: Database

    def remove(self, study_id: int, user: str | None = None) -> RemovalRecord:
        """Remove a study with its trials, measurements, remarks and exports, for good. `user` is who does it.

        What studies share (latency tables, sensitivities, the bank) stays. Raises `NotFound`, and `Conflict` for a
        study that is queued or at work, or of which an export is being written.
        """
        with self._database.writing() as connection:
            lock(connection, study_id)
            _refuse_busy(connection, study_id)
            removed = _note(connection, study_id, user)
            _delete(connection, study_id)
        with self._database.writing() as connection:
            _clear_out(connection)
        return removed

    def removals(self) -> list[RemovalRecord]:
        """What was removed, oldest first."""
        t = m.removals.c
        columns = [t[name] for name in RemovalRecord._fields]
        with self._database.reading() as connection:
            return [RemovalRecord(*row) for row in connection.execute(sa.select(*columns).order_by(t.removed_at, t.id))]


def _refuse_busy(connection: sa.Connection, study_id: int) -> None:
    study = load_study(connection, m.studies.c.id == study_id)
    assert study is not None, "its row is locked"
    lease = lease_of(connection, study_id)
    if lease is not None and lease.live:
        raise Conflict(f"study {study.name!r} is at work; cancel it, and remove it once it has ended")
    if study.state == "queued":
        raise Conflict(f"study {study.name!r} is queued; cancel it first")
    e = m.exports.c
    being = sa.select(sa.func.count()).select_from(m.exports).where(e.study_id == study_id, e.state.in_(WAITS))
    if connection.execute(being).scalar_one():
        raise Conflict(f"an export of study {study.name!r} is being written; remove the study once it has ended")


def _note(connection: sa.Connection, study_id: int, user: str | None) -> RemovalRecord:
    s, t = m.studies.c, m.trials.c
    own = sa.select(s.name, s.owner, s.changes).where(s.id == study_id)
    name, owner, changes = connection.execute(own).one()
    count = sa.select(sa.func.count()).select_from(m.trials).where(t.study_id == study_id)
    trials = connection.execute(count).scalar_one()
    removed = RemovalRecord(study_id, name, owner, trials, user, database_time(connection))
    connection.execute(sa.insert(m.removals).values(**removed._asdict(), changes=changes))
    return removed


def _delete(connection: sa.Connection, study_id: int) -> None:
    """The study's row and all rows that are its own."""
    own = sa.select(m.trials.c.id).where(m.trials.c.study_id == study_id)
    # By the foreign keys too, but those look for one trial after another.
    for table in (m.measurements, m.token_values):
        connection.execute(sa.delete(table).where(table.c.trial_id.in_(own)))
    connection.execute(sa.delete(m.frontier).where(m.frontier.c.study_id == study_id))
    connection.execute(sa.delete(m.trials).where(m.trials.c.study_id == study_id))
    connection.execute(sa.delete(m.workers).where(m.workers.c.study_id == study_id))
    connection.execute(sa.delete(m.studies).where(m.studies.c.id == study_id))


def _clear_out(connection: sa.Connection) -> None:
    """What no trial stands for: assignments, and trained layers that none of the others names."""
    a, t, layers = m.assignments, m.trials, m.trained_layers
    if connection.dialect.name == "postgresql":
        # A trial that is being stored may count on an assignment that was there already: it is waited for.
        connection.execute(sa.text(f"LOCK TABLE {a.name} IN EXCLUSIVE MODE"))
    named = sa.exists().where(t.c.assignment == a.c.hash)
    connection.execute(sa.delete(a).where(sa.not_(named)))
    stored = set(connection.execute(sa.select(layers.c.digest)).scalars())
    unused = sorted(stored - _named_layers(connection)) if stored else []
    for start in range(0, len(unused), _ROWS):
        _delete_layers(connection, unused[start : start + _ROWS])


def _delete_layers(connection: sa.Connection, digests: Sequence[str]) -> None:
    connection.execute(sa.delete(m.trained_layers).where(m.trained_layers.c.digest.in_(digests)))


def _named_layers(connection: sa.Connection) -> set[str]:
    """The digests of the trained layers that assignments name."""
    named: set[str] = set()
    query = sa.select(m.assignments.c.body).execution_options(yield_per=_ROWS)
    bodies = connection.execute(query).scalars()
    for body in bodies:
        text = zlib.decompress(body).decode()
        if "#" in text:
            named.update(Assignment.from_json(text).trained.values())
    return named
