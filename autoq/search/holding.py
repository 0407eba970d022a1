"""Holding a study: one process runs it, says that it lives, and hears what is asked of it.

    with holding(store, study_id) as hold:
        hold.store.set_state(study_id, "running")

A thread renews the lease and writes what the workers do. Whoever lost the lease (its machine slept, or was cut off from
the database while others were not) cannot write through `hold.store` any more, and stops at the next look. A database
that is away is nobody's: it takes no lease from its holder, and `hold.store` waits for it, ten minutes unless the
variable AUTOQ_DB_WAIT says otherwise (`90s`, `2h`). What is asked of a study,
`cancel` or `yield` to another one, is looked up between trials and whenever a stage has made progress. It yields only
what has got something done since it began: a model may take longer to load than turns are long.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from autoq.errors import AutoQError, BadInput, LeaseLost, StudyBusy
from autoq.search.executors import Executor
from autoq.search.observer import Observer
from autoq.spec_units import parse_seconds
from autoq.store import Patience, Store, StudyState, TrialRecord, WorkerRecord, holders
from autoq.store.queue_records import RequestKind

LEASE_SECONDS = 10.0  # what a study waits after its process was lost together with its machine
BEAT_SECONDS = 2.5
WAIT_SECONDS = 600.0  # for a database that is away
LOOK_SECONDS = 0.5  # between two looks at what is asked
# Stages whose steps are steps ahead. Others also tell of what a former run has done: loading, calibrating, what the
# search begins with, what is reported already.
_NEW = {"quantize", "time"}
_TRIAL = re.compile(r"trial-(\d+)")
# Leases of this process that ended and could not be let go: (database, study) -> their epochs.
_over: dict[tuple[str, int], set[int]] = {}


class StopRequested(BaseException):
    """The study is to stop: `cancel`, or `yield` to another one.

    No `Exception`: nothing that a job or a stage handles.
    """

    def __init__(self, kind: RequestKind) -> None:
        super().__init__(kind)
        self.kind = kind


class Hold:
    """A study that this process runs. `store` writes under its lease. `queued` says that it runs for a queue, to which
    the study goes back when this process is told to end; `executor` is what its heartbeats tell of."""

    def __init__(self, store: Store, study_id: int, epoch: int, queued: bool, patience: Patience | None = None) -> None:
        self.patience = patience or Patience(WAIT_SECONDS)
        self.store = store.under(study_id, epoch, self.patience)
        self._impatient = store.queue
        self.study_id, self.epoch, self.queued = study_id, epoch, queued
        self.executor: Executor | None = None
        self.device = ""
        self.progressed = False
        self._seen: set[str] = set()
        self._asked: RequestKind | None = None
        self._looked = -LOOK_SECONDS
        self._lost = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name=f"lease-{study_id}", daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raises `LeaseLost` once the study is another process's."""
        if self._lost.is_set():
            raise LeaseLost

    def asked(self) -> RequestKind | None:
        """What is asked of the study, as it was half a second ago at most."""
        self.check()
        if time.monotonic() - self._looked >= LOOK_SECONDS:
            self._asked = self.store.queue.request(self.study_id)
            self._looked = time.monotonic()
        return self._asked

    def stops(self) -> RequestKind | None:
        """What is asked, if it is to be done now."""
        asked = self.asked()
        return asked if asked == "cancel" or self.progressed else None

    def watch(self) -> None:
        """Raises `StopRequested` if the study is to stop, `LeaseLost` if it is another process's."""
        if (kind := self.stops()) is not None:
            raise StopRequested(kind)

    def state_after(self, problem: BaseException, otherwise: StudyState) -> StudyState:
        """Where a study stands that `problem` ended: `otherwise`, but for what was asked, and an interrupt of a queue's
        process, after which the study waits again."""
        if isinstance(problem, KeyboardInterrupt):
            self.patience.end()
        cancelled: StudyState = "finished" if otherwise == "finished" else "cancelled"
        if isinstance(problem, StopRequested):
            return cancelled if problem.kind == "cancel" else "queued"
        if isinstance(problem, KeyboardInterrupt) and self.queued:
            return cancelled if self.store.queue.request(self.study_id) == "cancel" else "queued"
        return otherwise

    def close(self) -> None:
        """Let go of the study."""
        self._ended.set()
        self._thread.join()
        try:
            self._impatient.forget_workers(sorted(self._seen))
            self._impatient.release(self.study_id, self.epoch)
        except AutoQError:
            # A database that is away or full lets go when the lease ends; this process need not wait for that.
            _over.setdefault((self.store.address, self.study_id), set()).add(self.epoch)

    def _beat(self) -> None:
        while True:
            # Where the database cannot be used now, the main thread meets that when it writes. The lease may end
            # meanwhile; it is lost when another one has taken it, and only the database knows of that. So too where a
            # trial that runs in this process has all the memory that it is allowed.
            with contextlib.suppress(AutoQError, MemoryError):
                if not self._impatient.renew(self.study_id, self.epoch, LEASE_SECONDS):
                    self._lost.set()
                    return
                self._tell()
            if self._ended.wait(BEAT_SECONDS):
                return

    def _tell(self) -> None:
        executor = self.executor
        if executor is None:
            return
        found = []
        for view in executor.workers():
            if view.state == "waiting":
                continue  # it is nowhere yet
            trial = _TRIAL.fullmatch(view.key or "")
            found.append(
                WorkerRecord(
                    id=view.name,
                    node=view.name.rpartition(":")[0] or view.name,
                    device=view.device or self.device,
                    state=view.state,
                    study_id=self.study_id,
                    trial=int(trial[1]) if trial else None,
                    memory_bytes=view.memory_bytes if view.process is None else _memory(view.process),
                )
            )
        ids = {worker.id for worker in found}
        if gone := self._seen - ids:
            self._impatient.forget_workers(sorted(gone))
        self._seen = ids
        self._impatient.beat(found)


