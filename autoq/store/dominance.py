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


def update(frontier: Mapping[K, Point], new: Point, directions: Sequence[str]) -> tuple[bool, list[K]]:
    """What one more point does to a frontier: whether it joins, and the keys of the points that leave.

    `frontier` must hold no point that dominates another one; the result keeps that. Costs one
    comparison per point of the frontier, however many points were dominated before.
    """
    cost = _costs(new, directions)
    leaving = []
    for key, point in frontier.items():
        other = _costs(point, directions)
        if _beats(other, cost):
            # A member that beats the new point cannot stand beside one that the new point beats.
            return False, []
        if _beats(cost, other):
            leaving.append(key)
    return True, leaving


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
