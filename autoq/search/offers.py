"""Offers: the model's best assignment for bounds at which a study has no point, at once and unmeasured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from autoq.assignment import Assignment
from autoq.errors import AutoQError, BadInput
from autoq.objectives import Objective
from autoq.search.prior import Prior
from autoq.search.priors import make_prior
from autoq.search.samplers import SLOPES
from autoq.search.samplers._known import Choices, Floats, Indices, Known, Table
from autoq.search.samplers._trials import fitted, interactions_of, layers_of, positive, slopes_of
from autoq.search.samplers.frontier import solution
from autoq.search.setup import Problem, pose
from autoq.search.stopping import expected
from autoq.spec import Bound
from autoq.store import Store, StudyRecord
from autoq.targets import CostTable

_MIXTURES = 16  # of several bounds
_HALVINGS = 12  # of a range of sizes, in which the one is sought that a bound on the loss needs
_NEARBY = tuple(0.003 * i for i in range(9))  # of a range of sizes, where fresh offers are sought beside the best
_INTERVAL = 1.96  # standard deviations of a 95 % interval


@dataclass(frozen=True)
class Offer:
    """An assignment and what is predicted of it: objective -> value, and the ends of its 95 % interval.

    What tables say exactly has equal ends.
    """

    assignment: Assignment
    predicted: Mapping[str, tuple[float, float, float]]


def offer(
    store: Store, study: StudyRecord, bounds: Mapping[str, Bound], best: str | None = None, fresh: bool = False
) -> Offer | None:
    """What the study's model, which has learned from all its trials, would have within `bounds`.

    The assignment of least predicted loss; where `best` is an objective that is computed by table, the one that
    has least of that and keeps the bound on the loss. Bounds on sizes, predicted latencies and energies are kept
    exactly, those on the loss in expectation. A `fresh` one is no trial of the study; None where the model is
    sure that nothing untried is better than what was measured. Raises `AutoQError` where the study has not one
    objective that is measured, or does not know what is bounded, or nothing keeps the bounds; `BadInput` where
    nothing bounds what is traded.
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
    steering = problem.steering
    learned = [i for i in range(len(steering)) if i not in prior.additive]
    if len(learned) != 1:
        raise AutoQError(f"study {study.name!r} has {len(learned)} measured objectives; an offer needs exactly one")
    known = _known(problem, prior)
    upper = [limit for limit in known.limits if math.isfinite(limit.limit)]
    tables = {steering[place]: known.budgets[i] for i, place in enumerate(sorted(prior.additive))}
    quality = steering[learned[0]]
    if best in tables and quality in tighter.constraints:
        traded: Table | None = tables[best]
    elif upper:
        traded = None
    else:
        choices = ", ".join(tables) or "(there is none)"
        raise BadInput(f"an offer is made for a limit on what the study computes by table; give one on: {choices}")
    return _Offering(store, study, problem, prior, known, upper, quality).best(traded, fresh)


def offer_json(
    store: Store, study: StudyRecord, bounds: Mapping[str, Bound], best: str | None = None
) -> dict[str, Any]:
    """`offer` as JSON: `{"predicted": {objective: {"value", "low", "high", "kind"}}, "assignment", "hash", "trial"}`.

    `kind` is `computed` for what tables say exactly and `predicted` for the rest; `trial` is the number of the trial
    that has measured this very assignment, None where it is untried. Raises as `offer` does.
    """
    found = offer(store, study, bounds, best)
    assert found is not None, "only a fresh one may be missing"
    known = store.find(study.id, found.assignment.hash)
    computed = {
        name for t in store.frontier(study.id) for (name, _), m in t.measurements.items() if m.kind == "computed"
    }
    return {
        "predicted": {
            name: {"value": value, "low": low, "high": high, "kind": "computed" if name in computed else "predicted"}
            for name, (value, low, high) in found.predicted.items()
        },
        "assignment": found.assignment.to_dict(),
        "hash": found.assignment.hash,
        "trial": None if known is None else known.number,
    }


