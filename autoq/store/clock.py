"""What time it is, and who was seen lately enough to be there."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from autoq.store import models as m

STALE_SECONDS = 60.0  # a worker that was not seen for so long is gone


def database_time(connection: sa.Connection) -> datetime:
    """The database's time; SQLite's is this machine's."""
    if connection.dialect.name == "postgresql":
        found: datetime = connection.execute(sa.select(sa.func.clock_timestamp())).scalar_one()
        return found.astimezone(UTC)
    return datetime.now(UTC)


def fresh(connection: sa.Connection) -> sa.ColumnElement[bool]:
    """The condition on `models.workers` that one was seen within `STALE_SECONDS`. What was seen later than now was seen
    before the clock was set back."""
    now, stale = database_time(connection), timedelta(seconds=STALE_SECONDS)
    return m.workers.c.seen_at.between(now - stale, now + stale)


def worker_counts(connection: sa.Connection) -> dict[int, int]:
    """Study id -> how many workers are at it, of studies that have any."""
    w = m.workers.c
    query = sa.select(w.study_id, sa.func.count()).where(fresh(connection), w.study_id.is_not(None))
    return {row[0]: row[1] for row in connection.execute(query.group_by(w.study_id))}
