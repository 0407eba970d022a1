"""The multiple-choice knapsack, solved exactly: one choice per variable, least cost within a budget.

    minimize    Σᵢ cost[i][x_i]
    subject to  Σᵢ weight[i][x_i] ≤ budget

The classical way (Dyer, Kayal & Walker 1984; Pisinger 1995, "A minimal algorithm for the
multiple-choice knapsack problem"), arranged for numpy:

1. A choice that is no cheaper than a lighter one of its variable is dropped.
2. The linear relaxation is solved by sorting the edges of all lower convex hulls by slope and taking
   them until the budget is full. The slope λ of the edge that no longer fits is the price of weight;
   the vertices reached before it are the *base*, a feasible solution. The relaxation is a lower
   bound, the base improved greedily an upper bound.
3. A choice whose reduced cost (Δcost + λ Δweight against the base, never negative) exceeds the gap
   between the bounds is in no better solution and is dropped. Few variables keep an alternative: the
   core.
4. Dynamic programming over (Δweight, Δcost) states runs through the core in order of least reduced
   cost. All variables not yet reached stand at the base, so every state that fits is a solution and
   may lower the upper bound. A state survives if no lighter one is cheaper and if its cost plus the
   relaxation of the variables still to come, a piecewise-linear function of the weight left, is below
   the upper bound. It ends when the next least reduced cost exceeds the gap: that proves optimality.

Costs are compared with a tolerance of 1e-12 of the base's absolute cost, the rounding of the sums.
Memory is bounded: of more than `state_limit` states those with the best bounds are kept, and the
solution then says `exact=False` with a valid `lower_bound`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from autoq.errors import BadInput

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

STATE_LIMIT = 20_000
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Solution:
    """One choice per variable, its total cost and weight, and what is proved about it.

    No solution costs less than `lower_bound`; where `exact` is true, that is `cost` itself (up to
    the rounding of sums).
    """

    choices: list[int]
    cost: float
    weight: float
    lower_bound: float
    exact: bool

    @property
    def gap(self) -> float:
        """By how much `cost` may exceed the optimum."""
        return self.cost - self.lower_bound


@dataclass(frozen=True)
class _Variable:
    """A variable's undominated choices, by rising weight and falling cost; `hull` are its vertices."""

    choices: Indices
    weight: Floats
    cost: Floats
    hull: Indices


@dataclass(frozen=True)
class _Problem:
    """All variables and the edges of their hulls, steepest first.

    `lightest` is the least total weight. All totals differ from it by multiples of `unit`, which is 0
    where weights are not whole numbers.
    """

    variables: list[_Variable]
    edge_variable: Indices
    edge_weight: Floats
    edge_cost: Floats
    lightest: float
    unit: int


def solve(
    cost: Sequence[ArrayLike], weight: Sequence[ArrayLike], budget: float, *, state_limit: int = STATE_LIMIT
) -> Solution | None:
    """The cheapest choices whose weights sum to at most `budget`, or None if there are none.

    `cost[i]` and `weight[i]` have one entry per choice of variable i, in any units and of any sign;
    an infinite cost forbids a choice. A difference of weights that the rounding of a total swallows may
    be taken for none. Raises `BadInput` for NaN, an infinite weight, a variable
    without choices or arrays whose shapes differ.
    """
    return frontier(cost, weight, [budget], state_limit=state_limit)[0]


def frontier(
    cost: Sequence[ArrayLike], weight: Sequence[ArrayLike], budgets: Sequence[float], *, state_limit: int = STATE_LIMIT
) -> list[Solution | None]:
    """`solve` for several budgets; dominance, hulls and the sorted edges are computed once."""
    costs, weights = _arrays(cost, weight)
    problem = _prepare(costs, weights)
    if problem is None:
        return [None] * len(budgets)
    return [_solve_within(problem, costs, weights, float(budget), state_limit) for budget in budgets]


