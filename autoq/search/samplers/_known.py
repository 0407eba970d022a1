"""What samplers of our own share: tables and trials as arrays, and a base that proposes whole assignments."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from autoq.search.budget import frontier
from autoq.search.prior import Additive, Prior
from autoq.search.samplers import Value

Choices = tuple[int, ...]
Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Table:
    """A quantity of which less is better, as a sum over parameters; a bound on its total is `limit`."""

    parts: Floats  # (parameters, choices), +inf beyond a parameter's last choice
    limit: float = np.inf

    def of(self, choices: Sequence[int] | Indices) -> Floats:
        """The totals of assignments (…, parameters)."""
        totals: Floats = self.parts[np.arange(len(self.parts)), np.asarray(choices, dtype=np.int64)].sum(axis=-1)
        return totals


@dataclass(frozen=True)
class Known:
    """What is known of a study beforehand, as matrices (parameters, choices).

    `losses` are `predicted` or assumed. `budgets` are the sums that assignments are budgeted by, at least
    one: objectives, else bounded sums, else (`assumed`) the sum of the indices. `qualities` are the places
    of the objectives that only trials tell.
    """

    names: tuple[str, ...]
    sizes: tuple[int, ...]
    losses: Floats
    predicted: bool
    budgets: tuple[Table, ...]
    assumed: bool
    limits: tuple[Table, ...]
    qualities: tuple[int, ...]

    @classmethod
    def of(
        cls,
        directions: Sequence[optuna.study.StudyDirection],
        search_space: Mapping[str, BaseDistribution],
        prior: Prior,
    ) -> Known:
        """For the parameters of `search_space`; those that it lacks stand at their only choice."""
        names = tuple(search_space)
        sizes = tuple(d.high + 1 for d in search_space.values() if isinstance(d, IntDistribution))
        assert len(sizes) == len(names), search_space
        predicted = all(name in prior.losses for name in names)
        assumed_losses = (0.25 ** np.arange(k, dtype=np.float64) for k in sizes)
        losses = _padded([prior.losses[name] for name in names] if predicted else list(assumed_losses))
        signs = [1.0 if d == optuna.study.StudyDirection.MINIMIZE else -1.0 for d in directions]
        limits = [t for a in (*prior.additive.values(), *prior.limits) for t in _bounds(a, names)]
        budgets = [_table(a, names, signs[place]) for place, a in sorted(prior.additive.items())]
        budgets = budgets or limits
        qualities = [i for i in range(len(signs)) if i not in prior.additive] or range(len(signs))
        by_index = [Table(_padded([np.arange(k, dtype=np.float64) for k in sizes]))]
        return cls(
            names, sizes, losses, predicted, tuple(budgets or by_index), not budgets, tuple(limits), tuple(qualities)
        )

    def excess(self, choices: Sequence[int] | Indices) -> Floats:
        """By how much assignments (…, parameters) overstep the bounds on sums, relative to them; 0 if feasible."""
        total = np.zeros(np.shape(choices)[:-1])
        for table in self.limits:
            over = table.of(choices) - table.limit
            total += np.where(over > 1e-9 * abs(table.limit), over, 0.0) / (abs(table.limit) or 1.0)
        return total

    def span(self, table: Table, losses: Floats) -> tuple[float, float]:
        """From the lightest assignment to the lightest of least loss, or to the bound if that is nearer.

        To stay further below a bound on what is no objective gains nothing: then both are the bound.
        """
        low = float(table.parts.min(axis=1).sum())
        if table in self.limits:
            return (max(low, table.limit),) * 2
        # Of choices that lose the same, the lightest.
        best = np.where(losses == losses.min(axis=1, keepdims=True), table.parts, np.inf).argmin(axis=1)
        return low, max(low, min(float(table.of(best)), table.limit))

    def solve(self, losses: Floats, table: Table, budget: float) -> Choices:
        """The assignment of least loss within the budget, mended where it breaks bounds on other sums.

        The lightest if there is none.
        """
        low = float(table.parts.min(axis=1).sum())
        budget = max(budget, low) + 1e-9 * abs(budget)
        cost, weight = ([m[i, :k] for i, k in enumerate(self.sizes)] for m in (losses, table.parts))
        (solution,) = frontier(cost, weight, [budget])
        assert solution is not None, "a budget below the lightest assignment"
        return tuple(self.mend(np.array(solution.choices), losses, table, budget).tolist())

    def mend(self, choices: Indices, losses: Floats, table: Table, budget: float) -> Indices:
        """An assignment with the moves that mend most per loss, until it keeps all bounds.

        Or as long as there are such moves within the budget of the table.
        """
        choices, rows = choices.copy(), np.arange(len(choices))
        while (before := float(self.excess(choices))) > 0.0:
            moved = np.zeros_like(losses)
            for limit in self.limits:
                if float(limit.of(choices)) > limit.limit:
                    moved += (limit.parts - limit.parts[rows, choices][:, None]) / (abs(limit.limit) or 1.0)
            heavier = table.parts - table.parts[rows, choices][:, None]
            costs = losses - losses[rows, choices][:, None]
            mends = (moved < 0.0) & (heavier <= budget - float(table.of(choices)))
            if not mends.any():
                break
            rate = np.where(mends, np.maximum(costs, 0.0) / np.where(mends, -moved, 1.0), np.inf)
            row, column = np.unravel_index(int(np.argmin(rate)), rate.shape)
            previous = choices[row]
            choices[row] = column
            if float(self.excess(choices)) >= before:  # one bound is mended at the other's expense
                choices[row] = previous
                break
        return choices


def _padded(rows: Sequence[Floats]) -> Floats:
    """A matrix of rows of different length, +inf beyond their ends and nowhere else."""
    matrix = np.full((len(rows), max(map(len, rows))), np.inf)
    for target, row in zip(matrix, rows, strict=True):
        target[: len(row)] = row
        if not np.isfinite(row).all():
            worst = np.abs(row[np.isfinite(row)]).max(initial=1.0)
            target[: len(row)] = np.nan_to_num(row, nan=10 * worst, posinf=10 * worst, neginf=-10 * worst)
    return matrix


def _table(additive: Additive, names: Sequence[str], sign: float) -> Table:
    """An additive quantity times `sign`, over the parameters that have choices."""
    fixed = additive.parts.keys() - set(names)
    rest = additive.constant + sum(float(part[0]) for name, part in additive.parts.items() if name in fixed)
    bound = additive.high if sign > 0 else additive.low
    return Table(_padded([sign * additive.parts[name] for name in names]), sign * (bound - rest))


def _bounds(additive: Additive, names: Sequence[str]) -> list[Table]:
    both = (_table(additive, names, sign) for sign in (1.0, -1.0))
    return [table for table in both if np.isfinite(table.limit)]


def taken(study: optuna.Study, trial: FrozenTrial, names: Sequence[str]) -> set[Choices]:
    """The assignments of all other trials, running and failed ones too."""
    picked = itemgetter(*names) if len(names) > 1 else lambda params: (params[names[0]],)
    return {picked(other.params) for other in study.get_trials(deepcopy=False) if other.number != trial.number}


@dataclass(frozen=True)
class Told:
    """The complete trials, by number.

    `values` are the objectives that only trials tell, less is better; `bounds` the constraints, at most 0
    where they hold.
    """

    choices: Indices  # (trials, parameters)
    values: Floats  # (trials, qualities)
    bounds: Floats  # (trials, constraints)

    @classmethod
    def of(cls, study: optuna.Study, known: Known) -> Told:
        """Of a study's trials; infinite values become worse than the worst finite one."""
        trials = [t for t in study.get_trials(deepcopy=False, states=[TrialState.COMPLETE]) if t.values]
        signs = [1.0 if d == optuna.study.StudyDirection.MINIMIZE else -1.0 for d in study.directions]
        values = [[signs[q] * t.values[q] for q in known.qualities] for t in trials]
        bounds = [[value for _, value in sorted(t.constraints.items())] for t in trials]
        choices = [[t.params[name] for name in known.names] for t in trials]
        return cls(
            np.array(choices, dtype=np.int64).reshape(len(trials), len(known.names)),
            finite(np.array(values, dtype=np.float64).reshape(len(trials), len(known.qualities))),
            finite(np.array(bounds, dtype=np.float64).reshape(len(trials), len(bounds[0]) if bounds else 0)),
        )

    @property
    def violation(self) -> Floats:
        """By how much a trial oversteps its constraints, in sum (trials,); 0 if feasible."""
        total: Floats = np.maximum(self.bounds, 0.0).sum(axis=1)
        return total

    @property
    def merit(self) -> Floats:
        """One figure for all qualities (trials,), less is better, between 0 and 1."""
        scaled = log_like(self.values)
        low, high = scaled.min(axis=0, initial=np.inf), scaled.max(axis=0, initial=-np.inf)
        mean: Floats = ((scaled - low) / np.maximum(high - low, 1e-30)).mean(axis=1)
        return mean


