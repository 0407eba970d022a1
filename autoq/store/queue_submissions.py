"""Submissions: how studies come into the queue, several of them in one transaction.

A commit waits for the disk, and a statement costs about the same for one row as for fifty. So those who submit at the
same moment share both: each is checked for itself, all that are good are written together, and nobody is told of a
study before it is on the disk.

Submissions of one user wait for each other, also those of several servers, so a key that is sent by two hundred
connections at once makes one study, and a limit on a user's studies is never overstepped. Users are held in the order
of their names: of two servers that hold several, neither waits for the other for ever.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, NamedTuple
from zlib import crc32

import sqlalchemy as sa
from sqlalchemy import exc

from autoq.errors import AutoQError, BadInput, Conflict, LimitReached, StoreError
from autoq.store import models as m
from autoq.store.clock import database_time
from autoq.store.database import Database
from autoq.store.loading import load_studies, load_study
from autoq.store.new_studies import NewStudy, insert_studies
from autoq.store.queue_records import JOB, RUN, WAITS, Prepared
from autoq.store.records import StudyRecord

if TYPE_CHECKING:
    from autoq.spec import StudySpec

_SUBMITTING = 0x61717371  # "aqsq", of PostgreSQL's advisory locks
_LENGTH = {"user": 64, "key": 128}


class Submission(NamedTuple):
    """A study to queue; see `SubmissionQueue.submit`."""

    user: str | None
    key: str | None
    fingerprint: str
    spec: StudySpec
    prepared: Prepared
    priority: int = 0
    limit: int | None = None


Submitted = tuple[StudyRecord, bool]


class SubmissionQueue:
    """The submissions of one database; a part of `Queue`."""

    _database: Database

    def submit(
        self,
        user: str | None,
        key: str | None,
        fingerprint: str,
        spec: StudySpec,
        prepared: Prepared,
        priority: int = 0,
        limit: int | None = None,
    ) -> Submitted:
        """A new study in state `queued`, and True; or the one that `user` has submitted under `key`, and False.

        `fingerprint` tells one body from another: the same key with another one raises `Conflict`. `limit` is how
        many studies a user may have that are queued or running; beyond it `LimitReached` is raised. Without a key
        every call makes a study.
        """
        [found] = self.submit_all([Submission(user, key, fingerprint, spec, prepared, priority, limit)])
        if isinstance(found, Exception):
            raise found
        return found

    def submit_all(self, wanted: Sequence[Submission]) -> list[Submitted | AutoQError]:
        """Each as by `submit`, in this order; for one that is refused, the error that `submit` raises.

        One transaction: what is given back is on the disk. Raises `StoreError` where the database cannot be used;
        then none of them is stored.
        """
        try:
            with self._database.turn, self._database.writing() as connection:
                return _submit_all(connection, wanted)
        except StoreError as problem:
            # What the database does not take of one of them is no fault of the others.
            if len(wanted) == 1 or isinstance(problem.__cause__, exc.OperationalError):
                raise
        return [self._alone(one) for one in wanted]

    def _alone(self, one: Submission) -> Submitted | AutoQError:
        try:
            return self.submit(*one)
        except AutoQError as problem:
            return problem

    def submitted(self, user: str | None, key: str, fingerprint: str) -> StudyRecord | None:
        """The study that `user` has submitted under `key`, so that a repeated submission need not be prepared again;
        None if there is none. Raises `Conflict` as `submit` does."""
        t = m.submissions.c
        with self._database.reading() as connection:
            query = sa.select(t.study_id, t.fingerprint).where(t.user == (user or ""), t.key == key)
            former = connection.execute(query).one_or_none()
            if former is None:
                return None
            _same(key, former.fingerprint, fingerprint)
            return load_study(connection, m.studies.c.id == former.study_id)


def _submit_all(connection: sa.Connection, wanted: Sequence[Submission]) -> list[Submitted | AutoQError]:
    for user in sorted({one.user or "" for one in wanted}):
        hold_user(connection, user or None)
    now = last_in_line(connection)
    known = _known(connection, wanted)
    waiting: dict[str | None, int] = {}  # of a user, before these
    added: Counter[str | None] = Counter()
    new: list[Submission] = []
    found: list[tuple[int, bool] | AutoQError] = []  # an id that is there, or less than 0: the place among the new
    for one in wanted:
        try:
            _check(one)
            if (former := known.get(one[:2])) is not None:
                _same(one.key, former[0], one.fingerprint)
                found.append((former[1], False))
                continue
            if one.limit is not None:
                if one.user not in waiting:
                    waiting[one.user] = _count_waiting(connection, one.user)
                _refuse_beyond(one.user, waiting[one.user] + added[one.user], one.limit)
        except AutoQError as problem:
            found.append(problem)
            continue
        new.append(one)
        added[one.user] += 1
        if one.key is not None:
            known[one[:2]] = one.fingerprint, -len(new)
        found.append((-len(new), True))
    ids = _insert(connection, new, now)
    told = [each if isinstance(each, Exception) else (ids[-1 - each[0]] if each[0] < 0 else each[0], each[1])
            for each in found]  # fmt: skip
    studies = load_studies(connection, [each[0] for each in told if not isinstance(each, Exception)])
    return [each if isinstance(each, Exception) else (studies[each[0]], each[1]) for each in told]


def _check(one: Submission) -> None:
    for name, text in (("user", one.user), ("key", one.key)):
        if text is not None and not 0 < len(text) <= _LENGTH[name]:
            raise BadInput(f"{name} must have 1 to {_LENGTH[name]} characters (got {len(text)})")


def _same(key: str | None, stored: str, fingerprint: str) -> None:
    if stored != fingerprint:
        raise Conflict(f"the idempotency key {key!r} was used for another study; choose a new one")


def _known(connection: sa.Connection, wanted: Sequence[Submission]) -> dict[tuple[Any, ...], tuple[str, int]]:
    """(user, key) -> fingerprint and study, of the submissions that were there before."""
    t = m.submissions.c
    keys: dict[str | None, list[str]] = {}
    for one in wanted:
        if one.key is not None:
            keys.setdefault(one.user, []).append(one.key)
    found: dict[tuple[Any, ...], tuple[str, int]] = {}
    for user, of_user in keys.items():
        query = sa.select(t.key, t.fingerprint, t.study_id).where(t.user == (user or ""), t.key.in_(of_user))
        found |= {(user, row.key): (row.fingerprint, row.study_id) for row in connection.execute(query)}
    return found


def _insert(connection: sa.Connection, new: Sequence[Submission], now: datetime) -> list[int]:
    studies = [
        NewStudy(
            one.spec.name,
            one.spec.model_dump(mode="json"),
            one.prepared.objectives,
            {**one.prepared.tables, JOB: dict(RUN)},
            {"state": "queued", "owner": one.user, "priority": one.priority, "queued_at": now},
        )
        for one in new
    ]
    ids = insert_studies(connection, studies)
    rows = [
        {"user": one.user or "", "key": one.key, "fingerprint": one.fingerprint, "study_id": i, "created_at": now}
        for one, i in zip(new, ids, strict=True)
        if one.key is not None
    ]
    if rows:
        connection.execute(sa.insert(m.submissions), rows)
    return ids


def last_in_line(connection: sa.Connection) -> datetime:
    """The time of what is queued now: after all that waits, also where the clock was set back since."""
    s, moment = m.studies.c, database_time(connection)
    last = connection.execute(sa.select(sa.func.max(s.queued_at)).where(s.state.in_(WAITS))).scalar()
    return moment if last is None else max(moment, last + timedelta(microseconds=1))


def hold_user(connection: sa.Connection, user: str | None) -> None:
    """Let one submission of a user happen at a time. On SQLite there is one writer at a time in any case."""
    if connection.dialect.name == "postgresql":
        key = (_SUBMITTING << 32) + crc32((user or "").encode())
        connection.execute(sa.select(sa.func.pg_advisory_xact_lock(sa.cast(key, sa.BigInteger))))


def check_limit(connection: sa.Connection, user: str | None, limit: int | None) -> None:
    """Raises `LimitReached` where so many studies of the user wait or run already."""
    if limit is not None:
        _refuse_beyond(user, _count_waiting(connection, user), limit)


def _count_waiting(connection: sa.Connection, user: str | None) -> int:
    s = m.studies.c
    own = s.owner.is_(None) if user is None else s.owner == user
    count = sa.select(sa.func.count()).select_from(m.studies).where(own, s.state.in_(WAITS), s.queued_at.is_not(None))
    return int(connection.execute(count).scalar_one())


def _refuse_beyond(user: str | None, has: int, limit: int) -> None:
    if has >= limit:
        raise LimitReached(
            f"{user or 'this server'} has {has} studies queued or running; {limit} are allowed at a time"
        )
