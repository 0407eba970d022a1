"""The scheduler: a thread of the server that runs what is queued, fairly, on a number of slots.

    scheduler = Scheduler(store, slots=2, cpus=1, folder=Path("server"))
    scheduler.start()            # app.state.scheduler
    scheduler.wake()             # something was queued: look at once
    scheduler.stop()             # studies go back to the queue, exports too

A study on this machine takes one slot, which is a process (`autoq.service.runner`) with `cpus` threads; one on Ray
takes as many as it has workers. A study on a Ray cluster at an address takes none of this machine's slots but as many
places of that cluster, which has `places` in all, for its work is done there. Who starts and who gives way is
`autoq.service.shares`; this thread only does it, and looks after what it started: an end that nobody recorded (killed,
out of memory, a fault) is put on the study, which is queued again, `MAX_CRASHES` times without a new trial in between,
and then failed.

What is known of a study is in the database. So a server that is killed leaves its runners running; the next one knows
them by their leases and does not start them twice, and queues again what has no live lease. Studies that never were
queued (`autoq search` on the same database) are not its business.

A cancelled study whose trial does not end is told to end, and then killed.
"""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from autoq.cache import cache_dir
from autoq.errors import AutoQError, StoreAway
from autoq.service.exporting import Exporter
from autoq.service.processes import cause, tail
from autoq.service.shares import QUANTUM_SECONDS, Running, Standing, Start, Waiting, account, decide, standings
from autoq.store import LeaseRecord, Store, StudyRecord, holders
from autoq.store.queue_records import CRASHES, JOB, LOADING, LOG, RUN

MAX_CRASHES = 3
LOOK_SECONDS = 1.0
PATIENCE_SECONDS = 30.0  # from a cancellation to SIGTERM, and again to SIGKILL
RUNNER = (sys.executable, "-m", "autoq.service.runner")
_GRACE_SECONDS = 15.0  # after a database was away, for those whose leases ended meanwhile to renew them
HERE = ""  # the pool of this machine's slots; others are known by their address
_LEASE_SECONDS = 10.0  # for which the scheduler itself holds a study whose runner is gone