def _arrays(cost: Sequence[ArrayLike], weight: Sequence[ArrayLike]) -> tuple[list[Floats], list[Floats]]:
    if len(cost) != len(weight):
        raise BadInput(f"cost has {len(cost)} variables and weight has {len(weight)}; they must be equal")
    costs = [np.asarray(c, dtype=np.float64) for c in cost]
    weights = [np.asarray(w, dtype=np.float64) for w in weight]
    for i, (c, w) in enumerate(zip(costs, weights, strict=True)):
        if c.ndim != 1 or c.shape != w.shape or not c.size:
            raise BadInput(f"variable {i}: cost {c.shape} and weight {w.shape} must be lists of equal, positive length")
        if np.isnan(c).any() or np.isneginf(c).any():
            raise BadInput(f"variable {i}: a cost is {c[np.isnan(c) | np.isneginf(c)][0]}; it must be a number or +inf")
        if not np.isfinite(w).all():
            raise BadInput(f"variable {i}: a weight is {w[~np.isfinite(w)][0]}; it must be finite")
    return costs, weights


def _undominated(cost: Floats, weight: Floats) -> Indices:
    """Indices of the choices that no other beats in both, by rising weight. Of equals, the first."""
    order = np.lexsort((cost, weight))
    falling = cost[order]
    best_before = np.minimum.accumulate(np.concatenate(([np.inf], falling[:-1])))
    return order[falling < best_before]


def _hull(weight: Floats, cost: Floats) -> Indices:
    """Vertices of the lower convex hull of undominated points (rising weight, falling cost)."""
    kept: list[int] = []
    for i in range(len(weight)):
        while len(kept) > 1:
            a, b = kept[-2], kept[-1]
            if (cost[a] - cost[b]) * (weight[i] - weight[b]) > (cost[b] - cost[i]) * (weight[b] - weight[a]):
                break
            kept.pop()
        kept.append(i)
    return np.array(kept, dtype=np.int64)


def _prepare(costs: list[Floats], weights: list[Floats]) -> _Problem | None:
    """Dominance, hulls and sorted edges; None if a variable has only forbidden choices."""
    variables, owners, widths, drops = [], [], [], []
    for i, (c, w) in enumerate(zip(costs, weights, strict=True)):
        keep = _undominated(c, w)
        if not keep.size:
            return None
        hull = _hull(w[keep], c[keep])
        variables.append(_Variable(keep, w[keep], c[keep], hull))
        owners.append(np.full(len(hull) - 1, i, dtype=np.int64))
        widths.append(np.diff(w[keep][hull]))
        drops.append(np.diff(c[keep][hull]))
    owner, width, drop = (np.concatenate([np.zeros(0), *parts]) for parts in (owners, widths, drops))
    # Stable, so that edges of one variable stay in their order where slopes are equal.
    order = np.argsort(_slopes(drop, width), kind="stable")
    lightest = math.fsum(float(variable.weight[0]) for variable in variables)
    unit = 0
    if all((w == np.floor(w)).all() for w in weights) and sum(np.abs(w).max() for w in weights) < 2**53:
        unit = math.gcd(*map(_step, variables)) or 1
    return _Problem(variables, owner[order].astype(np.int64), width[order], drop[order], lightest, unit)


def _slopes(drop: Floats, width: Floats) -> Floats:
    """Cost per weight of edges. A subnormal width may overflow it; the steepest number there is will do."""
    steepest = np.finfo(np.float64).max
    with np.errstate(over="ignore"):
        slopes: Floats = np.clip(drop / width, -steepest, steepest)
    return slopes


def _step(variable: _Variable) -> int:
    """The greatest common divisor of a variable's weight differences."""
    return int(np.gcd.reduce((variable.weight - variable.weight[0]).astype(np.int64)))


