"""From a request's body to a queued study."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import anyio
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
from autoq.store import Store, StudyRecord


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
    """Puts studies into the queue, a bounded number of them at a time.

    On SQLite one at a time: writers that wait here do so in the order in which they came, those that wait for the
    file's lock by chance, and of two hundred the last ones for seconds.
    """

    def __init__(self, store: Store, settings: Settings) -> None:
        self.store, self.settings = store, settings
        self.turns = anyio.CapacityLimiter(1 if store.address.startswith("sqlite") else 8)

    async def submit(
        self, backroom: Backroom, asker: Asker, spec: StudySpec, key: str | None, priority: int
    ) -> tuple[StudyRecord, bool]:
        """The queued study and True, or the one that was submitted under this key before and False."""
        queue, user, mark = self.store.queue, asker.user, fingerprint(spec, priority)
        if key is not None:
            former = await to_thread.run_sync(queue.submitted, user, key, mark)
            if former is not None:
                return former, False
        prepared = await backroom.prepare(spec)
        limit = self.settings.limits.waiting_studies
        return await to_thread.run_sync(
            queue.submit, user, key, mark, spec, prepared, priority, limit, limiter=self.turns
        )


def fingerprint(spec: StudySpec, priority: int) -> str:
    """What tells one submission from another under the same key."""
    told: dict[str, Any] = {"spec": spec.model_dump(mode="json"), "priority": priority}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()
