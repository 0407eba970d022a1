"""Server-sent events: what changes of a study, from the count of changes that a client has seen.

    id: 41
    event: change
    data: {"study": {summary}, "trials": [trials that changed], "since": 38}

An event covers the changes after `since` up to its id. A client that comes back with `Last-Event-ID` gets all that
changed since, from the database, so it misses nothing however long it was away. Nothing is kept for a client: those
that are up to date share the last chunks of their study, others read on from the database at their own pace, and one
that takes nothing for `PATIENCE` seconds is dropped. It comes back, as browsers do by themselves.

The database is asked by one poller for all clients, one statement in `PERIOD` seconds, and only while there are any.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from anyio import to_thread
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from autoq.errors import AutoQError, LimitReached, NotFound
from autoq.service.auth import Asker
from autoq.service.metrics import Metrics
from autoq.store import Store, StudySummary
from autoq.store.feed import Whose

PERIOD = 0.3
HEARTBEAT = 15.0
PATIENCE = 20.0
TRIALS = 200  # of a chunk
KEPT = 16  # chunks of a study
LISTED = 200  # studies of a list
RETRY_MS = 1000

log = logging.getLogger("autoq.service")


class _Followed:
    """What all clients of one study share: its count of changes, and the last chunks as they are sent."""

    def __init__(self, version: int) -> None:
        self.version = version
        self.clients = 0
        self.chunks: deque[tuple[int, int, bytes]] = deque(maxlen=KEPT)  # after, up to and with, text

    def after(self, seen: int) -> tuple[int, bytes] | None:
        """A chunk that goes on from `seen`, if it is still here."""
        return next(((upto, text) for since, upto, text in self.chunks if since <= seen < upto), None)


class Hub:
    """All clients that follow something, and the one that asks the database for them."""

    def __init__(self, store: Store, metrics: Metrics, limit: int, limit_each: int) -> None:
        self.store, self.metrics, self.limit, self.limit_each = store, metrics, limit, limit_each
        self._each: Counter[int] = Counter()  # clients by their token
        self.closed = False
        self.clients = 0
        self._followed: dict[int, _Followed] = {}
        self._versions: dict[int, int] = {}  # of all studies, while somebody follows the list
        self._listeners = 0
        self._news = asyncio.Event()
        self._moment = 0  # how often there was news
        self._lists: dict[Whose, tuple[int, int, list[StudySummary]]] = {}
        self._reading = asyncio.Lock()
        self._poller: asyncio.Task[None] | None = None

    def close(self) -> None:
        """End all streams: the server goes down."""
        self.closed = True
        self._tell()

    def _tell(self) -> None:
        self._moment += 1
        self._news.set()
        self._news = asyncio.Event()

    def _enter(self, token: int | None) -> None:
        if self.clients >= self.limit:
            raise LimitReached(f"{self.limit} clients follow events already")
        if token is not None and self._each[token] >= self.limit_each:
            raise LimitReached(f"{self.limit_each} clients follow events with this token already")
        self.clients += 1
        if token is not None:
            self._each[token] += 1
        self.metrics.streams.set(self.clients)
        if self._poller is None or self._poller.done():
            self._poller = asyncio.get_running_loop().create_task(self._poll())

    def _leave(self, token: int | None) -> None:
        self.clients -= 1
        if token is not None:
            self._each[token] -= 1
            self._each += Counter()  # those that follow nothing are forgotten
        self.metrics.streams.set(self.clients)

    async def _poll(self) -> None:
        """Look for what is new, as long as anybody is there."""
        while self.clients and not self.closed:
            await asyncio.sleep(PERIOD)
            try:
                if await self._look():
                    self._tell()
            except AutoQError as problem:
                self.metrics.database_errors.inc()
                log.warning("events: %s", problem)
                await asyncio.sleep(HEARTBEAT / 5)

    async def _look(self) -> bool:
        ids = None if self._listeners else list(self._followed)
        found = await to_thread.run_sync(self.store.feed.versions, ids)
        news = False
        if self._listeners:
            news, self._versions = found != self._versions, found
        for study_id, followed in list(self._followed.items()):
            version = found.get(study_id, -1)
            if version != followed.version:
                if version > followed.version:
                    since = followed.version
                    try:
                        version, text = await to_thread.run_sync(self._read, study_id, since)
                    except NotFound:  # removed a moment ago: the others are told of theirs all the same
                        version = -1
                    else:
                        followed.chunks.append((since, version, text))
                followed.version = version
                news = True
        return news

    def _read(self, study_id: int, since: int) -> tuple[int, bytes]:
        """A chunk of changes after `since`, as it is sent."""
        chunk = self.store.feed.chunk(study_id, since, TRIALS)
        trials = [trial.to_json() for trial in chunk.trials]
        data = {"study": chunk.summary.to_json(), "trials": trials, "since": since}
        return chunk.upto, event("change", data, chunk.upto)

    async def study(self, study_id: int, seen: int | None, token: int | None = None) -> AsyncIterator[bytes]:
        """The events of one study after `seen`; None: from now on, with how it stands. `token` is whose they are."""
        self._enter(token)
        followed: _Followed | None = None
        try:
            followed = self._followed.get(study_id)
            if followed is None:
                versions = await to_thread.run_sync(self.store.feed.versions, [study_id])
                followed = self._followed.setdefault(study_id, _Followed(versions.get(study_id, -1)))
            followed.clients += 1
            last = followed.version - 1 if seen is None else seen
            if last > followed.version:
                last = 0  # of another database: all of it is news
            while not self.closed:
                news = self._news
                if followed.version < 0:
                    yield event("gone", {}, None)
                    return
                if last >= followed.version:
                    if not await _comes(news, HEARTBEAT):
                        yield b""
                    continue
                chunk = followed.after(last)
                if chunk is None:
                    try:
                        chunk = await to_thread.run_sync(self._read, study_id, last)
                    except NotFound:
                        followed.version = -1
                        continue
                last, text = chunk
                yield text
        finally:
            self._leave(token)
            if followed is not None:
                followed.clients -= 1
                if followed.clients == 0 and self._followed.get(study_id) is followed:
                    del self._followed[study_id]

    async def _list(self, whose: Whose) -> tuple[int, list[StudySummary]]:
        """All changes of what somebody sees, and the newest studies of it: read once for all who see the same."""
        async with self._reading:
            moment, total, found = self._lists.get(whose, (-1, 0, []))
            if moment != self._moment:
                moment = self._moment
                _, total = await to_thread.run_sync(self.store.feed.total, whose)
                found = await to_thread.run_sync(lambda: self.store.feed.studies(whose, limit=LISTED))
                self._lists[whose] = moment, total, found
            return total, found

    async def studies(self, whose: Whose, seen: int | None, token: int | None = None) -> AsyncIterator[bytes]:
        """The events of the list of studies: all of them first, unless nothing changed since `seen`, then those that
        change. Of more than `LISTED`, the newest."""
        self._enter(token)
        self._listeners += 1
        if self._listeners == 1:
            self._moment += 1  # nobody has looked at the list since
            self._lists.clear()
        try:
            known: dict[int, int] = {}
            last = seen
            while not self.closed:
                news = self._news
                total, found = await self._list(whose)
                if total != last:
                    changed = [study for study in found if known.get(study.id) != study.changes]
                    known, last = {study.id: study.changes for study in found}, total
                    yield event("studies", {"studies": [study.to_json() for study in changed]}, total)
                elif not known:
                    known = {study.id: study.changes for study in found}
                if not await _comes(news, HEARTBEAT):
                    yield b""
        finally:
            self._listeners -= 1
            self._leave(token)


async def _comes(news: asyncio.Event, seconds: float) -> bool:
    """Whether there is news within so many seconds."""
    try:
        await asyncio.wait_for(news.wait(), seconds)
    except TimeoutError:
        return False
    return True


def event(name: str, data: Any, number: int | None) -> bytes:
    """One event as it is sent. JSON has no line breaks, so one `data` line holds it."""
    told = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    own = "" if number is None else f"id: {number}\n"
    return f"{own}event: {name}\ndata: {told}\n\n".encode()


class EventStream(Response):
    """A stream of events that ends when the client goes, when it takes nothing, or when it may no longer see it."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], still: Callable[[], Awaitable[bool]]) -> None:
        self.events, self.still = events, still
        self.status_code = 200
        self.background = None
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = asyncio.ensure_future(self._stream(send))
        gone = asyncio.ensure_future(_gone(receive))
        try:
            await asyncio.wait({stream, gone}, return_when=asyncio.FIRST_COMPLETED)
            if stream.done():
                stream.result()
        finally:
            for task in (stream, gone):
                task.cancel()
            await asyncio.gather(stream, gone, return_exceptions=True)
            if (close := getattr(self.events, "aclose", None)) is not None:
                await close()

    async def _stream(self, send: Send) -> None:
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(start)
        await send({"type": "http.response.body", "body": f"retry: {RETRY_MS}\n\n".encode(), "more_body": True})
        clock = asyncio.get_running_loop().time
        checked = clock()
        async for text in self.events:
            if clock() - checked > HEARTBEAT / 2:
                checked = clock()
                if not await self.still():
                    break
            try:
                async with asyncio.timeout(PATIENCE):
                    await send({"type": "http.response.body", "body": text or b": \n\n", "more_body": True})
            except TimeoutError:
                return  # what is left unsaid is in the database
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def seen_of(last: str | None, since: int | None) -> int | None:
    """What a client has seen. `Last-Event-ID` goes first: it is of a stream that broke off. What is no number of
    ours means: nothing."""
    if not last:
        return since
    return int(last) if last.isascii() and last.isdecimal() and len(last) < 12 else 0


def still_valid(store: Store, asker: Asker) -> Callable[[], Awaitable[bool]]:
    """Whether the one who follows may still see what was visible when the stream began."""

    async def still() -> bool:
        accounts = store.accounts
        if asker.token_id is None:
            return not await to_thread.run_sync(accounts.any)
        return await to_thread.run_sync(accounts.still, asker.token_id)

    return still