def finite(values: Floats) -> Floats:
    """Columns without infinities: those above become worse than the worst by the column's range."""
    known = np.isfinite(values)
    low = np.where(known, values, np.inf).min(axis=0, initial=np.inf)
    high = np.where(known, values, -np.inf).max(axis=0, initial=-np.inf)
    low, high = (np.where(np.isfinite(end), end, 0.0) for end in (low, high))
    beyond = np.maximum(high - low, np.maximum(abs(high), 1.0))
    return np.where(known, values, np.where(values > 0, high + beyond, low))


def log_like(values: Floats) -> Floats:
    """Columns on the scale where losses are about linear in bits: the log of those that are positive."""
    positive = values.min(axis=0, initial=np.inf) > 0
    return np.where(positive, np.log(np.where(positive, values, 1.0)), values)


def nondominated(values: Floats) -> NDArray[np.bool_]:
    """Which rows (rows, objectives) no other row beats: none as good everywhere and better somewhere."""
    # In this order nothing is beaten by what comes later.
    left, place = np.lexsort(values.T[::-1]), 0
    if values.shape[1] == 2 and len(left):
        ordered = values[left]
        beaten = np.append(False, ordered[1:, 1] >= np.minimum.accumulate(ordered[:, 1])[:-1])
        first = np.flatnonzero(np.append(True, (ordered[1:] != ordered[:-1]).any(axis=1)))
        # Of equals the first decides for all.
        beaten = np.repeat(beaten[first], np.diff(np.append(first, len(left))))
        left, place = left[~beaten], len(left)
    while place < len(left):
        row, later = values[left[place]], values[left[place + 1 :]]
        # What a row leaves standing is better somewhere, or its equal.
        stays = (later < row).any(axis=1) | (later == row).all(axis=1)
        place += 1
        left = np.concatenate([left[:place], left[place:][stays]])
    mask = np.zeros(len(values), dtype=np.bool_)
    mask[left] = True
    return mask


class Proposer(optuna.samplers.BaseSampler):
    """An Optuna sampler that proposes whole assignments."""

    def __init__(self, seed: int, options: Mapping[str, Value], prior: Prior) -> None:
        self._seed, self._options, self._prior = seed, options, prior

    @abc.abstractmethod
    def propose(self, study: optuna.Study, trial: FrozenTrial, known: Known) -> Choices:
        """One choice index per parameter of `known`."""

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(optuna.search_space.intersection_search_space(study.get_trials(deepcopy=False)))

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        known = Known.of(study.directions, search_space, self._prior)
        return dict(zip(known.names, self.propose(study, trial, known), strict=True))

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"parameter {param_name!r} is not part of the space")
