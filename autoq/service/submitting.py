"""From a request's body to a queued study."""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from anyio import to_thread
from fastapi import Request

from autoq.errors import SpecError
from autoq.service.auth import Asker
from autoq.service.errors import Refusal
from autoq.service.heavy import Backroom
from autoq.service.requests import SpecBody
from autoq.service.settings import Settings
from autoq.service.sources import check_sources
from autoq.spec import StudySpec, build_spec, parse_spec
from autoq.store import Store
from autoq.store.queue_submissions import Submission, Submitted

TOGETHER = 64  # submissions in one transaction


def read_spec(body: SpecBody, asker: Asker, settings: Settings) -> StudySpec:
    """The spec of a body, by its own text alone. Raises `SpecError` with the line that the command line has."""
    if (body.spec is None) == (body.yaml is None):
        raise SpecError("spec: give either spec (JSON) or yaml (text)")
    spec = build_spec(body.spec) if body.spec is not None else parse_spec(body.yaml or "")
    check_sources(spec, asker, settings.sources)
    return spec


def backroom_of(request: Request) -> Backroom:
    """What answers questions that need a model. Raises `Refusal` where the server was started without."""
    backroom: Backroom | None = request.app.state.backroom
    if backroom is None:
        raise Refusal(503, "this server only shows what is stored; it takes no studies", {"Retry-After": "300"})
    return backroom


class Submissions:
    """Puts studies into the queue: those that come while others are being written go together, in one transaction."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store, self.settings = store, settings
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="submissions")
        self._waiting: deque[tuple[Submission, Future[Submitted]]] = deque()

    async def submit(
        self, backroom: Backroom, asker: Asker, spec: StudySpec, key: str | None, priority: int
    ) -> Submitted:
        """The queued study and True, or the one that was submitted under this key before and False."""
        user, mark = asker.user, fingerprint(spec, priority)
        prepared = backroom.known(spec)
        if prepared is None:
            if key is not None:
                former = await to_thread.run_sync(self.store.queue.submitted, user, key, mark)
                if former is not None:
                    return former, False
            prepared = await backroom.prepare(spec)
        limit = self.settings.limits.waiting_studies
        future: Future[Submitted] = Future()
        self._waiting.append((Submission(user, key, mark, spec, prepared, priority, limit), future))
        self._thread.submit(self._write)
        return await asyncio.wrap_future(future)

    def _write(self) -> None:
        """Store what waits; nothing where an earlier call has taken it along."""
        batch: list[tuple[Submission, Future[Submitted]]] = []
        while self._waiting and len(batch) < TOGETHER:
            one = self._waiting.popleft()
            if one[1].set_running_or_notify_cancel():  # else its client is gone
                batch.append(one)
        if not batch:
            return
        found: Sequence[Submitted | BaseException]
        try:
            found = self.store.queue.submit_all([one for one, _ in batch])
        except BaseException as problem:  # whatever it is, they are waiting to be told
            found = [problem] * len(batch)
        for (_, future), each in zip(batch, found, strict=True):
            if isinstance(each, BaseException):
                future.set_exception(each)
            else:
                future.set_result(each)


def fingerprint(spec: StudySpec, priority: int) -> str:
    """What tells one submission from another under the same key."""
    told: dict[str, Any] = {"spec": spec.model_dump(mode="json"), "priority": priority}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
