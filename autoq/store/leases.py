"""Who has the lease of a study, and on which clock leases end."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import sqlalchemy as sa

from autoq.store import holders
from autoq.store import models as m
from autoq.store.clock import database_time
from autoq.store.queue_records import LeaseRecord

_LONGEST = timedelta(hours=1)


def lease_of(connection: sa.Connection, study_id: int) -> LeaseRecord | None:
    """The study's lease, None where it was never run under one."""
    row = connection.execute(sa.select(m.leases).where(m.leases.c.study_id == study_id)).one_or_none()
    if row is None:
        return None
    lasts = timedelta(0) < row.until - lease_clock(connection) <= _LONGEST
    live = row.holder is not None and lasts and not holders.is_dead(row.holder)
    return LeaseRecord(row.study_id, row.holder, row.epoch, row.until, live)


def lease_clock(connection: sa.Connection) -> datetime:
    """What leases are held against; on SQLite the monotonic clock, as if it had begun with the year 2000."""
    if connection.dialect.name == "postgresql":
        return database_time(connection)
    return datetime(2000, 1, 1, tzinfo=UTC) + timedelta(seconds=time.monotonic())
