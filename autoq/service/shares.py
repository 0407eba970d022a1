"""Fair shares: which study starts and which one gives way. Pure functions of what waits and what runs.

Stride scheduling (Waldspurger and Weihl, "Stride Scheduling: Deterministic Proportional-Share Resource Management",
MIT/LCS/TM-528, 1995) over owners. With w = 2^priority of a study, clipped to 1/8 … 8, its owner's *pass* grows by

    Δpass = width · Δt / w

while it runs on `width` slots (the paper's stride is 1/w, its quantum Δt). Whoever has the least pass is served next,
so over time owners that always have something to do get slots in proportion to their weights. Within an owner studies
start by priority, then in the order of submission.

Where we differ: a study is no task that ends after a quantum, so it is asked to give way, and only when another owner
with a smaller pass waits and it has run for a quantum; it then ends its trials first. And owners come and go: one that
comes, or comes back, starts at the least pass of those that are there (the paper's global pass), for what nobody else
wanted is nobody's loss; what it had above that stays its own, so that going away forgives no debt.

A study that needs more slots than are free keeps them free until it has them: narrower ones do not slip by for ever.

Each pool of slots (this machine, each Ray cluster) is shared by itself: what one has of a pool counts in no other.
A study that begins anew has to load its model first. Its quantum is therefore at least `LOADS` times what that took
last: of the time of any slot at most 1/(1 + LOADS) goes into loading, however long a model takes to load.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

QUANTUM_SECONDS = 60.0
Why = Literal["next", "room", "line", "limit"]
MOST = 3  # doublings of a weight, either way
LOADS = 19  # a turn is at least so many times as long as loading


@dataclass(frozen=True)
class Waiting:
    """A study that is queued, since a moment on the caller's clock, for `width` slots."""

    study_id: int
    owner: str
    priority: int
    since: float
    width: int = 1


@dataclass(frozen=True)
class Running:
    """A study that runs since a moment on the caller's clock; `leaving` once it was asked to stop. `loading` seconds
    went into loading its model."""

    study_id: int
    owner: str
    priority: int
    since: float
    width: int = 1
    leaving: bool = False
    loading: float = 0.0

    def had_turn(self, now: float, quantum: float) -> bool:
        """Whether it has run for a quantum, its own where loading makes that longer."""
        return now - self.since >= max(quantum, (1 + LOADS) * self.loading)


@dataclass(frozen=True)
class Start:
    """Start this study now."""

    study_id: int


@dataclass(frozen=True)
class Yield:
    """Ask this study to give way."""

    study_id: int


@dataclass(frozen=True)
class Standing:
    """Why a study waits for `width` of a pool's `slots`, of which `free` are free.

    `next`: it starts now. `room`: it is the next one, and too few are free; `running` hold them, `leaving` of those end
    their trials for it. `line`: others are before it, it is at `position` (from 1). `limit`: its owner has as many as
    one may have, and it has no position.
    """

    study_id: int
    why: Why
    position: int | None
    width: int
    free: int
    slots: int
    running: tuple[int, ...] = ()
    leaving: tuple[int, ...] = ()


def weight(priority: int) -> float:
    """What a priority is worth: twice the share for each step."""
    return float(2.0 ** max(-MOST, min(MOST, priority)))


def account(
    usage: Mapping[str, float], waiting: Sequence[Waiting], running: Sequence[Running], seconds: float
) -> dict[str, float]:
    """Owner -> pass after another `seconds` of what runs."""
    active = {one.owner for one in waiting} | {each.owner for each in running}
    if not active:
        return {}
    known = [usage[owner] for owner in active if owner in usage]
    floor = min(known or usage.values(), default=0.0)
    passes = {owner: value for owner, value in usage.items() if value > floor}
    passes |= {owner: max(usage.get(owner, floor), floor) for owner in active}
    for each in running:
        passes[each.owner] += seconds * each.width / weight(each.priority)
    return passes


def decide(
    waiting: Sequence[Waiting],
    running: Sequence[Running],
    usage: Mapping[str, float],
    slots: int,
    now: float,
    quantum: float = QUANTUM_SECONDS,
    limit: int | None = None,
) -> list[Start | Yield]:
    """What to do now on `slots` slots, with passes as `account` gives them.

    `limit` is how many slots one owner may have at a time; a study that is wider runs alone of its owner's.
    """
    passes, floor = dict(usage), min(usage.values(), default=0.0)
    actions: list[Start | Yield] = []
    for turn in _turns(waiting, running, passes, floor, slots, quantum, limit):
        if turn.why == "next":
            actions.append(Start(turn.head.study_id))
        elif turn.why == "room":
            missing = turn.width - turn.free - sum(each.width for each in running if each.leaving)
            rested = [each for each in running if each.had_turn(now, quantum)]
            return [*actions, *_giving_way(turn.head, missing, rested, passes, floor)]
    return actions