@dataclass
class _Slot:
    """A study that runs, as a process of this server or (`process` None) one that a former server started."""

    owner: str
    priority: int
    pool: str
    width: int
    since: float  # on the monotonic clock
    process: subprocess.Popen[bytes] | None = None
    holder: str | None = None
    leaving: bool = False
    loading: float = 0.0
    cancelled_at: float | None = None
    told: list[signal.Signals] = field(default_factory=list)

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the process, if it is one of this machine and lives."""
        if self.process is not None:
            self.process.send_signal(number)
        elif self.holder is not None and (found := holders.process_of(self.holder)) is not None:
            found.send_signal(number)


class Scheduler:
    """Runs the queue of one database; see the module. `limit` is how many slots one user may have at a time in a pool;
    `places` (default: as many as there are slots) is how many workers a cluster has."""

    def __init__(
        self,
        store: Store,
        slots: int,
        *,
        places: int | None = None,
        cpus: int | None = None,
        limit: int | None = None,
        folder: Path | None = None,
        quantum: float = QUANTUM_SECONDS,
        patience: float = PATIENCE_SECONDS,
        runner: Sequence[str] = RUNNER,
    ) -> None:
        assert slots >= 1, slots
        self._store, self._slots, self._limit = store, slots, limit
        self._places = slots if places is None else places
        self._quantum, self._patience, self._runner = quantum, patience, tuple(runner)
        own = hashlib.sha256(store.address.encode()).hexdigest()[:12]
        self.folder = folder if folder is not None else cache_dir() / "server" / own
        self._environment = {"AUTOQ_DB": store.address}
        if cpus is not None:
            self._environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(cpus))
        self._running: dict[int, _Slot] = {}
        self._needs: dict[int, tuple[str, int]] = {}
        self._usage: dict[str, dict[str, float]] = {}
        self._accounted = time.monotonic()
        self._grace = 0.0  # until when nobody is held for dead because of a lease that has ended
        self._standings: Mapping[int, tuple[str, Standing]] = {}
        self._counts = dict.fromkeys(("started", "yielded", "crashed", "busy"), 0)
        self._wake, self._ended = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self.exporter = Exporter(store, self.folder / "exports", self._environment)
        self.problem: str | None = None  # why the last look failed; None: it did not

    # What the server calls

    def start(self) -> None:
        """Begin, in a thread. Raises `AutoQError` where the folder cannot be made."""
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            self.folder.mkdir(mode=0o700, exist_ok=True)  # logs and exports are whose studies they are
            (self.folder / "logs").mkdir(exist_ok=True)
            self.exporter.folder.mkdir(exist_ok=True)
        except OSError as problem:
            raise AutoQError(f"the server's folder {str(self.folder)!r} cannot be used: {problem}") from None
        self._thread = threading.Thread(target=self._loop, name="scheduler", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        """Whether the thread runs and its last look succeeded."""
        return self._thread is not None and self._thread.is_alive() and self.problem is None

    def wake(self) -> None:
        """Look at the queue now: something was queued or cancelled."""
        self._wake.set()

    def stop(self, seconds: float = 20.0) -> None:
        """End. What runs ends its trial and waits in the queue again; after `seconds` it ends at once."""
        self._ended.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        until = time.monotonic() + seconds
        self.exporter.stop()
        for study_id in self._running:
            self._try(self._store.queue.ask, study_id, "yield")
        self._await_ends(until)
        for number in (signal.SIGTERM, signal.SIGKILL):
            for slot in self._running.values():
                slot.send(number)
            self._await_ends(time.monotonic() + seconds)

    def counts(self) -> dict[str, int]:
        """For metrics: what is queued and running, and how many runners were started, gave way, crashed."""
        return {**self._store.queue.lengths(), **self._counts, "slots": self._slots, "places": self._places}

    def standings(self) -> Mapping[int, tuple[str, Standing]]:
        """Study id -> its pool and why it waits, of what waited at the last look, in the order of their turns."""
        return self._standings

    def widths(self) -> dict[int, tuple[str, int]]:
        """Study id -> its pool and how many places of it the study holds, of what runs."""
        return {study_id: (slot.pool, slot.width) for study_id, slot in list(self._running.items())}

    def log(self, study_id: int) -> str:
        """The end of what the study's runner said last, empty where nothing is known."""
        text = tail(self._log_file(study_id))
        return text or str((self._store.table(study_id, LOG) or {}).get("text", ""))

    # The thread

    def _loop(self) -> None:
        while not self._ended.is_set():
            try:
                self.look()
                self.problem = None
            except (AutoQError, OSError) as problem:  # no database, no disk, no process to be had: what runs goes on
                self.problem = str(problem)
                if isinstance(problem, StoreAway):
                    self._grace = time.monotonic() + _GRACE_SECONDS
            self._wake.wait(LOOK_SECONDS)
            self._wake.clear()

    def look(self) -> None:
        """One look: what ended, what is there, what is to be done."""
        queue = self._store.queue
        self._reap()
        self._adopt(queue.running())
        waiting: dict[str, list[Waiting]] = {}
        for each in queue.waiting():
            if each.id not in self._running:
                pool, width = self._need(each.id)
                one = Waiting(each.id, each.owner or "", each.priority, each.queued_at.timestamp(), width)
                waiting.setdefault(pool, []).append(one)
        running: dict[str, list[Running]] = {}
        for study_id, s in self._running.items():
            held = Running(study_id, s.owner, s.priority, s.since, s.width, s.leaving, self._loading(study_id, s))
            running.setdefault(s.pool, []).append(held)
        now = time.monotonic()
        found: dict[int, tuple[str, Standing]] = {}
        for pool in {*self._usage, *waiting, *running}:
            told = self._share(pool, waiting.get(pool, []), running.get(pool, []), now)
            found |= {standing.study_id: (pool, standing) for standing in told}
        self._standings = found
        self._accounted = now
        self.exporter.look()

    def _share(self, pool: str, waiting: Sequence[Waiting], running: Sequence[Running], now: float) -> list[Standing]:
        """Deal the slots of one pool out; why the others wait."""
        usage = self._usage.get(pool, {})
        usage = self._usage[pool] = account(usage, waiting, running, now - self._accounted)
        for action in decide(waiting, running, usage, self._size(pool), now, self._quantum, self._limit):
            if isinstance(action, Start):
                self._start(next(each for each in waiting if each.study_id == action.study_id))
            else:
                self._store.queue.ask(action.study_id, "yield")
        return standings(waiting, running, usage, self._size(pool), self._quantum, self._limit)

    def _size(self, pool: str) -> int:
        return self._slots if pool == HERE else self._places

    def _loading(self, study_id: int, slot: _Slot) -> float:
        """How long a study that runs took to load, by what its last run that got so far has said."""
        if not slot.loading:
            slot.loading = float((self._store.table(study_id, LOADING) or {}).get("seconds", 0.0))
        return slot.loading

    def _start(self, study: Waiting) -> None:
        lease = self._store.queue.lease(study.study_id)
        if self._ended.is_set() or (lease is not None and lease.live):
            return  # somebody takes it up at this very moment
        with self._log_file(study.study_id).open("wb") as log:
            process = subprocess.Popen(  # noqa: S603 - our own program
                [*self._runner, str(study.study_id)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )
        self._running[study.study_id] = self._slot(study.study_id, study.owner, study.priority, process)
        self._counts["started"] += 1

    def _reap(self) -> None:
        """Take note of runners that have ended."""
        for study_id, slot in list(self._running.items()):
            if slot.process is None or (code := slot.process.poll()) is None:
                continue
            self._keep_log(study_id)
            study = self._store.study(study_id)
            del self._running[study_id]  # not before: a database that is away would have this end forgotten
            if code == 75:  # runner.BUSY
                self._counts["busy"] += 1
            elif study.state == "running" or (study.state == "queued" and code != 0):
                self._crashed(study, cause(code))
            elif study.state == "queued":
                self._counts["yielded"] += 1

    def _adopt(self, found: Sequence[tuple[StudyRecord, LeaseRecord | None]]) -> None:
        """Know what runs: its requests, what a former server started, and what nobody runs any more."""
        there = {study.id for study, _ in found}
        for study_id, known in list(self._running.items()):
            if known.process is None and study_id not in there:
                del self._running[study_id]  # it ended by itself
        for study, lease in found:
            slot = self._running.get(study.id)
            if lease is None or not lease.live:
                if time.monotonic() < self._grace:
                    continue
                # The process of a slot of ours has not taken the lease yet, or its end is seen at the next look.
                if slot is None or slot.process is None:
                    self._running.pop(study.id, None)
                    self._keep_log(study.id)
                    self._crashed(study, "its process ended without a word")
                continue
            if slot is None:
                if lease.holder is None or not holders.is_here(lease.holder):
                    continue  # another machine's slot
                slot = self._running[study.id] = self._slot(study.id, study.owner or "", study.priority)
                slot.holder = lease.holder
            slot.leaving = study.request is not None
            if study.request == "cancel":
                self._press(slot)

    def _press(self, slot: _Slot) -> None:
        """A cancelled study has some time to end, then less."""
        now = time.monotonic()
        slot.cancelled_at = slot.cancelled_at or now
        for step, number in enumerate((signal.SIGTERM, signal.SIGKILL), 1):
            if now - slot.cancelled_at > step * self._patience and number not in slot.told:
                slot.told.append(number)
                slot.send(number)

    def _crashed(self, study: StudyRecord, cause: str) -> None:
        """Put an end that nobody recorded on the study, and queue it again while there is hope."""
        epoch = self._store.queue.acquire(study.id, holders.holder(), _LEASE_SECONDS)
        if epoch is None:
            return  # somebody else runs it by now
        store = self._store.under(study.id, epoch)
        try:
            if store.study(study.id).state != study.state:
                return  # it ended well after it was looked at, and so did its process
            job = store.table(study.id, JOB) or RUN
            ended: str = "failed" if job["kind"] == "run" else "finished"
            if store.queue.request(study.id) == "cancel":
                store.queue.settle(study.id, "cancelled" if ended == "failed" else "finished")
                return
            self._counts["crashed"] += 1
            trials = len(store.trials(study.id, states=("complete", "stopped", "failed", "duplicate")))
            former = store.table(study.id, CRASHES) or {"count": 0, "trials": -1}
            count = 1 + (former["count"] if former["trials"] == trials else 0)
            store.put_table(study.id, CRASHES, {"count": count, "trials": trials})
            if count <= MAX_CRASHES:
                store.queue.settle(study.id, "queued", f"{cause}; going on, {count} of {MAX_CRASHES}")
                return
            for trial in store.running_trials(study.id) if ended == "finished" else ():
                store.fail_trial(trial.id, trial.attempt, "WorkerLost", cause, "", 0.0, "")
            said = f"{cause}, {count} times without a new trial"
            store.queue.settle(study.id, "failed" if ended == "failed" else "finished", said)
        finally:
            store.queue.release(study.id, epoch)

    def _await_ends(self, until: float) -> None:
        """Wait for what runs to end."""
        while self._running and time.monotonic() < until:
            self._try(self._reap)
            for study_id, slot in list(self._running.items()):
                gone = slot.holder is not None and holders.process_of(slot.holder) is None
                if slot.process is None and gone:
                    del self._running[study_id]
            time.sleep(0.05)

    @staticmethod
    def _try(call: object, *arguments: object) -> None:
        try:
            assert callable(call)
            call(*arguments)
        except AutoQError:
            return  # the database is gone: processes are ended all the same

    def _slot(self, study_id: int, owner: str, priority: int, process: subprocess.Popen[bytes] | None = None) -> _Slot:
        pool, width = self._need(study_id)
        return _Slot(owner, priority, pool, min(width, self._size(pool)), time.monotonic(), process)

    def _need(self, study_id: int) -> tuple[str, int]:
        """Of which pool a study takes how many slots."""
        if study_id not in self._needs:
            workers = self._store.study(study_id).spec.get("workers", {})
            on_ray = workers.get("executor") == "ray"
            address = workers.get("address") if on_ray else None
            self._needs[study_id] = (address or HERE, int(workers.get("count", 1)) if on_ray else 1)
        return self._needs[study_id]

    def _log_file(self, study_id: int) -> Path:
        return self.folder / "logs" / f"study-{study_id}.log"

    def _keep_log(self, study_id: int) -> None:
        """Put the end of the log where it is found after this server."""
        if text := tail(self._log_file(study_id)):
            self._store.put_table(study_id, LOG, {"text": text})
