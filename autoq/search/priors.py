"""The prior of a study: what its tables say, in the terms of its sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from autoq.assignment import Assignment
from autoq.layer import Layer
from autoq.objectives import EnergyObjective, LatencyObjective, TableObjective
from autoq.search.prior import Additive, Prior
from autoq.search.setup import Problem
from autoq.search.space import SearchSpace
from autoq.targets import CostTable

Losses = Mapping[str, Mapping[str, float]]

_TOLERANCE = 1e-6
_TRIED = 3  # random assignments that a table must be right about


def make_prior(problem: Problem, losses: Losses | None, costs: CostTable | None) -> Prior:
    """`losses` is layer -> scheme text -> predicted loss, `costs` the latency table; either may be missing."""
    space, spec, steering = problem.space, problem.spec, problem.steering
    additive, limits, learned = {}, [], {}
    for name in spec.measured:
        function = _function(problem, name, costs)
        table = None if function is None else tabulate(space, function)
        bound = spec.constraints.get(name)
        low = -np.inf if bound is None or bound.min is None else bound.min
        high = np.inf if bound is None or bound.max is None else bound.max
        if table is None:
            if bound is not None and name in steering:
                learned[steering.index(name)] = (low, high)
            continue
        table = replace(table, low=low, high=high)
        if name in steering:
            additive[steering.index(name)] = table
        else:
            limits.append(table)
    predicted = {}
    if losses is not None:
        for variable in space.variables:
            sums = [sum(losses[layer.name][str(scheme)] for layer in variable.layers) for scheme in variable.choices]
            predicted[variable.name] = np.array(sums, dtype=np.float64)
    return Prior(predicted, additive, limits, learned)


def _function(problem: Problem, name: str, costs: CostTable | None) -> Callable[[Assignment], float] | None:
    """What computes the objective `name` of an assignment, or None where it must be measured."""
    objective = problem.objectives[name]
    if isinstance(objective, TableObjective):
        return lambda assignment: objective.compute(problem.info, assignment)
    if isinstance(objective, LatencyObjective):
        return None if costs is None else lambda assignment: costs.predict(name, assignment)
    if isinstance(objective, EnergyObjective):
        workload, target = problem.spec.target, problem.target
        return lambda assignment: objective.estimate(problem.info, assignment, workload, target).joules
    return None


def tabulate(space: SearchSpace, function: Callable[[Assignment], float]) -> Additive | None:
    """A function of assignments as a sum over parameters, or None if it is not one, as far as a few tell.

    Layers of one shape and kind count alike, unless that turns out wrong, and are asked for once.
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
        shapes = tuple(map(_shape, variable.layers))
        part = np.zeros(len(variable.choices))
        for index, scheme in enumerate(variable.choices):
            key = (shapes if alike else place, variable.choices[0], scheme)
            if index and key not in known:
                changed = [*start[:place], index, *start[place + 1 :]]
                known[key] = function(space.assignment(changed)) - base
            part[index] = known[key] if index else 0.0
        parts[variable.name] = part
    return Additive(base, parts)


def _shape(layer: Layer) -> object:
    return replace(layer, name="", fusion_group=None, tied=("",) * len(layer.tied))
