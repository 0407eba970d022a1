"""Exports that are asked for, written and kept: their rows. The files are `autoq.service.exporting`'s."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from autoq.errors import BadInput, LimitReached, NotFound
from autoq.store import models as m
from autoq.store import writing
from autoq.store.database import Database
from autoq.store.queue_records import WAITS, ExportRecord, ExportState


class ExportQueue:
    """The exports of one database; a part of `Queue`."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add_export(
        self, study_id: int, trial: int, target: str | None = None, user: str | None = None, limit: int | None = None
    ) -> ExportRecord:
        """A new export in state `queued`, of a complete trial, for `target` (default: the study's own).

        The same trial for the same target that is queued, being written or there already is given back as it is.
        Raises `NotFound`, `BadInput` for a trial that is not complete, and `LimitReached` where `user` has `limit`
        exports that are queued or running.
        """
        e, t = m.exports, m.trials.c
        with self._database.writing() as connection:
            study = writing.lock(connection, study_id)
            query = sa.select(t.state).where(t.study_id == study_id, t.number == trial)
            state = connection.execute(query).scalar() if 0 <= trial < 2**31 else None
            if state is None:
                raise NotFound(f"study {study.name!r} has no trial {trial}")
            if state != "complete":
                raise BadInput(f"trial {trial} of {study.name!r} is {state}; only a complete one can be exported")
            spec = connection.execute(sa.select(m.studies.c.spec).where(m.studies.c.id == study_id)).scalar_one()
            target = target or str(spec["target"]["name"])
            same = sa.select(e.c.id).where(e.c.study_id == study_id, e.c.trial == trial, e.c.target == target)
            there = connection.execute(same.where(e.c.state.in_((*WAITS, "finished")))).scalar()
            if there is not None:
                return _export(connection, there)
            own = e.c.user.is_(None) if user is None else e.c.user == user
            busy = sa.select(sa.func.count()).select_from(e).where(own, e.c.state.in_(WAITS))
            if limit is not None and (has := connection.execute(busy).scalar_one()) >= limit:
                raise LimitReached(
                    f"{user or 'this server'} has {has} exports queued or running; {limit} are allowed at a time"
                )
            row = {"study_id": study_id, "trial": trial, "target": target, "user": user, "state": "queued"}
            done = connection.execute(sa.insert(e).values(**row, created_at=datetime.now(UTC)))
            assert done.inserted_primary_key is not None
            return _export(connection, int(done.inserted_primary_key[0]))

    def exports(self, study_id: int | None = None, states: Sequence[ExportState] | None = None) -> list[ExportRecord]:
        """The exports of a study, or of all, oldest first."""
        e = m.exports.c
        where = [] if study_id is None else [e.study_id == study_id]
        if states is not None:
            where.append(e.state.in_(states))
        with self._database.reading() as connection:
            return _exports(connection, where)

    def export(self, export_id: int) -> ExportRecord:
        """One export. Raises `NotFound`."""
        with self._database.reading() as connection:
            return _export(connection, export_id)

    def set_export(
        self,
        export_id: int,
        state: ExportState,
        expected: Sequence[ExportState],
        message: str | None = None,
        progress: Mapping[str, Any] | None = None,
        result: Mapping[str, Any] | None = None,
    ) -> bool:
        """Record where an export stands, if it stands at one of `expected`; False, and nothing changed, if not.

        `started_at` is set when it begins to run, `finished_at` when it ends.
        """
        e = m.exports
        values: dict[str, Any] = {"state": state, "message": message}
        values |= {} if progress is None else {"progress": dict(progress)}
        values |= {} if result is None else {"result": dict(result)}
        if state == "running" and "running" not in expected:
            values["started_at"] = datetime.now(UTC)
        if state in ("finished", "failed"):
            values["finished_at"] = datetime.now(UTC)
        with self._database.writing() as connection:
            study_id = _export(connection, export_id).study_id
            writing.lock(connection, study_id)
            change = sa.update(e).where(e.c.id == export_id, e.c.state.in_(expected))
            if connection.execute(change.values(**values)).rowcount == 0:
                connection.rollback()
                return False
            return True


def _exports(connection: sa.Connection, where: Sequence[sa.ColumnElement[bool]]) -> list[ExportRecord]:
    e, s = m.exports, m.studies.c
    query = sa.select(e, s.name.label("study")).join(m.studies, s.id == e.c.study_id)
    return [ExportRecord(**row._mapping) for row in connection.execute(query.where(*where).order_by(e.c.id))]


def _export(connection: sa.Connection, export_id: int) -> ExportRecord:
    found = _exports(connection, [m.exports.c.id == export_id]) if 0 <= export_id < 2**31 else []
    if not found:
        raise NotFound(f"no export {export_id}")
    return found[0]
