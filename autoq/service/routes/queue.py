"""The queue: what waits, for what, and who has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from fastapi import APIRouter, Request, Response

from autoq.service.answers import answer
from autoq.service.context import Asks, Stored
from autoq.service.scheduler import HERE
from autoq.service.schemas import Shape
from autoq.service.shares import Standing

router = APIRouter(prefix="/api/v1", tags=["server"])


class HolderShape(Shape):
    """A study that holds places; of another user's, not which one."""

    study: str | None
    study_id: int | None
    places: int
    leaving: bool


class WaitingShape(Shape):
    """A study that waits. `why`: `next` (it starts now), `room` (it is the next one, and too few places are free),
    `line` (others are before it), `limit` (its owner has as many places as one may have). `text` says it in a line."""

    study: str
    study_id: int
    why: Literal["next", "room", "line", "limit"]
    position: int | None
    places: int
    free: int
    total: int
    pool: Literal["machine", "cluster"]
    holders: list[HolderShape]
    text: str


class QueueAnswer(Shape):
    """What the asker may see of what waits, in the order of their turns."""

    waiting: list[WaitingShape]


@router.get("/queue", response_model=QueueAnswer)
def get_queue(request: Request, store: Stored, asker: Asks) -> Response:
    """Where the asker's queued studies stand: for how many places they wait, at which position, and who has them."""
    scheduler = request.app.state.scheduler
    found: Mapping[int, tuple[str, Standing]] = {} if scheduler is None else scheduler.standings()
    widths = {} if scheduler is None else scheduler.widths()
    named = store.feed.named(list({*found, *widths}))
    seen = {study_id: name for study_id, (name, owner) in named.items() if asker.sees(owner)}
    told = []
    for study_id, (pool, standing) in found.items():
        if study_id not in seen:
            continue
        holders = [
            {
                "study": seen.get(holder),
                "study_id": holder if holder in seen else None,
                "places": widths.get(holder, (pool, 1))[1],
                "leaving": holder in standing.leaving,
            }
            for holder in standing.running
        ]
        told.append(
            {
                "study": seen[study_id],
                "study_id": study_id,
                "why": standing.why,
                "position": standing.position,
                "places": standing.width,
                "free": standing.free,
                "total": standing.slots,
                "pool": "machine" if pool == HERE else "cluster",
                "holders": holders,
                "text": text(standing, pool, [(each["study"], int(each["places"])) for each in holders]),
            }
        )
    return answer({"waiting": told})


def text(standing: Standing, pool: str, holders: list[tuple[str | None, int]]) -> str:
    """Why a study waits, in a line. `holders` are (name, None for another user's; places)."""
    where = "of this server" if pool == HERE else "of the cluster"
    one = standing.slots == 1
    wanted = f"the one place {where}" if one else f"{standing.width} of {standing.slots} places {where}"
    if standing.why == "next":
        return f"Starts now on {wanted}."
    if standing.why == "limit":
        return f"Waits for {wanted}: its owner has as many as one user may have at a time."
    if standing.why == "line":
        before = (standing.position or 1) - 1
        return f"Waits for {wanted}: {before} {'study comes' if before == 1 else 'studies come'} before it."
    own = [f"{name} has {places}" if not one else f"{name} has it" for name, places in holders if name is not None]
    others = sum(places for name, places in holders if name is None)
    if others:
        own.append("another user has it" if one else f"other users have {others}")
    free = [] if one or not standing.free else [f"{standing.free} {'is' if standing.free == 1 else 'are'} free"]
    parts = "; ".join([*free, ", ".join(own[:4]) + (" …" if len(own) > 4 else "")] if own else free)
    leaves = " A turn ends, and it starts after the trials that are out." if standing.leaving else ""
    return f"Next in line, waits for {wanted}" + (f": {parts}." if parts else ".") + leaves
