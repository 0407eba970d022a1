"""The queue: studies that are submitted, who runs which, and what evaluates.

A submission is the study's row, its tables, and the key under which it was sent, in one transaction (see
`queue_submissions`).

A lease says who runs a study. It is taken for some seconds and renewed; when it has ended, or its holder is a process
of this machine that is gone, another one takes it, and `epoch` counts on. What a former holder still writes is refused
by its epoch, in the transaction that would have written (`Store.under`). Times are the database's own, where it has
a clock: machines that share a database need not agree on the time. SQLite has none, but all its processes are on one
machine, whose monotonic clock nobody sets: leases there end by it. A lease that ends later than any lease lasts was
taken before a clock was set back, or the machine began anew, and has ended.

    created ─┐                ┌──────── yield ────────┐
             ▼                ▼                       │
    submit ─► queued ── a runner takes the lease ─► running ─► finished | failed | interrupted | cancelled
                ▲                                                 │
                └────────────── resume, refine, … ────────────────┘
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import timedelta
from typing import Any

import sqlalchemy as sa

from autoq.errors import BadInput, Conflict, NotFound
from autoq.store import models as m
from autoq.store import writing
from autoq.store.clock import database_time, fresh
from autoq.store.leases import lease_clock, lease_of
from autoq.store.loading import load_study
from autoq.store.patience import steady
from autoq.store.queue_exports import ExportQueue
from autoq.store.queue_records import (
    CLOCK,
    CRASHES,
    JOB,
    RUN,
    WAITS,
    LeaseRecord,
    RequestKind,
    StudyInLine,
    WorkerRecord,
)
from autoq.store.queue_removal import StudyRemoval
from autoq.store.queue_submissions import SubmissionQueue, check_limit, hold_user, last_in_line
from autoq.store.records import StudyRecord, StudyState


@steady
class Queue(SubmissionQueue, ExportQueue, StudyRemoval):
    """The queue of one database. Every method is one short transaction; see `Store` for what they raise."""

    # Resume, refine, cancel

    def enqueue(
        self, study_id: int, trials: int | None = None, job: Mapping[str, Any] = RUN, limit: int | None = None
    ) -> StudyRecord:
        """Queue a study that is there: to go on to the end of its budget, which `trials` raises, or for another `job`.

        A finished study has nothing to go on with but more trials, and a job that adds trials (refine, recover, …) is
        for finished ones alone: `Conflict` otherwise, as for what is queued or running. Raises `BadInput` for no
        more trials than it has had, and `LimitReached`.
        """
        adds = job["kind"] != "run"
        with self._database.writing() as connection:
            study = _study(connection, study_id)
            hold_user(connection, study.owner)
            writing.lock(connection, study_id)
            study = _study(connection, study_id)
            if study.state in WAITS:
                raise Conflict(f"study {study.name!r} is {study.state} already")
            if adds and study.state != "finished":
                raise Conflict(f"study {study.name!r} is {study.state} and cannot be added to; resume it first")
            if not adds and trials is None and study.state == "finished":
                raise Conflict(f"study {study.name!r} is finished; give it more trials to go on")
            check_limit(connection, study.owner, limit)
            if trials is not None:
                _raise_budget(connection, study, trials)
            writing.put_table(connection, study_id, JOB, dict(job))
            writing.put_table(connection, study_id, CRASHES, None)
            values = {"state": "queued", "message": None, "queued_at": last_in_line(connection), "request": None}
            writing.set_study(connection, study_id, finished_at=study.finished_at if adds else None, **values)
            return _study(connection, study_id)

    def raise_budget(self, study_id: int, trials: int) -> None:
        """Let a study have `trials` trials. Raises `BadInput` for no more than it has had."""
        with self._database.writing() as connection:
            writing.lock(connection, study_id)
            _raise_budget(connection, _study(connection, study_id), trials)

    def cancel(self, study_id: int) -> StudyRecord:
        """End a study that is queued at once, and one that is running after the trials that are out.

        A study that waits for more than its budget (to be refined) is finished again. Raises `Conflict` for one that
        is neither queued nor running.
        """
        with self._database.writing() as connection:
            writing.lock(connection, study_id)
            study = _study(connection, study_id)
            if study.state not in WAITS:
                raise Conflict(f"study {study.name!r} is {study.state} and cannot be cancelled")
            lease = lease_of(connection, study_id)
            # The request stands in any case: a runner may be about to take up what is queued.
            writing.set_study(connection, study_id, request="cancel")
            if study.state == "queued" or lease is None or not lease.live:
                ended = _state_once_cancelled(connection, study_id)
                writing.set_study(
                    connection, study_id, state=ended, message=None, finished_at=database_time(connection)
                )
            return _study(connection, study_id)

    def ask(self, study_id: int, request: RequestKind | None) -> None:
        """Ask the one who runs a study to `yield` or to `cancel`, or take that back. A cancellation stays one."""
        s = m.studies
        with self._database.writing() as connection:
            writing.lock(connection, study_id)
            still = sa.update(s).where(s.c.id == study_id)
            if request == "yield":
                still = still.where(s.c.request.is_(None), s.c.state == "running")
            connection.execute(still.values(request=request))

    def request(self, study_id: int) -> RequestKind | None:
        """What is asked of the one who runs the study."""
        with self._database.reading() as connection:
            found: RequestKind | None = connection.execute(
                sa.select(m.studies.c.request).where(m.studies.c.id == study_id)
            ).scalar()
            return found

    def settle(self, study_id: int, state: StudyState, message: str | None = None) -> None:
        """Record where a study stands after a run; what was asked for is done. A study that is queued again keeps its
        place in the order of submission, unless it was cancelled since whoever settles it looked: then it has ended."""
        with self._database.writing() as connection:
            _hold_row(connection, study_id)
            asked = connection.execute(sa.select(m.studies.c.request).where(m.studies.c.id == study_id)).scalar()
            if state == "queued" and asked == "cancel":
                state, message = _state_once_cancelled(connection, study_id), None
            writing.set_state(connection, study_id, state, message)
            writing.set_study(connection, study_id, request=None)

    # What waits and what runs

    def queued(self) -> list[StudyRecord]:
        """The studies that wait, by priority, then as they were queued."""
        s = m.studies.c
        with self._database.reading() as connection:
            ids = connection.execute(
                sa.select(s.id).where(s.state == "queued").order_by(s.priority.desc(), s.queued_at, s.id)
            ).scalars()
            return [_study(connection, study_id) for study_id in list(ids)]

    def waiting(self) -> list[StudyInLine]:
        """As `queued`, but only what places depend on: a long line costs little."""
        s = m.studies.c
        query = sa.select(s.id, s.owner, s.priority, s.queued_at).where(s.state == "queued", s.queued_at.is_not(None))
        with self._database.reading() as connection:
            rows = connection.execute(query.order_by(s.priority.desc(), s.queued_at, s.id))
            return [StudyInLine(*row) for row in rows]

    def running(self) -> list[tuple[StudyRecord, LeaseRecord | None]]:
        """The studies in state `running` that came through the queue, each with its lease."""
        s = m.studies.c
        with self._database.reading() as connection:
            ids = connection.execute(
                sa.select(s.id).where(s.state == "running", s.queued_at.is_not(None)).order_by(s.id)
            ).scalars()
            return [(_study(connection, i), lease_of(connection, i)) for i in list(ids)]

    def lengths(self) -> dict[str, int]:
        """How many studies and exports are queued, and how many run."""
        with self._database.reading() as connection:
            found: dict[str, int] = {}
            for name, table in (("studies", m.studies), ("exports", m.exports)):
                query = sa.select(table.c.state, sa.func.count()).where(table.c.state.in_(WAITS))
                counts = {row[0]: row[1] for row in connection.execute(query.group_by(table.c.state))}
                found |= {f"{name}_{state}": counts.get(state, 0) for state in WAITS}
            return found

    # Leases

    def acquire(self, study_id: int, holder: str, seconds: float, over: Collection[int] = ()) -> int | None:
        """Take the lease of a study for so many seconds; its epoch, or None while another holder has it.

        It is free where nobody holds it, where it has ended, and where its holder is a process of this machine that
        is gone, or is `holder` itself at an epoch that is `over`. Raises `NotFound`.
        """
        t = m.leases
        with self._database.writing() as connection:
            _hold_row(connection, study_id)
            lease = lease_of(connection, study_id)
            mine = lease is not None and lease.holder == holder and lease.epoch in over
            if lease is not None and lease.live and not mine:
                return None
            until = lease_clock(connection) + timedelta(seconds=seconds)
            if lease is None:
                connection.execute(sa.insert(t).values(study_id=study_id, holder=holder, epoch=1, until=until))
                return 1
            taken = sa.update(t).where(t.c.study_id == study_id)
            connection.execute(taken.values(holder=holder, epoch=lease.epoch + 1, until=until))
            return lease.epoch + 1

    def renew(self, study_id: int, epoch: int, seconds: float) -> bool:
        """Hold the lease for so many seconds from now; False where another one has taken it, or it was let go."""
        t = m.leases
        with self._database.writing() as connection:
            mine = sa.update(t).where(t.c.study_id == study_id, t.c.epoch == epoch, t.c.holder.is_not(None))
            return (
                connection.execute(mine.values(until=lease_clock(connection) + timedelta(seconds=seconds))).rowcount
                == 1
            )

    def release(self, study_id: int, epoch: int) -> None:
        """Let go of the lease, unless another one has taken it."""
        t = m.leases
        with self._database.writing() as connection:
            mine = sa.update(t).where(t.c.study_id == study_id, t.c.epoch == epoch)
            connection.execute(mine.values(holder=None, until=lease_clock(connection)))

    def lease(self, study_id: int) -> LeaseRecord | None:
        """The study's lease, None where it was never run under one."""
        with self._database.reading() as connection:
            return lease_of(connection, study_id)

    # Workers

    def beat(self, workers: Sequence[WorkerRecord]) -> None:
        """Say that these workers live. Forgets those that have not been seen for `clock.STALE_SECONDS`."""
        t = m.workers
        with self._database.writing() as connection:
            now = database_time(connection)
            connection.execute(sa.delete(t).where(sa.not_(fresh(connection))))
            known = set(connection.execute(sa.select(t.c.id)).scalars())
            rows = [_beaten(worker) | {"seen_at": now} for worker in workers]
            again = [row for row in rows if row["worker_id"] in known]
            if again:
                # Of a thousand workers one statement each would hold everybody's writes up for a second.
                named: dict[str, Any] = {name: sa.bindparam(name) for name in again[0] if name != "worker_id"}
                connection.execute(sa.update(t).where(t.c.id == sa.bindparam("worker_id")).values(**named), again)
            new = [row for row in rows if row["worker_id"] not in known]
            if new:
                named = {name: sa.bindparam(name) for name in new[0] if name != "worker_id"}
                connection.execute(sa.insert(t).values(id=sa.bindparam("worker_id"), started_at=now, **named), new)

    def forget_workers(self, ids: Sequence[str]) -> None:
        """These workers have ended."""
        with self._database.writing() as connection:
            connection.execute(sa.delete(m.workers).where(m.workers.c.id.in_(ids)))

    def workers(self) -> list[WorkerRecord]:
        """The workers that were seen within `clock.STALE_SECONDS`, by name."""
        t, s = m.workers.c, m.studies.c
        with self._database.reading() as connection:
            query = sa.select(m.workers, s.name.label("study")).join(m.studies, s.id == t.study_id, isouter=True)
            rows = connection.execute(query.where(fresh(connection)).order_by(t.id))
            return [WorkerRecord(**row._mapping) for row in rows]


