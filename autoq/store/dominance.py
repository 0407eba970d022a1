"""Pareto dominance: which points no other point beats. Plain Python on tuples of floats.

A point is one finite value per objective, `directions` says for each whether less or more is better.
a dominates b when a is nowhere worse and somewhere better; so equal points do not dominate each
other and both stay. Definition 2.1 in Deb, "Multi-Objective Optimization using Evolutionary
Algorithms" (2001), section 2.4.2.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

Point = Sequence[float]
K = TypeVar("K", bound=Hashable)

_SIGNS = {"minimize": 1.0, "maximize": -1.0}


def _costs(point: Point, directions: Sequence[str]) -> tuple[float, ...]:
    """The point with every objective turned so that less is better."""
    assert len(point) == len(directions), (point, directions)
    return tuple([_SIGNS[direction] * value for value, direction in zip(point, directions, strict=True)])


def _beats(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    """Dominance of two points whose objectives are all to be minimized."""
    for x, y in zip(a, b, strict=True):
        if x > y:
            return False
    return a != b


def dominates(a: Point, b: Point, directions: Sequence[str]) -> bool:
    """Whether `a` is nowhere worse than `b` and somewhere better."""
    return _beats(_costs(a, directions), _costs(b, directions))


def update(frontier: Mapping[K, Point], new: Mapping[K, Point], directions: Sequence[str]) -> tuple[list[K], list[K]]:
    """What more points, one after the other, do to a frontier: the keys that join it, and those that leave it.

    `frontier` must hold no point that dominates another one; the result keeps that. Costs one
    comparison per new point and point of the frontier, however many points were dominated before.
    """
    members = {key: _costs(point, directions) for key, point in frontier.items()}
    for key, point in new.items():
        assert key not in members, key
        cost = _costs(point, directions)
        # A member that beats the new point cannot stand beside one that the new point beats.
        if any(_beats(other, cost) for other in members.values()):
            continue
        members = {other: known for other, known in members.items() if not _beats(cost, known)}
        members[key] = cost
    return [key for key in members if key not in frontier], [key for key in frontier if key not in members]


def non_dominated(points: Sequence[Point], directions: Sequence[str]) -> list[int]:
    """The indices, ascending, of the points that no other point dominates. O(n·f) for a frontier of f."""
    costs = [_costs(point, directions) for point in points]
    kept: list[int] = []
    # In lexicographic order nothing is dominated by what comes later, and whatever dominates a point
    # is itself kept or dominated by a kept one: comparing with the kept ones is enough.
    for index in sorted(range(len(costs)), key=costs.__getitem__):
        if not any(_beats(costs[other], costs[index]) for other in kept):
            kept.append(index)
    return sorted(kept)
