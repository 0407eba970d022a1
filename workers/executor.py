"""Jobs on Ray actors, supervised here: no Ray retries, no Ray restarts.

Ray can report an error for a task that ran, and restarting an actor with its constructor's arguments
is unsafe (https://github.com/ray-project/ray/issues/53727). So an actor lives once. When it dies or
runs past a time limit its reference is forgotten, which drops whatever it might still answer, its job
comes back as a failure, and another actor takes its place. Actors for which the cluster has no room wait
inside Ray until a node joins, and those of a node that leaves die and are replaced: so workers come and go
in the middle of a study. Those on another machine than the study's process get the files that they lack from here
(`autoq.workers.files`).

Workers may have devices of several kinds. A job that names a device waits for a worker that has it, and fails where
none is left to wait for.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from autoq.errors import AutoQError, WorkerLost
from autoq.search.executors import Executor, Failure, Job, Result, TimeLimit, WorkerView, make_evaluator
from autoq.spec import StudySpec

from .actor import About, Loaded, Make, Worker, pack, unpack
from .exchange import Exchange
from .files import Parcel, Wants, WantsParcels, parcels, supply
from .machines import machine
from .session import LOOK_SECONDS, Session

ANSWER_SECONDS = 30.0  # an idle worker that does not answer for so long counts as dead
DEATHS_IN_A_ROW = 4  # and one per worker: they may all die of the same shortage of memory
DEVICE_SECONDS = 60.0  # for which a job waits for a device that no worker has yet
KEPT_CHUNKS = 3  # of files on their way to other machines, which mostly ask for the same ones
INHERITED = ("AUTOQ_CACHE", "OMP_NUM_THREADS")
OUTPUT_CHARACTERS = 8192  # of a dead worker's last words
FAULT = "Fatal Python error: "


@dataclass(eq=False)
class _Member:
    """A worker as the executor sees it; `pending` is the reference of what it does now: load, or a job."""

    number: int
    actor: Any
    identity: Any
    pending: Any
    scratch: Path | None
    about: About | None = None
    device: str = ""
    ready: bool = False
    job: Job | None = None
    since: float = 0.0

    @property
    def overdue_at(self) -> float | None:
        """When its job's time is up, on the monotonic clock."""
        if self.job is None or self.job.limit_seconds is None:
            return None
        return self.since + self.job.limit_seconds

    @property
    def placed(self) -> bool:
        """Whether Ray has found room for it."""
        return self.ready or bool(ray.wait([self.identity], timeout=0)[0])

    def who(self) -> tuple[str, int | None]:
        """`host:pid`, and the process id on this machine, as far as the worker has said."""
        if self.about is None:
            done, _ = ray.wait([self.identity], timeout=0)
            with contextlib.suppress(RayError):
                self.about = ray.get(done[0]) if done else None
        if self.about is None:
            return f"worker {self.number}", None
        return self.about.name, self.about.pid if self.about.machine == machine() else None

    def fits(self, job: Job) -> bool:
        """Whether it may have the job now."""
        return self.ready and self.job is None and self.is_of(job)

    def is_of(self, job: Job) -> bool:
        """Whether it has the job's device."""
        return job.device is None or job.device in self.device