def _beaten(worker: WorkerRecord) -> dict[str, Any]:
    return {
        "worker_id": worker.id,
        "study_id": worker.study_id,
        "node": worker.node,
        "device": worker.device,
        "memory_bytes": worker.memory_bytes,
        "state": worker.state,
        "trial": worker.trial,
    }


def _hold_row(connection: sa.Connection, study_id: int) -> None:
    """Hold the study's row until the transaction ends, without counting a change."""
    held = connection.execute(sa.select(m.studies.c.id).where(m.studies.c.id == study_id).with_for_update()).scalar()
    if held is None:
        raise NotFound(f"no study with id {study_id}")


def _study(connection: sa.Connection, study_id: int) -> StudyRecord:
    found = load_study(connection, m.studies.c.id == study_id)
    if found is None:
        raise NotFound(f"no study with id {study_id}")
    return found


def _table(connection: sa.Connection, study_id: int, name: str) -> Any:
    t = m.tables.c
    return connection.execute(sa.select(t.body).where(t.study_id == study_id, t.name == name)).scalar()


def _state_once_cancelled(connection: sa.Connection, study_id: int) -> StudyState:
    """What a study is that was cancelled: one that was added to is finished, as before."""
    job = _table(connection, study_id, JOB) or RUN
    return "cancelled" if job["kind"] == "run" else "finished"


def _raise_budget(connection: sa.Connection, study: StudyRecord, trials: int) -> None:
    from autoq.spec import build_spec

    t = m.trials.c
    ended = t.state.in_(("complete", "stopped", "failed"))
    count = sa.select(sa.func.count()).select_from(m.trials)
    had = connection.execute(count.where(t.study_id == study.id, ended, t.parent.is_(None))).scalar_one()
    if trials <= had:
        raise BadInput(f"trials must be more than the {had} that study {study.name!r} has had (got {trials})")
    spec = build_spec({**study.spec, "budget": {**study.spec["budget"], "trials": trials}})
    writing.set_study(connection, study.id, spec=spec.model_dump(mode="json"))
    # A new budget has all of its time before it.
    writing.put_table(connection, study.id, CLOCK, None)
