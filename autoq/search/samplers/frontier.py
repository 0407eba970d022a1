"""Frontier: exact budget solutions of a quality model that learns from every trial; AutoQ's own, and the default.

Each proposal is made in four steps.

1. The model of quality (`autoq.search.quality_model`) is fitted to all told trials and their slopes. Where very many
   are out it is fitted anew for every so many told ones (`_step`), and the proposals between share it.
2. Candidates: solutions of the knapsack at budgets along the range of every table (size, latency, energy,
   and random mixtures of them), under the model's mean and under draws from its posterior (Thompson 1933);
   moves of a few layers around what is on the frontier; in a space small enough, every assignment.
3. Of those that are new and keep all bounds, the one with the largest expected improvement: how far its log
   loss is expected to fall below that of the best trial which is no worse in any table (Mockus 1978).
   Trials that are still running count as if they had come out as predicted, which keeps workers apart.
4. Its predicted loss goes into the trial's attributes, so that anyone can see what the model is worth.

Objectives without a table are learned. Where one is bounded, the improvement is multiplied with the probability
that the bound is kept (Gardner et al. 2014), and budgets are drawn from where it is expected to be. With several of
them, every proposal scalarizes their logarithms by random weights (Knowles 2006, ParEGO). What is told but not
positive is shifted to be.

`FrontierSampler` is an Optuna sampler of its own and serves any study whose parameters are integers or
categories in the order of rising cost; without a `Prior` it learns everything from trials.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

import numpy as np
import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial
from scipy.special import ndtr
from threadpoolctl import ThreadpoolController

from autoq.search import coherent
from autoq.search.prior import Prior
from autoq.search.quality_model import QualityModel
from autoq.search.samplers import Option, Sampler, Value, trial_seed
from autoq.search.samplers._known import Floats, Indices, Table, nondominated
from autoq.search.samplers._trials import PREDICTED, Pending, Snapshot, Trials, fitted, keys, positive

ENUMERATED = 20_000  # assignments up to which every one is a candidate
_BUDGETS = 5  # at which candidates are solved for, per proposal
_LOCAL = 48  # moves around the frontier, per proposal
_HEAT = 0.7  # of the draws from the posterior
_REFERENCES = 256  # budgets by which a candidate is judged
_HANDFUL = 12  # layers of which the best is switched
_CHOICES = 256  # of a parameter, beyond which it is no choice but a quantity, and drawn at random
_HALVINGS = 7  # of the range of budgets in search of where a bound is kept


def solution(model: QualityModel, table: Table, counts: Indices, budget: float) -> Indices:
    """The assignment (n,) of least expected loss within a budget of the table, nearly exactly."""
    near = coherent.knapsack(model.cost, table.parts, counts, budget)
    if model.interactions:
        near = coherent.knapsack(model.own(near), table.parts, counts, budget)
    context = model.context(near)
    if context.weight <= 0.0:
        return near
    return coherent.solve(context.cost, context.direction, context.weight, table.parts, counts, budget)


class FrontierSampler(optuna.samplers.BaseSampler):
    """See the module. `prior` is what is known of the study; `budgets` are totals of the first table that
    proposals are to keep to, in turns."""

    def __init__(self, prior: Prior | None = None, seed: int = 0, budgets: Sequence[float] = ()) -> None:
        self._prior, self._seed, self._budgets = prior or Prior(), seed, tuple(budgets)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        found = optuna.search_space.intersection_search_space(study.get_trials(deepcopy=False))
        return {
            name: distribution
            for name, distribution in found.items()
            if isinstance(distribution, CategoricalDistribution | IntDistribution)
            and 1 < _choices(distribution) <= _CHOICES
        }

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        # Of the name too: parameters of one trial would all stand at the same place of their ranges.
        seed = np.random.SeedSequence((self._seed, trial.number, zlib.crc32(param_name.encode())))
        sampler = optuna.samplers.RandomSampler(seed=int(seed.generate_state(1)[0]))
        return sampler.sample_independent(study, trial, param_name, param_distribution)

    def solutions(
        self, study: optuna.Study, search_space: dict[str, BaseDistribution], budgets: Sequence[float]
    ) -> list[dict[str, Any]]:
        """The model's answer for totals of the first table, after all trials of the study; nothing is asked for."""
        trials = Trials.of(study, search_space, self._prior)
        proposal = _Proposal(study, -1, trials, np.random.default_rng(self._seed), budgets)
        table = trials.known.budgets[0]
        found = [solution(proposal.model, table, proposal.counts, budget) for budget in budgets]
        return [_values(trials, choices) for choices in found]

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        trials = Trials.of(study, search_space, self._prior)
        rng = np.random.default_rng(trial_seed(self._seed, trial.number))
        # Many small products: threads would wait for each other longer than they work.
        with _threads().limit(limits=1):
            choices, predicted = _Proposal(study, trial.number, trials, rng, self._budgets).best()
        # The sampler interface of Optuna hands out trials by value; this is how its own samplers attach
        # what they must remember.
        study._storage.set_trial_system_attr(trial._trial_id, PREDICTED, predicted)
        return _values(trials, choices)