class RayExecutor(Executor):
    """Runs jobs on `workers.count` Ray actors with an evaluator each, fewer while the cluster has no room for all.

    The constructor starts or joins Ray and starts the actors, which load while the caller goes on;
    it raises what `Session` raises. `make` builds an evaluator from a spec in the worker's process; it
    travels by pickle.
    """

    def __init__(self, spec: StudySpec, make: Make = make_evaluator) -> None:
        self._count = spec.workers.count
        self._queue: collections.deque[tuple[Job, bytes, float]] = collections.deque()
        self._members: list[_Member] = []
        self._started = 0
        self._deaths = 0
        self._last_death = ""
        self._broken: Exception | None = None
        self._closed = False
        self._spec = spec
        self._parcels: tuple[Parcel, ...] | None = None
        self._chunks: collections.OrderedDict[Wants, Any] = collections.OrderedDict()
        self._exchange = Exchange()
        self._session = Session(spec.workers)
        try:
            workers = spec.workers.model_copy(update={"cpus": self._session.cpus})
            self._recipe = pack((make, spec.model_copy(update={"workers": workers})))
            self._actors = ray.remote(Worker).options(
                num_cpus=workers.cpus,
                num_gpus=workers.gpus,
                memory=workers.memory,
                scheduling_strategy="SPREAD" if workers.placement == "spread" else "DEFAULT",
                max_restarts=0,
                max_task_retries=0,
            )
            self._fill()
        except BaseException:
            self.close()
            raise

    def submit(self, job: Job) -> None:
        """Queue a job and start it if a worker is idle. Raises what pickling its arguments raises."""
        assert not self._closed
        self._queue.append((job, pack(job), time.monotonic()))
        self._dispatch()

    def next(self, timeout: float | None = None) -> Result | None:
        """The next finished job; see `Executor.next`. An interrupt leaves everything as it was."""
        until = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._broken is not None:
                raise self._broken
            self._session.check()
            if not self._queue and not self._running():
                return None
            self._fill()
            self._dispatch()
            if (late := self._stop_overdue() or self._give_up()) is not None:
                return late
            member = self._wait(until)
            if member is not None:
                result = self._collect(member)
                if result is not None:
                    return result
            elif until is not None and time.monotonic() >= until:
                return None

    def ready(self) -> Result | None:
        """What `next` has without waiting."""
        return self.next(0)

    def workers(self) -> list[WorkerView]:
        """The actors, by the names that they have given."""
        found = []
        for member in list(self._members):
            job, (name, pid), about = member.job, member.who(), member.about
            state: Literal["waiting", "loading", "idle", "busy"] = (
                "busy" if job else "idle" if member.ready else "loading"
            )
            if about is None:
                found.append(WorkerView(name, "waiting"))
            else:
                key, device = job.key if job else None, member.device or about.device
                found.append(WorkerView(name, state, key, pid, device, about.memory_bytes))
        return found

    def close(self) -> None:
        """End the workers, and Ray if it was started here."""
        self._closed = True
        self._queue.clear()
        if ray.is_initialized():
            for member in self._members:
                ray.kill(member.actor)
            self._exchange.close()
        self._members.clear()
        self._session.close()

    def _running(self) -> list[Job]:
        return [member.job for member in self._members if member.job is not None]

    def _fill(self) -> None:
        """Start the workers that are missing, but none beside an exclusive job: loading disturbs it."""
        if self._deaths >= DEATHS_IN_A_ROW + self._count:
            raise WorkerLost(
                f"{self._deaths} workers died in a row without finishing a job; the last: {self._last_death}"
            )
        if any(job.exclusive for job in self._running()):
            return
        while len(self._members) < self._count:
            scratch = None
            if self._session.folder is not None:
                scratch = self._session.folder / f"worker-{self._started}"
                scratch.mkdir()
            actor = self._actors.remote()
            identity = actor.identity.remote()
            loading = actor.load.remote(self._recipe, *self._surroundings(scratch))
            self._members.append(_Member(self._started, actor, identity, loading, scratch))
            self._started += 1

    def _surroundings(self, scratch: Path | None) -> tuple[str, dict[str, str | None], str]:
        """This machine, and environment and working folder of a new worker on it; see `Worker.load`.

        They are this process's, also where Ray set others (OMP_NUM_THREADS) or was started elsewhere; another machine
        has its own. Temporary files go to `scratch`, which outlives the worker and is removed here: a killed process
        cannot clean up.
        """
        environment = {name: os.environ.get(name) for name in INHERITED}
        if scratch is not None:
            environment["TMPDIR"] = str(scratch)
        return machine(), environment, str(Path.cwd())

    def _dispatch(self) -> None:
        """Start queued jobs in order, as far as there are idle workers and exclusive jobs allow."""
        while self._queue:
            running = self._running()
            if any(job.exclusive for job in running):
                return
            member = next((member for member in self._members if member.fits(self._queue[0][0])), None)
            if member is None:
                return
            if self._queue[0][0].exclusive:
                # In a session that was started here there is room for all of them, so none is placed late.
                mine = self._session.folder is not None
                if running or not all(member.ready for member in self._members if mine or member.placed):
                    return
                self._withdraw()
            if not self._answers(member):
                continue
            job, packed, _ = self._queue.popleft()
            member.pending = member.actor.run.remote(packed)
            member.since = time.monotonic()
            member.job = job

    def _withdraw(self) -> None:
        """Give up workers that wait for room: one that found it beside an exclusive job would disturb it."""
        if any(member.ready for member in self._members):
            for member in [member for member in self._members if not member.ready]:
                self._remove(member)

    def _answers(self, member: _Member) -> bool:
        """Whether an idle worker lives. One that died since its last job must not cost the next one."""
        try:
            member.about = ray.get(member.actor.identity.remote(), timeout=ANSWER_SECONDS)
        except RayError as problem:
            self._died(member, "while it was idle", problem)
            return False
        return True

    def _wait(self, until: float | None) -> _Member | None:
        """The next worker that has something to tell; None when `until`, a job's time limit or the time to look after
        the cluster came first."""
        pending = {member.pending: member for member in self._members if member.pending is not None}
        if not pending:
            time.sleep(0.01)  # a job waits for a device, and nobody has anything to tell
            return None
        moments = [moment for moment in (until, *(m.overdue_at for m in self._members)) if moment is not None]
        timeout = max(0.0, min(moments) - time.monotonic()) if moments else LOOK_SECONDS
        done, _ = ray.wait(list(pending), num_returns=1, timeout=min(timeout, LOOK_SECONDS))
        return pending[done[0]] if done else None

    def _stop_overdue(self) -> Result | None:
        """End one worker whose job ran past its limit, unless the job has just finished."""
        now = time.monotonic()
        for member in self._members:
            if member.overdue_at is None or now < member.overdue_at or ray.wait([member.pending], timeout=0)[0]:
                continue
            job = member.job
            assert job is not None
            name, _ = member.who()
            self._remove(member)
            return Result(job, None, Failure.of(TimeLimit.of(job)), now - member.since, name)
        return None

    def _give_up(self) -> Result | None:
        """Fail the next job if it is for a device that no worker has, or will have soon."""
        if not self._queue or self._queue[0][0].device is None:
            return None
        job, _, since = self._queue[0]
        loading = any(not member.ready and member.placed for member in self._members)
        if loading or not self._members or any(member.is_of(job) for member in self._members if member.ready):
            return None
        if not all(member.ready for member in self._members) and time.monotonic() < since + DEVICE_SECONDS:
            return None
        self._queue.popleft()
        there = ", ".join(sorted({repr(member.device) for member in self._members if member.ready})) or "none"
        problem = AutoQError(f"no worker has the device {job.device!r} that {job.action!r} is for; there are: {there}")
        return Result(job, None, Failure.of(problem))

    def _introduce(self, member: _Member) -> None:
        """A worker is ready: its bank has neighbours if there are others on another machine."""
        member.who()
        if member.about is None:
            return
        before = self._exchange.register
        self._exchange.welcome(member.about.machine, member.about.node)
        if (register := self._exchange.register) is not None:
            for each in self._members if before is None else [member]:
                if each.ready:
                    each.actor.meet.remote([register])

    def _supply(self, wants: Wants) -> Any:
        """A reference to what a worker on another machine asks for, kept for the next one that does."""
        if wants not in self._chunks:
            if self._parcels is None:
                self._parcels = parcels(self._spec)
            content = pack(self._parcels) if isinstance(wants, WantsParcels) else supply(wants, self._parcels)
            self._chunks[wants] = ray.put(content)
            while len(self._chunks) > KEPT_CHUNKS:
                self._chunks.popitem(last=False)
        self._chunks.move_to_end(wants)
        return self._chunks[wants]

    def _collect(self, member: _Member) -> Result | None:
        """What a worker tells: a job's result, or (None) that it wants something, has loaded or died before it did."""
        reference, member.pending = member.pending, None
        job, member.job = member.job, None
        seconds = time.monotonic() - member.since
        self._session.check_own()
        try:
            answer = unpack(ray.get(reference))
        except RayTaskError as problem:
            answer = problem.cause  # the job cannot be unpacked there: a module that only this process has
        except RayError as problem:
            name, _ = member.who()
            doing = f"while it ran {job.action!r} of {job.key!r}" if job else "while it loaded the model"
            failure = self._died(member, doing, problem)
            if job is None:
                return None
            if failure is None:
                self._queue.appendleft((job, pack(job), time.monotonic()))
                return None
            return Result(job, None, failure, seconds, name)
        except Exception as problem:
            answer = problem  # the result cannot be unpacked here; unpickling may raise anything
        if isinstance(answer, Wants):
            member.job = job
            try:
                member.pending = member.actor.feed.remote(self._supply(answer))
            except AutoQError as problem:
                self._broken = problem
            return None
        if job is None:
            member.ready = True
            if isinstance(answer, Loaded):
                self.loading_seconds, member.device = answer.seconds, answer.device
                self._introduce(member)
                if all(each.ready for each in self._members if each.placed):
                    # Nobody asks for them now, and Ray ends, without a word, a process that has lost its own node and
                    # has something there.
                    self._chunks.clear()
            else:
                self._broken = answer
                self._remove(member)
            return None
        self._deaths = 0
        if isinstance(answer, Exception):
            return Result(job, None, Failure.of(answer), seconds, member.who()[0])
        assert isinstance(answer, Result)
        return dataclasses.replace(answer, job=job)

    def _died(self, member: _Member, doing: str, problem: RayError) -> Failure | None:
        """Write a worker off; the record of why, with its last output where it can be found.

        None where the cluster has lost what this process leans on: with it all workers go, and none is to blame.
        """
        name, pid = member.who()
        output = self._output(pid)
        fault = next((line for line in output.splitlines() if line.startswith(FAULT)), None)
        if isinstance(problem, OutOfMemoryError):
            cause = "ended by Ray because the node was short of memory"
        else:
            cause = fault or "killed from outside, for want of memory, or by a fault in native code"
        message = f"{name} died {doing}: {cause}"
        self._remove(member)
        if not self._session.answers():
            return None
        self._deaths += 1
        self._last_death = message
        return Failure("WorkerLost", message, f"{problem}\n\n{output}".strip(), crashed=True)

    def _output(self, pid: int | None) -> str:
        """What a worker of this machine wrote to stderr last, or from its fault on."""
        if pid is None or self._session.logs is None:
            return ""
        text = "".join(
            path.read_text(encoding="utf-8", errors="replace")
            for path in self._session.logs.glob(f"worker-*-{pid}.err")
        )
        # A fault is followed by the stack, and that by the names of all native modules, which are many.
        _, fault, stack = text.rpartition(FAULT)
        return (fault + stack)[:OUTPUT_CHARACTERS] if fault else text[-OUTPUT_CHARACTERS:]

    def _remove(self, member: _Member) -> None:
        self._members.remove(member)
        ray.kill(member.actor)
        self._exchange.gone(member.who()[0])
        if member.scratch is not None:
            shutil.rmtree(member.scratch, ignore_errors=True)
