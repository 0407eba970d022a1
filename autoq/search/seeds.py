"""The first proposals of every study after its baselines: exact solutions of the curvature proxy.

The proxy predicts the quality loss of an assignment as a sum over layers. Under an additive cost, the
best assignment for a budget is a multiple-choice knapsack, which `autoq.search.budget` solves exactly.
Seeds are spread along the predicted frontier of quality against each quantity in bytes and, where the study has
latency objectives, of quality against predicted latency and against an even mix of both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from autoq.kv_cache import CacheScheme
from autoq.scheme import Scheme
from autoq.search.budget import Solution, frontier
from autoq.search.prior import Additive
from autoq.search.space import SearchSpace
from autoq.targets import CostTable

Table = Mapping[str, Mapping[str, float]]
Vector = NDArray[np.float64]

_SCAN = 48  # budgets at which the predicted frontier is sampled before seeds are placed on it


def proposals(
    space: SearchSpace,
    sensitivities: Table,
    tables: Sequence[Additive],
    costs: CostTable | None,
    latencies: Sequence[str],
    count: int,
) -> list[list[int]]:
    """Up to `count` different assignments, as choice indices, best predicted quality at their budgets.

    `sensitivities` is layer -> scheme text -> predicted loss; `tables` are the quantities in bytes, at least one;
    `costs` is the latency table, needed where `latencies` names phases. Budgets of a table are spread between its
    bounds, and what other budgets give beyond them is left out.
    """
    quality = [_per_choice(v.choices, [sensitivities[part.name] for part in v.members]) for v in space.variables]
    sizes = [[table.parts[v.name] for v in space.variables] for table in tables]
    limits = [(table.low - table.constant, table.high - table.constant) for table in tables]
    weights = []
    for phase in latencies:
        assert costs is not None
        table = costs.layer_ms[phase]
        latency = [_per_choice(v.choices, [table[part.name] for part in v.members]) for v in space.variables]
        weights += [latency, _mix(sizes[0], latency)]
    # Round robin over the kinds of budget, so that any prefix of the seeds covers all of them. Under a limit
    # the other kinds may give little, so sizes alone could fill the count.
    per_kind = -(-count // (len(sizes) + len(weights))) + 2
    found = [
        _along(quality, size, per_kind if ends == (-np.inf, np.inf) else count + 2, *ends)
        for size, ends in zip(sizes, limits, strict=True)
    ]
    found += [_along(quality, weight, per_kind) for weight in weights]
    seeds: dict[tuple[int, ...], None] = {}
    for rank in range(max(map(len, found), default=0)):
        for kind in found:
            if rank < len(kind) and all(_fits(s, kind[rank], *ends) for s, ends in zip(sizes, limits, strict=True)):
                seeds[tuple(kind[rank])] = None
    return [list(seed) for seed in seeds][:count]


def _per_choice(choices: Sequence[Scheme] | Sequence[CacheScheme], tables: Sequence[Mapping[str, float]]) -> Vector:
    return np.array([sum(table[str(scheme)] for table in tables) for scheme in choices], dtype=np.float64)


def _mix(a: Sequence[Vector], b: Sequence[Vector]) -> list[Vector]:
    """Both weights, each scaled to its range over the whole space."""
    spans = [max(sum(float(v.max() - v.min()) for v in kind), 1e-30) for kind in (a, b)]
    return [x / spans[0] + y / spans[1] for x, y in zip(a, b, strict=True)]


def _fits(size: Sequence[Vector], indices: Sequence[int], least: float, most: float) -> bool:
    return least <= sum(float(v[i]) for v, i in zip(size, indices, strict=True)) <= most


def _along(
    quality: Sequence[Vector],
    weight: Sequence[Vector],
    count: int,
    least: float = -np.inf,
    most: float = np.inf,
) -> list[list[int]]:
    """`count` solutions, evenly spaced along the predicted frontier from `least` to `most`, in an order that
    fills it from coarse to fine.

    Even in what a person sees: the frontier drawn as log loss against weight.
    """
    low = max(sum(float(v.min()) for v in weight), least)
    # Beyond the weight of the best-quality assignment there is nothing to gain.
    best = [int(np.lexsort((w, q))[0]) for q, w in zip(quality, weight, strict=True)]
    high = min(sum(float(w[i]) for w, i in zip(weight, best, strict=True)), most)
    slack = 1e-9 * max(abs(low), abs(high), 1e-30)
    budgets = np.linspace(low, max(high, low), _SCAN) + slack
    scan = _solve(quality, weight, budgets)
    loss = np.array([solution.cost for solution in scan])
    floor = max(loss[loss > 0].min(initial=np.inf) * 0.5, 1e-12) if (loss > 0).any() else 1e-12
    height = np.log(np.maximum(loss, floor))
    x = (budgets - budgets[0]) / max(budgets[-1] - budgets[0], 1e-30)
    y = (height - height.min()) / max(float(np.ptp(height)), 1e-30)
    arc = np.concatenate([[0.0], np.cumsum(np.hypot(np.diff(x), np.diff(y)))])
    wanted = np.interp(np.linspace(0, arc[-1], count), arc, budgets)
    solutions = _solve(quality, weight, wanted)
    return [list(solutions[i].choices) for i in _coarse_to_fine(count)]


def _solve(quality: Sequence[Vector], weight: Sequence[Vector], budgets: Vector) -> list[Solution]:
    found = [solution for solution in frontier(quality, weight, list(budgets)) if solution is not None]
    assert len(found) == len(budgets), "a budget below the lightest assignment"
    return found


def _coarse_to_fine(count: int) -> list[int]:
    """0..count-1, both ends first, then in bit-reversed order: any prefix is spread over the range."""
    width = max(1, (count - 1).bit_length())
    reversed_bits = [int(f"{i:0{width}b}"[::-1], 2) for i in range(2**width)]
    return [i for i in dict.fromkeys([0, count - 1, *reversed_bits]) if i < count]