def _solve_within(
    problem: _Problem, costs: list[Floats], weights: list[Floats], budget: float, state_limit: int
) -> Solution | None:
    if math.isnan(budget):
        raise BadInput("the budget is nan; it must be a number")
    if problem.unit and math.isfinite(budget):
        # The part of a budget that no total can reach would only loosen the bound.
        budget = problem.lightest + (budget - problem.lightest) // problem.unit * problem.unit
        slack = 0.0
    else:
        slack = _ROUNDING * math.fsum(float(np.abs(variable.weight).max()) for variable in problem.variables)
    proved: float | None = None
    # Sums of real numbers depend on their order in the last digits. So try a hair above the budget,
    # where nothing that fits can be missed, and accept only what fits when summed exactly.
    for within in dict.fromkeys((budget + slack, budget, budget - slack)):
        found = _search(problem, within, state_limit)
        if found is None:
            return None
        picked, bound, exact = found
        proved = bound if proved is None else proved
        choices = [int(v.choices[j]) for v, j in zip(problem.variables, picked, strict=True)]
        total = math.fsum(float(w[j]) for w, j in zip(weights, choices, strict=True))
        if total <= budget:
            value = math.fsum(float(c[j]) for c, j in zip(costs, choices, strict=True))
            return Solution(choices, value, total, value if exact else min(proved, value), exact)
    return None


def _relax(problem: _Problem, budget: float) -> tuple[Indices, float] | None:
    """The base (a position in each variable's choices) and λ; None if nothing fits.

    λ is 0 where the cheapest choices all fit.
    """
    if problem.lightest > budget:
        return None
    taken = int(np.searchsorted(problem.lightest + np.cumsum(problem.edge_weight), budget, side="right"))
    steps = np.bincount(problem.edge_variable[:taken], minlength=len(problem.variables))
    base = np.array([v.hull[s] for v, s in zip(problem.variables, steps, strict=True)], dtype=np.int64)
    if taken == len(problem.edge_weight):
        return base, 0.0
    return base, float(-_slopes(problem.edge_cost[taken], problem.edge_weight[taken]))


@dataclass(frozen=True)
class _Moves:
    """Every choice of every variable as a move away from the base; one entry per choice."""

    variable: Indices
    position: Indices
    weight: Floats
    cost: Floats


def _moves(problem: _Problem, base: Indices) -> _Moves:
    sizes = [len(v.weight) for v in problem.variables]
    return _Moves(
        np.repeat(np.arange(len(sizes)), sizes),
        np.concatenate([np.arange(size) for size in sizes]),
        np.concatenate([v.weight - v.weight[b] for v, b in zip(problem.variables, base, strict=True)]),
        np.concatenate([v.cost - v.cost[b] for v, b in zip(problem.variables, base, strict=True)]),
    )


def _improve(moves: _Moves, base: Indices, room: float) -> tuple[Indices, float]:
    """Take the move that saves most among those that fit, until none does: positions and Δcost."""
    picked = base.copy()
    offset = np.concatenate(([0], np.cumsum(np.bincount(moves.variable))))[:-1]
    total = 0.0
    while True:
        current = offset[moves.variable] + picked[moves.variable]
        saving = moves.cost - moves.cost[current]
        best = int(np.argmin(np.where(moves.weight - moves.weight[current] <= room, saving, 0.0)))
        if saving[best] >= 0.0:
            return picked, total
        room -= float(moves.weight[best] - moves.weight[current[best]])
        total += float(saving[best])
        picked[moves.variable[best]] = moves.position[best]


