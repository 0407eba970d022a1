"""Offers: the model's best assignment for bounds at which a study has no point, at once and unmeasured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from autoq.assignment import Assignment
from autoq.errors import AutoQError, BadInput
from autoq.objectives import Objective
from autoq.search.prior import Prior
from autoq.search.priors import make_prior
from autoq.search.samplers import SLOPES
from autoq.search.samplers._known import Choices, Floats, Known, Table
from autoq.search.samplers._trials import fitted, interactions_of, layers_of, positive, slopes_of
from autoq.search.samplers.frontier import solution
from autoq.search.setup import Problem, pose
from autoq.search.stopping import expected
from autoq.spec import Bound
from autoq.store import Store, StudyRecord
from autoq.targets import CostTable

_MIXTURES = 16  # of several bounds
_INTERVAL = 1.96  # standard deviations of a 95 % interval


@dataclass(frozen=True)
class Offer:
    """An assignment and what is predicted of it: objective -> value, and the ends of its 95 % interval.

    What tables say exactly has equal ends.
    """

    assignment: Assignment
    predicted: Mapping[str, tuple[float, float, float]]


def offer(store: Store, study: StudyRecord, bounds: Mapping[str, Bound]) -> Offer:
    """The assignment of least predicted loss that keeps `bounds`, by all trials of the study.

    Bounds on sizes, predicted latencies and energies are kept exactly, those on the loss in expectation. Raises
    `AutoQError` where the study has not one objective that is measured, or does not know what is bounded, or
    nothing keeps the bounds; `BadInput` where no table is bounded.
    """
    problem = pose(study.study_spec())
    costs = store.table(study.id, "costs")
    table = None if costs is None else CostTable(**costs)
    spec = problem.spec
    if unknown := sorted(set(bounds) - set(spec.measured)):
        raise AutoQError(f"study {study.name!r} knows nothing of {', '.join(unknown)}")
    tighter = spec.model_copy(update={"constraints": {**spec.constraints, **bounds}})
    problem = Problem(tighter, problem.info, problem.target, problem.space, problem.objectives)
    prior = make_prior(problem, store.table(study.id, "sensitivity"), table)
    learned = [i for i in range(len(spec.objectives)) if i not in prior.additive]
    if len(learned) != 1:
        raise AutoQError(f"study {study.name!r} has {len(learned)} measured objectives; an offer needs exactly one")
    known = _known(problem, prior)
    upper = [limit for limit in known.limits if math.isfinite(limit.limit)]
    if not upper:
        choices = ", ".join(spec.objectives[place] for place in sorted(prior.additive)) or "(there is none)"
        raise BadInput(f"an offer is made for a limit on what the study computes by table; give one on: {choices}")
    return _Offering(store, study, problem, prior, known, upper, spec.objectives[learned[0]]).best()


def _known(problem: Problem, prior: Prior) -> Known:
    import optuna

    space = {
        v.name: optuna.distributions.IntDistribution(0, len(v.choices) - 1)
        for v in problem.space.variables
        if len(v.choices) > 1
    }
    directions = [problem.objectives[name].direction for name in problem.spec.objectives]
    return Known.of([optuna.study.StudyDirection[d.upper()] for d in directions], space, prior)


class _Offering:
    """The model of one study, fitted to its trials, and its answer under bounds."""

    def __init__(
        self,
        store: Store,
        study: StudyRecord,
        problem: Problem,
        prior: Prior,
        known: Known,
        limits: list[Table],
        quality: str,
    ) -> None:
        self.problem, self.prior, self.known, self.limits = problem, prior, known, limits
        self.quality = quality
        self.sign = 1.0 if _minimized(problem.objectives[quality]) else -1.0
        self.names = [v.name for v in problem.space.variables]
        self.layers = layers_of(known)
        rows: list[list[int]] = []
        values, slopes = [], []
        for trial in store.trials(study.id, states=["complete", "stopped"], with_assignments=True):
            assert trial.assignment is not None
            indices = problem.space.indices(trial.assignment)
            if indices is None or (quality, "search") not in trial.measurements:
                continue
            row = self._inside(indices)
            rows.append(row)
            values.append(self.sign * expected(trial.measurements[quality, "search"]))
            if (found := trial.sampler_attrs.get(SLOPES)) is not None:
                slopes.append(slopes_of(row, found, known))
        if not rows:
            raise AutoQError(f"study {study.name!r} has no finished trial to learn from")
        losses, self.shift = positive(np.array(values, dtype=np.float64))
        choices = np.array(rows, dtype=np.int64)
        interactions = interactions_of(self.layers, slopes)
        self.model = fitted(list(choices), losses, known.budgets[0].of(choices), self.layers, interactions)

    def _inside(self, indices: list[int]) -> list[int]:
        by_name = dict(zip(self.names, indices, strict=True))
        return [by_name[name] for name in self.known.names]

    def best(self) -> Offer:
        """The offer. Raises `AutoQError` where nothing keeps the bounds."""
        candidates: dict[Choices, None] = {}
        counts = np.array(self.known.sizes)
        for table in self._mixtures():
            found = solution(self.model, table, counts, table.limit)
            candidates[tuple(found.tolist())] = None
            candidates[tuple(self.known.mend(found, self.model.cost, table, math.inf).tolist())] = None
        pool = np.array(list(candidates), dtype=np.int64)
        keeps = pool[np.flatnonzero(self.known.excess(pool) <= 0)]
        if not len(keeps):
            raise AutoQError("no assignment that the model finds keeps all bounds")
        mean, spread = self.model.predict(keeps)
        chosen = int(np.argmin(mean))
        answer = self._offer(keeps[chosen].tolist(), float(mean[chosen]), float(spread[chosen]))
        self._check(answer.predicted[self.quality][0])
        return answer

    def _check(self, value: float) -> None:
        bound = self.problem.spec.constraints.get(self.quality)
        if bound is None:
            return
        if (bound.max is not None and value > bound.max) or (bound.min is not None and value < bound.min):
            raise AutoQError(f"the best {self.quality} that is predicted within the other bounds is {value:.4g}")

    def _mixtures(self) -> list[Table]:
        """The bounded tables, and sums of them in varied proportions, each in units of its limit.

        What keeps all bounds keeps those of the sums.
        """
        if len(self.limits) == 1:
            return self.limits
        rng = np.random.default_rng(0)
        blocked = np.where(np.isfinite(self.limits[0].parts), 0.0, np.inf)
        found = list(self.limits)
        for share in rng.dirichlet(np.ones(len(self.limits)), _MIXTURES):
            weights = [w / (abs(t.limit) or 1.0) for w, t in zip(share, self.limits, strict=True)]
            parts: Floats = blocked.copy()
            for w, table in zip(weights, self.limits, strict=True):
                parts += w * np.where(np.isfinite(table.parts), table.parts, 0.0)
            found.append(Table(parts, sum(w * t.limit for w, t in zip(weights, self.limits, strict=True))))
        return found

    def _offer(self, choices: list[int], mean: float, spread: float) -> Offer:
        picked = dict(zip(self.known.names, choices, strict=True))
        indices = [picked.get(name, 0) for name in self.names]
        everything = dict(zip(self.names, indices, strict=True))
        ends = [math.exp(mean + shift * spread) for shift in (0.0, -_INTERVAL, _INTERVAL)]
        # Losses may have been shifted to be positive.
        value, *interval = (self.sign * (end + self.shift) for end in ends)
        low, high = sorted(interval)
        predicted = {self.quality: (value, low, high)}
        for place, table in self.prior.additive.items():
            exact = table.of(everything)
            predicted[self.problem.spec.objectives[place]] = (exact, exact, exact)
        return Offer(self.problem.space.assignment(indices), predicted)


def _minimized(objective: Objective) -> bool:
    return objective.direction == "minimize"
