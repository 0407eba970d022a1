"""What people note on trials: a text and tags, the last one who writes has it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa

from autoq.errors import NotFound
from autoq.store import models as m
from autoq.store import writing
from autoq.store.database import Database


@dataclass(frozen=True)
class RemarkRecord:
    """A note and tags on one trial; `user` wrote them last, None where whoever has the database did."""

    trial: int
    note: str
    tags: tuple[str, ...]
    user: str | None
    changed_at: datetime

    def to_json(self) -> dict[str, Any]:
        """`{"trial", "note", "tags", "user", "changed_at"}`."""
        return {
            "trial": self.trial,
            "note": self.note,
            "tags": list(self.tags),
            "user": self.user,
            "changed_at": self.changed_at.isoformat(),
        }


class Remarks:
    """The remarks of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def put(self, study_id: int, trial: int, note: str, tags: Sequence[str], user: str | None) -> RemarkRecord:
        """Replace what is noted on a trial; it counts as a change of the study. Raises `NotFound`."""
        r, t = m.remarks, m.trials.c
        now = datetime.now(UTC)
        with self._database.writing() as connection:
            writing.lock(connection, study_id)
            known = sa.select(t.id).where(t.study_id == study_id, t.number == trial)
            if not 0 <= trial < 2**31 or connection.execute(known).first() is None:
                raise NotFound(f"no trial {trial}")
            connection.execute(sa.delete(r).where(r.c.study_id == study_id, r.c.trial == trial))
            values = {"note": note, "tags": list(tags), "user": user, "changed_at": now}
            connection.execute(sa.insert(r).values(study_id=study_id, trial=trial, **values))
        return RemarkRecord(trial, note, tuple(tags), user, now)

    def of(self, study_id: int, trial: int | None = None) -> list[RemarkRecord]:
        """The remarks on the trials of a study, or on one of them, in the order of their numbers."""
        r = m.remarks.c
        query = sa.select(r.trial, r.note, r.tags, r.user, r.changed_at).where(r.study_id == study_id)
        if trial is not None:
            query = query.where(r.trial == trial)
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(r.trial))
            return [RemarkRecord(row.trial, row.note, tuple(row.tags), row.user, row.changed_at) for row in rows]
