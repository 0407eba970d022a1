"""The backroom: one process that answers what needs a model, so that the server itself loads none.

    backroom = Backroom(store.address)
    backroom.start()                        # begins to import torch; what is asked meanwhile waits
    prepared = await backroom.prepare(spec)
    offer = await backroom.offer(study_id, {"size_bytes": "90MB"}, {}, None)
    backroom.stop()

`create_app`'s caller makes one and puts it on `app.state.backroom`. From code that is not asynchronous the same is
`prepare_now` and `offer_now`.

Questions are answered one after the other. One that takes longer than its limit, or more memory than there is to have,
ends the process and is refused; the next question starts another process. Nothing but JSON crosses the pipes.

A spec's check does not depend on its name, the sampler's seed, or the budget, so submissions that differ in these alone
share one answer, also while it is being found. It does depend on files: where a spec names a file or folder, its age
and size are part of what the answer is kept under.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from autoq.errors import GaveUp, LimitReached, Unavailable, restore
from autoq.spec import StudySpec
from autoq.store import Prepared

PREPARE_SECONDS = 180.0  # importing transformers and reading a model's skeleton from a hub
OFFER_SECONDS = 120.0
MEMORY_BYTES = 6 * 2**30
WAITING = 256  # questions that may wait
KEPT = 512  # verdicts
KEPT_SECONDS = 600.0
REFUSED_SECONDS = 10.0  # a refusal may be of what somebody is about to put right
_LOOK_SECONDS = 0.25
_STOPPING = "the server is being stopped"
_DOES = {
    "hello": "begin",
    "prepare": "check the spec against its model and target",
    "offer": "find what the study's model would have",
}


class Backroom:
    """The process and its questions. `address` is a store's `address`; `command` what is run."""

    def __init__(
        self,
        address: str,
        *,
        prepare_seconds: float = PREPARE_SECONDS,
        offer_seconds: float = OFFER_SECONDS,
        memory_bytes: int = MEMORY_BYTES,
        command: tuple[str, ...] = (sys.executable, "-m", "autoq.service.backroom_process"),
    ) -> None:
        self._address, self._command = address, command
        self._prepare_seconds, self._offer_seconds, self._memory = prepare_seconds, offer_seconds, memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._asker = ThreadPoolExecutor(1, thread_name_prefix="backroom")
        self._lock = threading.Lock()
        self._verdicts: OrderedDict[str, tuple[float, Future[Any]]] = OrderedDict()
        self._room = threading.Semaphore(WAITING)
        self._stopped = False
        self._asked = 0
        self.starts = 0  # processes that were started

    def start(self) -> None:
        """Start the process now instead of with the first question."""
        self._enqueue("hello", {}, self._prepare_seconds)

    def stop(self) -> None:
        """End the process. What is being asked is refused."""
        self._stopped = True
        if (process := self._process) is not None:
            process.kill()  # whoever reads its answer sees the end of it
        self._asker.shutdown(wait=True, cancel_futures=True)
        self._end()

    async def prepare(self, spec: StudySpec) -> Prepared:
        """Check a spec against model, target and data: what a study of it is made with. See `search.setup.prepare`.

        Raises `BadInput` with the line that the command line gives, `GaveUp` where the process took too long or
        too much memory or died of the question, and `Unavailable` where it is being stopped.
        """
        return Prepared.from_json(await asyncio.wrap_future(self._verdict(spec)))

    def known(self, spec: StudySpec) -> Prepared | None:
        """What `prepare` would give at once because it found it a moment ago; None where it would have to ask."""
        with self._lock:
            asked, future = self._verdicts.get(_key(spec), (0.0, None))
        if future is None or not future.done() or future.cancelled() or future.exception() is not None:
            return None
        return Prepared.from_json(future.result()) if time.monotonic() - asked < KEPT_SECONDS else None

    async def offer(
        self, study_id: int, maximum: Mapping[str, Any], minimum: Mapping[str, Any], best: str | None = None
    ) -> dict[str, Any]:
        """What the study's model predicts to be best within the limits; see `search.offers.offer_json`."""
        found: dict[str, Any] = await asyncio.wrap_future(self._offer(study_id, maximum, minimum, best))
        return found

    def prepare_now(self, spec: StudySpec) -> Prepared:
        """`prepare` for code that may wait."""
        return Prepared.from_json(self._verdict(spec).result())

    def offer_now(
        self, study_id: int, maximum: Mapping[str, Any], minimum: Mapping[str, Any], best: str | None = None
    ) -> dict[str, Any]:
        """`offer` for code that may wait."""
        found: dict[str, Any] = self._offer(study_id, maximum, minimum, best).result()
        return found

    # Verdicts

    def _verdict(self, spec: StudySpec) -> Future[Any]:
        """The answer that is known or on its way, or that of a new question."""
        key, now = _key(spec), time.monotonic()
        with self._lock:
            if (known := self._verdicts.get(key)) is not None:
                asked, future = known
                if not future.done() or now - asked < (REFUSED_SECONDS if future.exception() else KEPT_SECONDS):
                    return _shared(future)
            future = self._enqueue("prepare", {"spec": spec.model_dump(mode="json")}, self._prepare_seconds)
            self._verdicts[key] = (now, future)
            self._verdicts.move_to_end(key)
            while len(self._verdicts) > KEPT:
                self._verdicts.popitem(last=False)
        return _shared(future)

    def _offer(
        self, study_id: int, maximum: Mapping[str, Any], minimum: Mapping[str, Any], best: str | None
    ) -> Future[Any]:
        question = {"study": study_id, "max": dict(maximum), "min": dict(minimum), "best": best}
        return self._enqueue("offer", question, self._offer_seconds)

    # The process

    def _enqueue(self, what: str, question: Mapping[str, Any], seconds: float) -> Future[Any]:
        if not self._room.acquire(blocking=False):
            raise LimitReached(f"{WAITING} questions wait for an answer already; try again later")
        try:
            return self._asker.submit(self._ask, what, question, seconds)
        except RuntimeError:
            self._room.release()
            raise Unavailable(_STOPPING) from None

    def _ask(self, what: str, question: Mapping[str, Any], seconds: float) -> Any:
        """One question and its answer; in the one thread that talks to the process."""
        try:
            self._asked += 1
            line = json.dumps({"id": self._asked, "ask": what, **question}, allow_nan=False).encode() + b"\n"
            try:
                return self._exchange(line, what, seconds)
            except (OSError, EOFError):
                # It ended since the last question, or of this one: which one shows at the second time.
                self._end()
            try:
                return self._exchange(line, what, seconds)
            except (OSError, EOFError):
                self._end()
                raise GaveUp(f"the process that was to {_DOES[what]} died of it, twice") from None
        finally:
            self._room.release()

    def _exchange(self, line: bytes, what: str, seconds: float) -> Any:
        process = self._running()
        assert process.stdin is not None
        process.stdin.write(line)
        process.stdin.flush()
        answer = json.loads(self._read(process, what, seconds))
        assert answer["id"] == self._asked, answer["id"]
        if _memory(process.pid) > self._memory:
            self._end()  # before the next question, which then finds a small one
        if "error" in answer:
            raise restore(answer["error"]["type"], answer["error"]["message"])
        return answer["answer"]

    def _read(self, process: subprocess.Popen[bytes], what: str, seconds: float) -> bytes:
        """The next line of the process. Ends it where that takes too long or too much."""
        assert process.stdout is not None
        until, found = time.monotonic() + seconds, bytearray()
        while True:
            if select.select([process.stdout], [], [], _LOOK_SECONDS)[0]:
                part = os.read(process.stdout.fileno(), 1 << 20)
                if not part:
                    raise EOFError
                found += part
                if found.endswith(b"\n"):
                    return bytes(found)
            if time.monotonic() > until:
                self._end()
                raise GaveUp(f"to {_DOES[what]} took longer than {seconds:g} s, and was given up")
            if (used := _memory(process.pid)) > self._memory:
                self._end()
                allowed = self._memory / 2**30
                raise GaveUp(f"to {_DOES[what]} takes {used / 2**30:.1f} GiB of memory; {allowed:.1f} are allowed")

    def _running(self) -> subprocess.Popen[bytes]:
        if self._stopped:
            raise Unavailable(_STOPPING)
        if self._process is None or self._process.poll() is not None:
            self._end()
            environment = {**os.environ, "AUTOQ_DB": self._address}
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, start_new_session=True
            )
            self.starts += 1
        return self._process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()


