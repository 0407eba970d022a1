"""The prior of a study: what its tables say, in the terms of its sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from autoq.assignment import Assignment
from autoq.objectives import EnergyObjective, LatencyObjective, TableObjective
from autoq.search.prior import Prior
from autoq.search.setup import Problem
from autoq.search.tables import tabulate
from autoq.targets import CostTable

Losses = Mapping[str, Mapping[str, float]]


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
            sums = [sum(losses[part.name][str(scheme)] for part in variable.members) for scheme in variable.choices]
            predicted[variable.name] = np.array(sums, dtype=np.float64)
    return Prior(predicted, additive, limits, learned)


def _function(problem: Problem, name: str, costs: CostTable | None) -> Callable[[Assignment], float] | None:
    """What computes the objective `name` of an assignment, or None where it must be measured."""
    objective = problem.objectives[name]
    if isinstance(objective, TableObjective):
        return lambda assignment: objective.compute(problem.info, assignment, problem.spec.target)
    if isinstance(objective, LatencyObjective):
        return None if costs is None else lambda assignment: costs.predict(name, assignment)
    if isinstance(objective, EnergyObjective):
        workload, target = problem.spec.target, problem.target
        return lambda assignment: objective.estimate(problem.info, assignment, workload, target).joules
    return None