@functools.cache
def _threads() -> ThreadpoolController:
    return ThreadpoolController()


def _choices(distribution: CategoricalDistribution | IntDistribution) -> int:
    if isinstance(distribution, CategoricalDistribution):
        return len(distribution.choices)
    return (distribution.high - distribution.low) // distribution.step + 1


def _values(trials: Trials, choices: Indices) -> dict[str, Any]:
    return {name: menu[int(i)] for (name, menu), i in zip(trials.menus.items(), choices, strict=True)}


def _step(pending: int) -> int:
    """Of how many results in a row the model hears at once: a 64th of those that are not there yet, as a power of two.

    Fitting it costs most of a proposal. With fewer than 128 trials out it hears of each.
    """
    return 1 << max(0, (pending // 64).bit_length() - 1)


class _Fit:
    """The model of the first `count` of the trials told. Depends on them alone, so proposals may share it."""

    def __init__(self, trials: Trials, found: Snapshot, losses: Floats, count: int) -> None:
        self.assumed, self.interactions = trials.known.assumed, found.interactions
        self.numbers, self.losses = [t.number for t in found.told[:count]], losses[:count]
        choices = [t.choices for t in found.told[:count]]
        self.model = fitted(choices, self.losses, found.totals[:count, 0], trials.layers, found.interactions)
        self._front = self._best(found, losses, np.arange(count))
        self._known: dict[bytes, float] = {}

    @classmethod
    def of(cls, trials: Trials, found: Snapshot, losses: Floats, count: int) -> _Fit:
        """The last one, if nothing is new to it."""
        fit = _FITS.get(trials)
        if (
            fit is None
            or fit.interactions is not found.interactions
            or fit.numbers != [t.number for t in found.told[:count]]
            or not np.array_equal(fit.losses, losses[:count])
        ):
            fit = _FITS[trials] = cls(trials, found, losses, count)
        return fit

    def front(self, found: Snapshot, losses: Floats) -> Indices:
        """The places, among all that were told, of the feasible ones that no other one beats."""
        return self._best(found, losses, np.append(self._front, np.arange(len(self.losses), len(losses))))

    def _best(self, found: Snapshot, losses: Floats, places: Indices) -> Indices:
        places = places[found.feasible[places]]
        logs = np.log(losses[places])
        columns = logs[:, None] if self.assumed else np.column_stack([logs, found.totals[places]])
        kept: Indices = places[nondominated(columns)]
        return kept

    def predicted(self, pending: Sequence[Pending], known: bool) -> Floats:
        """Log losses (k,) that trials are expected to have; with `known` each is asked for once."""
        if not known:
            return self._predict(pending)
        new = [trial for trial in pending if trial.key not in self._known]
        # Numbers that come out of products of other shapes differ in their last digits, and proposals must not.
        self._known |= {t.key: float(f"{mean:.9g}") for t, mean in zip(new, self._predict(new), strict=True)}
        return np.array([self._known[trial.key] for trial in pending], dtype=np.float64)

    def _predict(self, pending: Sequence[Pending]) -> Floats:
        return self.model.predict(np.stack([t.choices for t in pending]))[0] if pending else np.zeros(0)


_FITS: WeakKeyDictionary[Trials, _Fit] = WeakKeyDictionary()


class _Proposal:
    """One proposal: the model of all that was told, candidates and their expected improvement."""

    def __init__(
        self,
        study: optuna.Study,
        number: int,
        trials: Trials,
        rng: np.random.Generator,
        budgets: Sequence[float],
    ) -> None:
        known = self.known = trials.known
        self.rng, self.budgets, self.layers = rng, budgets, trials.layers
        self.rows, self.counts = np.arange(len(known.names)), np.array(known.sizes)
        found = trials.snapshot(study, number)
        self.used, self.turn = found.used, found.turn
        n, pending = len(known.names), found.pending
        self.sign = 1.0 if study.directions[known.qualities[0]] == optuna.study.StudyDirection.MINIMIZE else -1.0
        self.shift = 0.0
        losses = self._scalar(found.values)
        step = _step(len(pending)) if len(known.qualities) == 1 else 1
        fit = _Fit.of(trials, found, losses, len(losses) - len(losses) % step)
        self.model = fit.model
        self.bounds = self._log_bounds(trials.prior.learned.get(known.qualities[0], (-math.inf, math.inf)))
        # What a candidate must beat: feasible trials, and those that still run as they are predicted.
        feasible = fit.front(found, losses)
        running = fit.predicted(pending, known=step > 1)
        logs = np.concatenate([np.log(losses[feasible]), running])
        weights = np.concatenate(
            [found.totals[feasible], np.array([p.totals for p in pending]).reshape(-1, len(known.budgets))]
        )
        columns = logs[:, None] if known.assumed else np.column_stack([logs, weights])
        front = np.flatnonzero(nondominated(columns))
        self.logs, self.weights = logs[front], weights[front]
        rows = [
            (found.told[feasible[i]] if i < len(feasible) else pending[i - len(feasible)]).choices
            for i in front.tolist()
        ]
        self.incumbents = np.array(rows, dtype=np.int64).reshape(-1, n)

    def _scalar(self, values: Floats) -> Floats:
        """Losses (k,) of the learned objectives (k, q)."""
        if values.shape[1] <= 1 or not len(values):
            losses, self.shift = positive(values.reshape(-1))
            return losses
        logs = np.log(np.stack([positive(column)[0] for column in values.T], 1))
        scaled = (logs - logs.min(0)) / np.maximum(np.ptp(logs, axis=0), 1e-12)
        share = self.rng.dirichlet(np.ones(values.shape[1]))
        mixed = (scaled * share).max(1) * values.shape[1] + 0.05 * (scaled * share).sum(1)
        return np.exp(3 * mixed)  # type: ignore[no-any-return]

    def _log_bounds(self, bounds: tuple[float, float]) -> tuple[float, float]:
        """Those of a single learned objective on the scale of the model, infinite where there are none."""
        if len(self.known.qualities) > 1:
            return -math.inf, math.inf
        losses = sorted(self.sign * end - self.shift for end in bounds)
        low, high = (math.log(loss) if loss > 0 else -math.inf for loss in losses)
        return low, high

    # -- candidates -------------------------------------------------------------------------------

    def best(self) -> tuple[Indices, float | None]:
        """The proposal and what is predicted of it; None where several objectives are learned."""
        target = self.budgets[self.turn % len(self.budgets)] if self.budgets else None
        pool = self._pool(target)
        named = dict(reversed([(key, i) for i, key in enumerate(keys(pool))]))
        fresh = sorted(i for key, i in named.items() if key not in self.used)
        candidates = pool[fresh] if fresh else self._anything()
        mean, spread = self.model.predict(candidates)
        everything = target is not None or math.prod(self.known.sizes) <= ENUMERATED
        score = self._improvement(candidates, mean, spread, everything)
        if self.bounds != (-math.inf, math.inf):
            low, high = ((end - mean) / spread for end in self.bounds)
            kept = ndtr(high) - ndtr(low)
            # Where nothing is expected to keep them, what is nearest.
            score = score * kept if kept.max() > 1e-3 else -np.maximum(-high, low)
        excess = self.known.excess(candidates)
        score = np.where(excess > 0, -1e9 * (1 + excess), score)
        if target is not None:
            weight = self.known.budgets[0].of(candidates)
            over = weight > target + 1e-9 * abs(target)
            score = np.where(over, -1e8 * (1 + np.abs(weight - target) / (abs(target) or 1.0)), score)
        # At a budget that was asked for, the model's own answer comes first: what it is anchored at next.
        first = target is not None and fresh[:1] == [0] and score[0] > -1.0
        chosen = 0 if first else int(np.argmax(score))
        return candidates[chosen], self._value(float(mean[chosen]))

    def _value(self, log: float) -> float | None:
        """A predicted log loss in the unit of the objective."""
        if len(self.known.qualities) > 1:
            return None
        return self.sign * (math.exp(min(log, 700.0)) + self.shift)

    def _pool(self, target: float | None) -> Indices:
        if math.prod(self.known.sizes) <= ENUMERATED:
            grid = np.meshgrid(*(np.arange(k) for k in self.known.sizes), indexing="ij")
            return np.stack([axis.ravel() for axis in grid], 1)
        found = []
        for i in range(_BUDGETS):
            table = self._table(i)
            low, high = self.known.span(table, self.layers.loss)
            if target is not None:
                table, budget = self.known.budgets[0], target
            else:
                low, high = self._keeping(table, low, high)
                budget = low + (high - low) * float(self.rng.random())
                budget = self._below_an_incumbent(table, budget)
            found.append(self._solution(table, budget, drawn=i >= (1 if target is not None else 2)))
        return np.concatenate([np.stack(found), self._moves(target)])

    def _keeping(self, table: Table, low: float, high: float) -> tuple[float, float]:
        """The part of a range of budgets whose solutions are expected to keep the bounds on the loss."""

        def loss(budget: float) -> float:
            found = coherent.quick(self.model.cost, table.parts, self.counts, budget)
            return float(self.model.predict(found[None])[0][0])

        ends = [low, high]
        # The loss falls as budgets rise: the upper bound on it cuts off what is light, the lower what is heavy.
        for end, bound in enumerate(reversed(self.bounds)):
            if math.isinf(bound) or (loss(ends[end]) <= bound) == (end == 0):
                continue
            light, heavy = ends
            for _ in range(_HALVINGS):
                middle = (light + heavy) / 2
                light, heavy = (middle, heavy) if loss(middle) > bound else (light, middle)
            ends[end] = heavy if end == 0 else light
        return ends[0], max(ends)

    def _table(self, i: int) -> Table:
        """The tables in turns; with several, every other time a random mixture of them."""
        tables = self.known.budgets
        if len(tables) == 1 or (self.turn + i) % 2 == 0:
            return tables[(self.turn + i) // 2 % len(tables)]
        share = self.rng.dirichlet(np.ones(len(tables)))
        spans = [max(float(np.ptp(self.known.span(t, self.layers.loss))), 1e-300) for t in tables]
        parts = sum(
            w / s * np.where(np.isfinite(t.parts), t.parts, np.inf)
            for w, s, t in zip(share, spans, tables, strict=True)
        )
        return Table(np.asarray(parts))

    def _below_an_incumbent(self, table: Table, budget: float) -> float:
        """Half of the time the total of the next trial that is on the frontier: what replaces it must fit."""
        if not len(self.incumbents) or self.rng.random() < 0.5:
            return budget
        totals = table.of(self.incumbents)
        above = totals[totals >= budget]
        return float(above.min()) if above.size else budget

    def _solution(self, table: Table, budget: float, drawn: bool) -> Indices:
        cost = self.model.sample(self.rng, _HEAT) if drawn else self.model.cost
        found = coherent.quick(cost, table.parts, self.counts, budget)
        if self.model.interactions:
            found = coherent.quick(self.model.own(found, cost), table.parts, self.counts, budget)
        context = self.model.context(found, cost)
        if context.weight > 0.0:
            of = (context.cost, context.direction, context.weight)
            found = coherent.solve(*of, table.parts, self.counts, budget, coherent.quick)
        if self.known.limits and self.known.excess(found) > 0.0:
            found = self.known.mend(found, self.model.own(found, cost), table, math.inf)
        return found

    def _moves(self, target: float | None) -> Indices:
        """Assignments a few switches away from trials on the frontier: one layer up, others down for it."""
        if not len(self.incumbents):
            return np.zeros((0, len(self.rows)), dtype=np.int64)
        front = np.arange(len(self.incumbents))
        if target is not None:
            total = self.weights[front, 0]
            within = front[total <= target + 1e-9 * abs(target)]
            front = within[np.argsort(self.logs[within])[:3]] if len(within) else front
        moved = []
        cost, parts = self.model.cost, self.known.budgets[0].parts
        for _ in range(_LOCAL):
            x = self.incumbents[front[int(self.rng.integers(len(front)))]].copy()
            room = float(parts[self.rows, x].sum())
            room = room if target is None else max(room, target)
            for _ in range(int(self.rng.integers(1, 4))):
                up = self._switch(x, cost, parts, 1)
                if up is not None:
                    x[up[0]] = up[1]
            for _ in range(8):
                if float(parts[self.rows, x].sum()) <= room:
                    break
                down = self._switch(x, cost, parts, -1)
                if down is None:
                    break
                x[down[0]] = down[1]
            moved.append(x)
        return np.stack(moved)

    def _switch(self, x: Indices, cost: Floats, parts: Floats, way: int) -> tuple[int, int] | None:
        """A layer and its next choice up or down, of a random handful the one of the best price."""
        some = self.rng.integers(len(x), size=_HANDFUL)
        to = x[some] + way
        some, to = some[(to >= 0) & (to < self.counts[some])], to[(to >= 0) & (to < self.counts[some])]
        if not len(some):
            return None
        lost, size = cost[some, to] - cost[some, x[some]], parts[some, to] - parts[some, x[some]]
        price = lost / np.where(np.abs(size) > 0, np.abs(size), 1e-300)
        best = int(np.argmin(price))
        return int(some[best]), int(to[best])

    def _anything(self) -> Indices:
        """An assignment (1, n) that is new, if chance finds one."""
        for _ in range(200):
            x = self.rng.integers(self.counts)[None]
            if keys(x)[0] not in self.used:
                break
        return x

    # -- which one --------------------------------------------------------------------------------

    def _improvement(self, candidates: Indices, mean: Floats, spread: Floats, everything: bool) -> Floats:
        """What a candidate (k,) is expected to add to the frontier; `everything` if all assignments are candidates."""
        if self.known.assumed:
            return _fall(self.logs.min(initial=float(mean.max())), mean, spread)
        weights = np.stack([table.of(candidates) for table in self.known.budgets], 1)
        ceiling = max(float(self.logs.max(initial=-np.inf)), float(mean.max())) + 1.0
        if everything:
            return _fall(self._best(weights, ceiling), mean, spread)
        # What is light enough for many budgets counts for all of them, or proposals would crawl along the frontier.
        spans = np.array([self.known.span(table, self.layers.loss) for table in self.known.budgets])
        budgets = spans[:, 0] + np.ptp(spans, axis=1) * self.rng.random((_REFERENCES, len(spans)))
        best, slack = self._best(budgets, ceiling), 1e-9 * np.abs(budgets).max(0)
        fits = (weights[:, None] <= budgets + slack).all(2)  # (k, references)
        fall = _fall(best, mean[:, None], spread[:, None])
        return np.where(fits, fall, 0.0).mean(1)  # type: ignore[no-any-return]

    def _best(self, weights: Floats, ceiling: float) -> Floats:
        """The least log loss (k,) of incumbents that are no worse than `weights` (k, tables) in any table."""
        if not len(self.logs):
            return np.full(len(weights), ceiling)
        slack = 1e-9 * np.abs(self.weights).max(0)
        fits = np.ones((len(weights), len(self.logs)), dtype=np.bool_)
        for own, table in zip(weights.T + slack[:, None], self.weights.T, strict=True):
            fits &= table <= own[:, None]
        best: Floats = np.where(fits, self.logs, ceiling).min(1)
        return best


def _fall(best: Floats | float, mean: Floats, spread: Floats) -> Floats:
    """The expected improvement: by how much a normal variable falls below `best`, 0 where it does not."""
    z = (best - mean) / spread
    density = np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)
    fall: Floats = spread * (z * ndtr(z) + density)
    return fall


class Frontier(Sampler):
    """The default. Its first trials also measure slopes, one backward pass each."""

    uses_losses: ClassVar[bool] = True
    slopes: ClassVar[int] = 16
    options: ClassVar[Mapping[str, Option]] = {
        "budgets": Option(str, "totals of the first table to keep to, separated by commas; default: all its range"),
    }

    def refuses(self, choices: Sequence[int], n_objectives: int, options: Mapping[str, Value]) -> str | None:
        problem = super().refuses(choices, n_objectives, options)
        try:
            _budgets(options)
        except ValueError:
            problem = (
                problem or f"option 'budgets' must be finite numbers, separated by commas (got {options['budgets']!r})"
            )
        return problem

    def make(
        self, seed: int, number: int, n_startup: int, options: Mapping[str, Value], prior: Prior
    ) -> optuna.samplers.BaseSampler:
        return FrontierSampler(prior, seed, _budgets(options))


def _budgets(options: Mapping[str, Value]) -> list[float]:
    """Raises `ValueError` for what is no finite number."""
    found = [float(text) for text in str(options.get("budgets") or "").split(",") if text.strip()]
    if not all(map(math.isfinite, found)):
        raise ValueError
    return found