def standings(
    waiting: Sequence[Waiting],
    running: Sequence[Running],
    usage: Mapping[str, float],
    slots: int,
    quantum: float = QUANTUM_SECONDS,
    limit: int | None = None,
) -> list[Standing]:
    """Where everything that waits stands, in the order in which `decide` would start it if nobody else came.

    Nobody knows when what runs will end, so a position is no time.
    """
    passes, floor = dict(usage), min(usage.values(), default=0.0)
    found: list[Standing] = []
    held: list[Standing] = []
    for why, head, width, free in _turns(waiting, running, passes, floor, slots, quantum, limit):
        free = max(0, free)  # slots may have become fewer
        if why == "limit":
            held.append(Standing(head.study_id, why, None, width, free, slots))
            continue
        one = Standing(head.study_id, why, len(found) + 1, width, free, slots)
        if why == "room":
            leaving = tuple(each.study_id for each in running if each.leaving)
            one = replace(one, running=tuple(each.study_id for each in running), leaving=leaving)
        found.append(one)
    return found + held


class _Turn(NamedTuple):
    """What waits when its turn comes, as in a `Standing`; `free` may be less than none."""

    why: Why
    head: Waiting
    width: int
    free: int


def _turns(
    waiting: Sequence[Waiting],
    running: Sequence[Running],
    passes: dict[str, float],
    floor: float,
    slots: int,
    quantum: float,
    limit: int | None,
) -> Iterator[_Turn]:
    """All that waits in the order of turns; what is over its owner's limit comes when that shows. Moves `passes` on."""
    free = slots - sum(each.width for each in running)
    used = Counter[str]()
    for each in running:
        used[each.owner] += each.width
    lines = _lines(waiting)
    full = False  # somebody waits for room, and nobody slips by
    while lines:
        owner = _first(lines, passes, floor)
        head = lines[owner][0]
        width = min(head.width, slots)
        if limit is not None and used[owner] and used[owner] + width > limit:
            yield from (_Turn("limit", one, min(one.width, slots), free) for one in lines.pop(owner))
            continue
        fits = not full and width <= free
        yield _Turn("next" if fits else "line" if full else "room", head, width, free)
        full = not fits
        if fits:
            free -= width
            used[owner] += width
        # As if it had run for a quantum already, so that one call deals many slots out as many calls would.
        passes[owner] = passes.get(owner, floor) + quantum * width / weight(head.priority)
        lines[owner].pop(0)
        if not lines[owner]:
            del lines[owner]


def _lines(waiting: Sequence[Waiting]) -> dict[str, list[Waiting]]:
    """Owner -> what waits of its studies, the first one first."""
    lines: dict[str, list[Waiting]] = {}
    for one in sorted(waiting, key=lambda one: (-one.priority, one.since, one.study_id)):
        lines.setdefault(one.owner, []).append(one)
    return lines


def _first(lines: Mapping[str, Sequence[Waiting]], passes: Mapping[str, float], floor: float) -> str:
    """Whose turn it is."""
    return min(lines, key=lambda owner: (passes.get(owner, floor), lines[owner][0].since, owner))


def _giving_way(
    head: Waiting, missing: int, running: Sequence[Running], passes: Mapping[str, float], floor: float
) -> list[Yield]:
    """Whom `head` is to have `missing` slots from: of those that had a turn, the ones that are most ahead."""
    if missing <= 0:
        return []
    own = passes.get(head.owner, floor)
    ahead = [
        each
        for each in running
        if not each.leaving
        and (each.priority < head.priority if each.owner == head.owner else passes.get(each.owner, floor) > own)
    ]
    if sum(each.width for each in ahead) < missing:
        return []
    asked: list[Yield] = []
    for each in sorted(ahead, key=lambda each: (-passes.get(each.owner, floor), each.since, each.study_id)):
        if missing <= 0:
            break
        asked.append(Yield(each.study_id))
        missing -= each.width
    return asked
