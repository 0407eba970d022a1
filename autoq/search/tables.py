"""Quantities of an assignment that are sums over variables: a constant, and the cost of each choice of each.

Bytes, predicted latencies and estimated energies are of this kind. The cost of a choice is asked of the quantity
itself, one assignment at a time, so what a variable costs is said in one place: by the objective.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from autoq.assignment import Assignment
from autoq.kv_cache import Cache
from autoq.layer import Layer
from autoq.search.prior import Additive
from autoq.search.space import SearchSpace

_TOLERANCE = 1e-6
_TRIED = 3  # random assignments that a table must be right about


def tabulate(space: SearchSpace, function: Callable[[Assignment], float]) -> Additive | None:
    """A function of assignments as a sum over parameters, or None if it is not one, as far as a few tell.

    Layers and caches of one shape and kind count alike, unless that turns out wrong, and are asked for once.
    """
    for alike in (True, False):
        table = _differences(space, function, alike)
        rng = np.random.default_rng(0)
        last = {v.name: len(v.choices) - 1 for v in space.variables}
        drawn = ({v.name: int(rng.integers(len(v.choices))) for v in space.variables} for _ in range(_TRIED))
        for picked in (last, *drawn):
            value = function(space.assignment(list(picked.values())))
            if not abs(table.of(picked) - value) <= _TOLERANCE * max(abs(value), 1e-300):
                break
        else:
            return table
    return None


def _differences(space: SearchSpace, function: Callable[[Assignment], float], alike: bool) -> Additive:
    start = [0] * len(space.variables)
    base = function(space.assignment(start))
    known: dict[object, float] = {}
    parts = {}
    for place, variable in enumerate(space.variables):
        shapes = tuple(map(_shape, variable.members))
        part = np.zeros(len(variable.choices))
        for index, scheme in enumerate(variable.choices):
            key = (shapes if alike else place, variable.choices[0], scheme)
            if index and key not in known:
                changed = [*start[:place], index, *start[place + 1 :]]
                known[key] = function(space.assignment(changed)) - base
            part[index] = known[key] if index else 0.0
        parts[variable.name] = part
    return Additive(base, parts)


def _shape(part: Layer | Cache) -> object:
    if isinstance(part, Cache):
        return replace(part, name="", block=None)
    return replace(part, name="", fusion_group=None, tied=("",) * len(part.tied))