def _memory(process: int | None) -> int | None:
    """The resident bytes of a process of this machine, None where it cannot be seen."""
    if process is None:
        return None
    import psutil

    try:
        return int(psutil.Process(process).memory_info().rss)
    except psutil.Error:
        return None


def refuse_busy(store: Store, study_id: int) -> None:
    """Raises `StudyBusy`, with one line that says who it is, where a process runs the study."""
    lease = store.queue.lease(study_id)
    if lease is not None and lease.live and lease.holder is not None:
        who = holders.shown(lease.holder)
        raise StudyBusy(f"study {store.study(study_id).name!r} is being run by {who}")


@contextlib.contextmanager
def holding(store: Store, study_id: int, hold: Hold | None = None, queued: bool = False) -> Iterator[Hold]:
    """The study, held until the end of the body; `hold` itself where the caller has it already.

    Raises `StudyBusy` where another process runs it. Whatever was asked of a former run is forgotten, unless this is
    a queue's.
    """
    if hold is not None:
        yield hold
        return
    over = _over.get((store.address, study_id), ())
    epoch = store.queue.acquire(study_id, holders.holder(), LEASE_SECONDS, over)
    if epoch is None:
        refuse_busy(store, study_id)
        raise StudyBusy(f"study {store.study(study_id).name!r} is being run by another process")
    advice = f"; go on with: autoq resume {store.study(study_id).name}"
    hold = Hold(store, study_id, epoch, queued, Patience(_patience(), advice))
    try:
        if not queued and store.queue.request(study_id) is not None:
            hold.store.queue.ask(study_id, None)
        yield hold
    finally:
        hold.close()


def _patience() -> float:
    """For how many seconds a study waits for its database."""
    if not (text := os.environ.get("AUTOQ_DB_WAIT")):
        return WAIT_SECONDS
    try:
        return parse_seconds(float(text) if text.isdecimal() else text)
    except ValueError as problem:
        raise BadInput(f"AUTOQ_DB_WAIT: {problem} (got {text[:80]!r})") from None


class Watching(Observer):
    """Tells another observer, and has the study stop at the next progress of a stage if that is asked."""

    def __init__(self, told: Observer, hold: Hold) -> None:
        self._told, self._hold = told, hold
        hold.patience.tell = told.note
        self._stage = ""

    def study(self, name: str, facts: Mapping[str, Any]) -> None:
        self._hold.device = str(facts.get("device", ""))
        self._told.study(name, facts)

    def stage(self, name: str, total: int | None) -> None:
        self._stage = name
        self._told.stage(name, total)
        self._hold.watch()

    def advance(self, steps: int = 1) -> None:
        self._told.advance(steps)
        self._hold.progressed |= self._stage in _NEW
        self._hold.watch()

    def trial(self, trial: TrialRecord, done: int, budget: int) -> None:
        # Others may be out, and are waited for.
        self._hold.progressed |= trial.state != "duplicate"
        self._told.trial(trial, done, budget)

    def reported(self, trial: TrialRecord) -> None:
        self._hold.progressed = True
        self._told.reported(trial)

    def trained(self, step: int, steps: int, loss: float, seconds_left: float) -> None:
        self._told.trained(step, steps, loss, seconds_left)
        self._hold.progressed = True
        self._hold.watch()

    def note(self, text: str) -> None:
        self._told.note(text)