def _shared(future: Future[Any]) -> Future[Any]:
    """A future of one's own: whoever gives up waiting cancels it, and not what others wait for."""
    mine: Future[Any] = Future()

    def pass_on(done: Future[Any]) -> None:
        if not mine.set_running_or_notify_cancel():
            return
        if done.cancelled():
            mine.set_exception(Unavailable(_STOPPING))
        elif (problem := done.exception()) is not None:
            mine.set_exception(problem)
        else:
            mine.set_result(done.result())

    future.add_done_callback(pass_on)
    return mine


def _memory(pid: int) -> int:
    import psutil

    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:
        return 0


def _key(spec: StudySpec) -> str:
    """What the check of a spec depends on."""
    tree = spec.model_dump(mode="json")
    del tree["name"], tree["budget"], tree["sampler"]["seed"]
    sources = [spec.model.id, spec.data.source, *spec.recipes, *(task.source for task in spec.tasks.values())]
    sources += [spec.target.device] if spec.target.device is not None else []
    return json.dumps([tree, [_stamp(source) for source in sources]], sort_keys=True)


def _stamp(source: str) -> list[Any]:
    """Age and size of a file, or of what is in a folder; nothing for what is neither."""
    try:
        path = Path(source)
        found = [path, *sorted(path.iterdir())] if path.is_dir() else [path]
        return [[each.name, (state := each.stat()).st_mtime_ns, state.st_size] for each in found]
    except (OSError, ValueError):
        return []