def _search(problem: _Problem, budget: float, state_limit: int) -> tuple[Indices, float, bool] | None:
    """The best positions, a lower bound and whether they are proved optimal; None if nothing fits.

    All costs inside are relative to the base, which keeps their rounding small.
    """
    if not problem.variables:
        return (np.zeros(0, dtype=np.int64), 0.0, True) if budget >= 0 else None
    relaxed = _relax(problem, budget)
    if relaxed is None:
        return None
    base, price = relaxed
    at_base = [(float(v.weight[b]), float(v.cost[b])) for v, b in zip(problem.variables, base, strict=True)]
    base_cost = math.fsum(c for _, c in at_base)
    room = budget - math.fsum(w for w, _ in at_base)
    if price == 0.0:
        return base, base_cost, True

    moves = _moves(problem, base)
    tolerance = _ROUNDING * math.fsum(abs(c) for _, c in at_base)
    lower = -price * room
    picked, upper = _improve(moves, base, room)

    reduced = np.maximum(moves.cost + price * moves.weight, 0.0)
    away = moves.position != base[moves.variable]
    useful = away & (lower + reduced < upper - tolerance)
    nearest = np.full(len(base), np.inf)
    np.minimum.at(nearest, moves.variable[useful], reduced[useful])
    core = np.argsort(nearest, kind="stable")
    core = core[np.isfinite(nearest[core])]
    options = [np.flatnonzero(useful & (moves.variable == variable)) for variable in core]
    tails = _Tails(moves, options)

    weight, cost = np.zeros(1), np.zeros(1)
    history: list[tuple[Indices, Indices]] = []
    best: tuple[int, int] | None = None
    dropped = np.inf
    for stage, variable in enumerate(core):
        if lower + nearest[variable] >= upper - tolerance:
            break
        step = options[stage][lower + reduced[options[stage]] < upper - tolerance]
        new_weight = np.concatenate((weight, (weight[:, None] + moves.weight[step]).T.ravel()))
        new_cost = np.concatenate((cost, (cost[:, None] + moves.cost[step]).T.ravel()))
        bound = new_cost + tails.relaxation(stage, room - new_weight)
        alive = np.flatnonzero(bound < upper - tolerance)
        alive = alive[_undominated(new_cost[alive], new_weight[alive])]
        if len(alive) > state_limit:
            # Of equal bounds, those that are nearest to filling the budget are most of use.
            ranked = np.lexsort((np.abs(room - new_weight[alive]), bound[alive]))
            dropped = min(dropped, float(bound[alive[ranked[state_limit]]]))
            alive = alive[np.sort(ranked[:state_limit])]
        source = np.concatenate(([-1], step))[alive // len(weight)]
        history.append(((alive % len(weight)).astype(np.int32), source.astype(np.int32)))
        weight, cost = new_weight[alive], new_cost[alive]
        fits = int(np.searchsorted(weight, room, side="right")) - 1
        # States rise in weight and fall in cost, so the last that fits is the cheapest that fits.
        if fits >= 0 and cost[fits] < upper:
            upper, best = float(cost[fits]), (stage, fits)
        if not len(weight):
            break
    if best is not None:
        picked = _trace(history, best, moves, base)
    exact = dropped >= upper - tolerance
    return picked, base_cost + (upper if exact else max(lower, dropped)), exact


class _Tails:
    """For each stage, the relaxation of the core variables after it: least Δcost for a given Δweight."""

    def __init__(self, moves: _Moves, options: list[Indices]) -> None:
        self._start_weight, self._start_cost = np.zeros(len(options)), np.zeros(len(options))
        stages, widths, drops = [], [], []
        for stage, moved in enumerate(options):
            w, c = np.append(moves.weight[moved], 0.0), np.append(moves.cost[moved], 0.0)
            keep = _undominated(c, w)
            hull = keep[_hull(w[keep], c[keep])]
            self._start_weight[stage], self._start_cost[stage] = w[hull[0]], c[hull[0]]
            stages.append(np.full(len(hull) - 1, stage))
            widths.append(np.diff(w[hull]))
            drops.append(np.diff(c[hull]))
        stage_of, width, drop = (np.concatenate([np.zeros(0), *parts]) for parts in (stages, widths, drops))
        order = np.argsort(_slopes(drop, width), kind="stable")
        self._stage, self._width, self._drop = stage_of[order], width[order], drop[order]

    def relaxation(self, stage: int, room: Floats) -> Floats:
        """Least Δcost of the variables after `stage` if they may add `room`; inf if they cannot."""
        later = self._stage > stage
        start = float(self._start_weight[stage + 1 :].sum())
        x = start + np.concatenate(([0.0], np.cumsum(self._width[later])))
        y = float(self._start_cost[stage + 1 :].sum()) + np.concatenate(([0.0], np.cumsum(self._drop[later])))
        return np.interp(room, x, y, left=np.inf)


def _trace(history: list[tuple[Indices, Indices]], end: tuple[int, int], moves: _Moves, base: Indices) -> Indices:
    """The positions of the state `end` (stage, index), walking its parents back to the base."""
    picked = base.copy()
    stage, state = end
    for parents, sources in reversed(history[: stage + 1]):
        move = sources[state]
        if move >= 0:
            picked[moves.variable[move]] = moves.position[move]
        state = int(parents[state])
    return picked
