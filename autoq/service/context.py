"""What every route gets: the store, who asks, and the study that the address names, if that one may see it.

All are coroutines: FastAPI sends a plain function to a thread and back, which costs more than what these do.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Annotated, cast

from fastapi import Depends, Path, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.routing import APIRoute

from autoq.errors import BadInput, NotFound
from autoq.service.auth import Asker, asker_of
from autoq.service.errors import Refusal
from autoq.service.settings import Settings
from autoq.store import Store
from autoq.store.feed import Stamp

FREE = "figures"  # the tag of routes that judge their parameters themselves
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


async def _store(request: Request) -> Store:
    return cast(Store, request.app.state.store)


async def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


async def _asker(request: Request) -> Asker:
    return _known(request)


def _known(request: Request) -> Asker:
    asker = asker_of(request.scope)
    if asker is None:
        raise Refusal(401, "a valid token is needed: Authorization: Bearer …")
    return asker


async def _admin(request: Request) -> Asker:
    asker = _known(request)
    if asker.role != "admin":
        raise Refusal(403, "an admin's token is needed")
    return asker


async def studied(request: Request) -> None:
    """A dependency of every route: where its address names a study, that one is there for who asks; and of the API's
    routes, that no parameter is there which they do not know."""
    if "study" in request.path_params:
        await _visible(request, str(request.path_params["study"]))
    route = request.scope.get("route")
    if isinstance(route, APIRoute) and route.include_in_schema and FREE not in route.tags:
        known = _parameters(route)
        for name in request.query_params:
            if name not in known:
                choices = ", ".join(sorted(known)) or "(there are none)"
                raise BadInput(f"{name[:80]}: no such parameter; choose from {choices}")
            if not known[name] and len(request.query_params.getlist(name)) > 1:
                raise BadInput(f"{name}: is given more than once")


def _parameters(route: APIRoute) -> dict[str, bool]:
    """The names of the parameters that a route takes in its query, and whether it takes several of each."""
    found: dict[str, bool] = {}
    waiting = [route.dependant]
    while waiting:
        one = waiting.pop()
        found |= {str(p.alias): "list[" in str(p.field_info.annotation) for p in one.query_params}
        waiting += one.dependencies
    return found


async def _visible(
    request: Request, study: Annotated[str, Path(description="A study's name or id.", min_length=1, max_length=128)]
) -> Stamp:
    found: Stamp | None = getattr(request.state, "study", None)
    if found is None:
        store: Store = request.app.state.store
        found = await run_in_threadpool(store.feed.stamp, study) if _NAME.fullmatch(study) else None
        if found is None or not _known(request).sees(found.owner):
            raise NotFound(f"no study {study[:128]!r}")
        request.state.study = found
    return found


async def _queue(request: Request) -> AsyncIterator[None]:
    """After the route: let the scheduler look at what was queued or cancelled."""
    yield
    if (scheduler := request.app.state.scheduler) is not None:
        scheduler.wake()


WAKES = Depends(_queue)  # a dependency of routes that queue something
Stored = Annotated[Store, Depends(_store)]
Configured = Annotated[Settings, Depends(_settings)]
Asks = Annotated[Asker, Depends(_asker)]
Admin = Annotated[Asker, Depends(_admin)]
Visible = Annotated[Stamp, Depends(_visible)]