def _known(problem: Problem, prior: Prior) -> Known:
    import optuna

    space = {
        v.name: optuna.distributions.IntDistribution(0, len(v.choices) - 1)
        for v in problem.space.variables
        if len(v.choices) > 1
    }
    directions = [problem.objectives[name].direction for name in problem.steering]
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
            if indices is None or trial.parent is not None or (quality, "search") not in trial.measurements:
                continue  # not of the space, or trained: another than its schemes say
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
        self.tried, self.counts = {tuple(row) for row in rows}, np.array(known.sizes)
        self.choices, self.losses = choices, np.log(losses)
        bound = problem.spec.constraints.get(quality)
        end = None if bound is None else bound.max if self.sign > 0 else bound.min
        excess = math.inf if end is None else self.sign * end - self.shift
        self.most = math.log(excess) if excess > 0 else -math.inf  # of the loss, on the model's scale

    def _inside(self, indices: list[int]) -> list[int]:
        by_name = dict(zip(self.names, indices, strict=True))
        return [by_name[name] for name in self.known.names]

    def best(self, traded: Table | None, fresh: bool) -> Offer | None:
        """The offer of least loss, or of least `traded`. Raises `AutoQError` where nothing keeps the bounds."""
        pool = self._pool(self._mixtures() if traded is None else [self._needed(traded)], fresh)
        pool = pool[self.known.excess(pool) <= 0]
        if not len(pool):
            raise AutoQError("no assignment that the model finds keeps all bounds")
        mean, spread = self.model.predict(pool)
        if mean.min() > self.most:
            self._refuse(float(mean.min()))
        merit = mean if traded is None else np.where(mean <= self.most, traded.of(pool), np.inf)
        if fresh:
            hopeful = mean - _INTERVAL * spread if traded is None else merit
            untried = np.array([tuple(row) not in self.tried for row in pool.tolist()])
            merit = np.where(untried & (hopeful < self._measured(traded)), merit, np.inf)
        if not np.isfinite(merit).any():
            return None
        chosen = int(np.argmin(merit))
        return self._offer(pool[chosen].tolist(), float(mean[chosen]), float(spread[chosen]))

    def _pool(self, tables: Sequence[Table], fresh: bool) -> Indices:
        """Solutions for the limits of `tables`, of fresh ones also for limits a little below."""
        candidates: dict[Choices, None] = {}
        for table in tables:
            low = float(table.parts.min(axis=1).sum())
            for share in _NEARBY if fresh else (0.0,):
                found = solution(self.model, table, self.counts, table.limit - share * (table.limit - low))
                candidates[tuple(found.tolist())] = None
                candidates[tuple(self.known.mend(found, self.model.cost, table, math.inf).tolist())] = None
        return np.array(list(candidates), dtype=np.int64)

    def _needed(self, traded: Table) -> Table:
        """`traded` with the least limit at which the model finds the bound on the loss kept."""
        low, high = self.known.span(traded, self.known.losses)
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            mean, _ = self.model.predict(self._pool([Table(traded.parts, middle)], fresh=False)[-1:])
            low, high = (low, middle) if mean[0] <= self.most else (middle, high)
        return Table(traded.parts, high)

    def _measured(self, traded: Table | None) -> float:
        """The best of the study's trials within the bounds, of the loss or of `traded`; infinite without one."""
        within = (self.known.excess(self.choices) <= 0) & (self.losses <= self.most)
        merit = self.losses if traded is None else traded.of(self.choices)
        return float(merit[within].min(initial=math.inf))

    def _refuse(self, mean: float) -> NoReturn:
        value = self.sign * (math.exp(mean) + self.shift)
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
            predicted[self.problem.steering[place]] = (exact, exact, exact)
        return Offer(self.problem.space.assignment(indices), predicted)


def _minimized(objective: Objective) -> bool:
    return objective.direction == "minimize"
