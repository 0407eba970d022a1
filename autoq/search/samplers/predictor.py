"""Predictor: a genetic search on a cheap model of the quality, refitted to all trials each time.

AMQ (Lee et al. 2025, "AMQ: Enabling AutoML for Mixed-precision Weight-Only Quantization of Large Language
Models"): a predictor of the quality is fitted to what has been measured, NSGA-II (Deb et al. 2002) searches
thousands of assignments on the predictor and the known size, some of its frontier are measured, and so on.

The predictor of one quality y, or of its logarithm where all are positive, is

    y(x) ≈ b₀ + b₁ s + b₂ s² + Σᵢ δᵢ pᵢ(x) + Σᵢ θ[i, xᵢ],
    s = log Σᵢ losses[i, xᵢ],   pᵢ = losses[i, xᵢ] / Σⱼ losses[j, xⱼ],

least squares for b and, on what that leaves, ridge regression for δ and θ. pᵢ is the derivative of s with
respect to the logarithm of parameter i's losses, so δ corrects these as a whole, and the table θ, alike in
neighbouring choices (correlation exp(−|c − c'|)), what is left. The ridge is the one with the least
leave-one-out error, which has a closed form.

Where we differ: AMQ's predictor is a radial basis function interpolant, which knows nothing of losses. On a
toy of 24 layers whose losses were predicted within a factor of about two, 120 trials, a table without shares
came out 12 % worse in loss at equal size. AMQ first prunes choices by sensitivity; here nothing is ruled out. The
population begins with the trials and with exact solutions of the predictor's tangent planes at the wanted
budget. Each trial takes one point of the predicted frontier, at places along it that spread evenly whatever
the number of trials. The first few, while there is little to fit, are exact solutions of the predicted
losses with noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from autoq.search.prior import Prior
from autoq.search.samplers import Option, Sampler, Value, trial_seed
from autoq.search.samplers._known import (
    Choices,
    Floats,
    Indices,
    Known,
    Proposer,
    Table,
    Told,
    log_like,
    nondominated,
    taken,
)
from autoq.search.samplers.gradient_ilp import place

MIN_STARTUP, POPULATION, GENERATIONS = 8, 64, 12
_RIDGES = np.geomspace(1e-3, 1e2, 9)  # for features whose squares sum to about one
_TABLE_WEIGHT = 0.1  # prior variance of what the table explains, relative to the shares
_LEAST = 0.05  # least effect of a parameter's loss, relative to the usual one
_NOISE = 0.5  # standard deviation of a log loss in the first trials
_CROSSOVER = 0.9
_TANGENTS = 3
_MOST = 400  # trials that are fitted


class Model:
    """The fitted predictor of several columns y (trials, columns)."""

    def __init__(self, known: Known, choices: Indices, y: Floats) -> None:
        self._exists = np.isfinite(known.losses)
        self._losses = np.where(self._exists, np.maximum(known.losses, 0.0), 0.0)
        self._rows = np.arange(len(known.sizes))
        index = np.arange(known.losses.shape[1])
        root = np.linalg.cholesky(np.exp(-np.abs(index[:, None] - index)))  # (choices, features)
        s, shares = self._shares(choices)
        self._s0, self._s1 = float(s.mean()), max(float(s.std()), 1e-9)
        trend = self._trend(s)
        # A whiff of ridge: few trials, or trials that are alike, do not tell a parabola.
        penalty = len(choices) * np.diag([1e-9, 1e-5, 1e-3])
        self._b = np.linalg.solve(trend.T @ trend + penalty, trend.T @ y)
        parts = [shares, root[choices].reshape(len(choices), -1)]
        features = np.hstack([_scaled(part, weight) for part, weight in zip(parts, (1.0, _TABLE_WEIGHT), strict=True)])
        theta = _ridge(features, y - trend @ self._b)
        self._by_share = theta[: len(self._rows)] * _scale(shares, 1.0)
        by_feature = theta[len(self._rows) :].reshape(len(self._rows), len(index), -1)
        self._by_choice = np.einsum("cf,pfy->pcy", root, by_feature) * _scale(parts[1], _TABLE_WEIGHT)
        self._constant = -(shares.mean(axis=0) @ self._by_share + self._by_choice[self._rows, choices].sum(1).mean(0))

    def _shares(self, choices: Indices) -> tuple[Floats, Floats]:
        """The log of the predicted loss (assignments,) and each parameter's share of it (assignments, parameters)."""
        losses = np.maximum(self._losses[self._rows, choices], 1e-30)
        total = losses.sum(axis=1)
        return np.log(total), losses / total[:, None]

    def _trend(self, s: Floats) -> Floats:
        s = (s - self._s0) / self._s1
        return np.stack([np.ones_like(s), s, s * s], axis=1)

    def __call__(self, choices: Indices) -> Floats:
        """Predictions (assignments, columns) for assignments (assignments, parameters)."""
        s, shares = self._shares(choices)
        found: Floats = self._trend(s) @ self._b + self._constant + shares @ self._by_share
        found += self._by_choice[self._rows, choices].sum(axis=1)
        return found

    def tangent(self, choices: Indices) -> Floats:
        """What the first column is near to at an assignment, as a sum over parameters (parameters, choices)."""
        s, shares = self._shares(choices[None])
        slope = float(self._b[1, 0] + 2 * self._b[2, 0] * (s[0] - self._s0) / self._s1) / self._s1
        change = self._by_share[:, 0] - shares[0] @ self._by_share[:, 0]
        # However the fit came out, a parameter's quality does not improve with its own loss.
        factor = np.maximum(slope + change, _LEAST * abs(slope))
        plane: Floats = factor[:, None] * self._losses * np.exp(-s[0]) + self._by_choice[:, :, 0]
        return np.where(self._exists, plane, np.inf)


def _scale(features: Floats, weight: float) -> float:
    """What makes centred features (trials, features) have squares that sum to `weight` in a trial's mean."""
    return float(np.sqrt(weight / max(float(features.var(axis=0).sum()), 1e-30)))


def _scaled(features: Floats, weight: float) -> Floats:
    scaled: Floats = (features - features.mean(axis=0)) * _scale(features, weight)
    return scaled


def _ridge(features: Floats, y: Floats) -> Floats:
    """Coefficients (features, columns) by the ridge of the least leave-one-out error, for each column its own."""
    spectrum, basis = np.linalg.eigh(features @ features.T)
    spectrum = np.maximum(spectrum, 0.0)
    rotated = basis.T @ y
    found = []
    for column in range(y.shape[1]):
        fits = []
        for ridge in _RIDGES:
            inverse = basis / (spectrum + ridge)
            weights = inverse @ rotated[:, column]
            # Leaving trial i out, the prediction errs by [K⁻¹y]ᵢ / [K⁻¹]ᵢᵢ.
            error = weights / np.einsum("ij,ij->i", inverse, basis)
            fits.append((float(error @ error), weights))
        found.append(features.T @ min(fits, key=lambda fit: fit[0])[1])
    coefficients: Floats = np.stack(found, axis=1)
    return coefficients


class _Predictor(Proposer):
    def propose(self, study: optuna.Study, trial: FrozenTrial, known: Known) -> Choices:
        rng = np.random.default_rng(trial_seed(self._seed, trial.number))
        used, told = taken(study, trial, known.names), Told.of(study, known)
        where = place(trial.number + 2, self._seed)
        if len(told.choices) < int(self._options.get("n_startup_trials") or MIN_STARTUP):
            losses = known.losses * np.exp(_NOISE * rng.standard_normal(known.losses.shape))
            low, high = known.span(known.budgets[0], losses)
            return known.solve(losses, known.budgets[0], low + where * (high - low))
        search = _Search(known, told, rng)
        # One axis of the frontier at a time; without known sums, the predicted quality.
        table = known.budgets[trial.number % len(known.budgets)]
        low, high = known.span(table, known.losses)
        population = search.run(
            int(self._options.get("population_size") or POPULATION),
            int(self._options.get("generations") or GENERATIONS),
            table,
            low + where * (high - low),
        )
        fresh = [i for i, choices in enumerate(population.tolist()) if tuple(choices) not in used]
        if not fresh:
            return tuple(rng.integers(known.sizes).tolist())
        candidates = population[fresh]
        values, violation = search.evaluate(candidates)
        feasible = np.flatnonzero(violation <= violation.min())
        front = feasible[nondominated(values[feasible])]
        if search.has_sums:
            along, wanted = table.of(candidates[front]), low + where * (high - low)
        else:
            along = values[front, 0]
            wanted = along.min() + where * (along.max() - along.min())
        return tuple(candidates[front[int(np.argmin(np.abs(along - wanted)))]].tolist())


class _Search:
    """NSGA-II over assignments, on predicted qualities and known sums."""

    def __init__(self, known: Known, told: Told, rng: np.random.Generator) -> None:
        # Fitting costs the cube of the trials: of many, the latest are the nearest to the frontier.
        told = Told(told.choices[-_MOST:], told.values[-_MOST:], told.bounds[-_MOST:])
        self._known, self._told, self._rng = known, told, rng
        self._sizes = np.array(known.sizes)
        exact = [t for t in (*known.budgets, *known.limits) if not known.assumed]
        # Bounds on known sums need no prediction.
        learned = [j for j in range(told.bounds.shape[1]) if not _is_sum(told.bounds[:, j], exact, told.choices)]
        self._model = Model(known, told.choices, np.hstack([log_like(told.values), told.bounds[:, learned]]))
        self._n_qualities = told.values.shape[1]
        self._sums: list[Table] = [t for t in known.budgets if not known.assumed and t not in known.limits]
        self.has_sums = bool(self._sums)

    def evaluate(self, choices: Indices) -> tuple[Floats, Floats]:
        """Predicted qualities and sums (assignments, objectives), and violation (assignments,)."""
        predicted = self._model(choices)
        sums = [table.of(choices)[:, None] for table in self._sums]
        bounds = np.maximum(predicted[:, self._n_qualities :], 0.0).sum(axis=1)
        return np.hstack([predicted[:, : self._n_qualities], *sums]), bounds + self._known.excess(choices)

    def run(self, size: int, generations: int, table: Table, budget: float) -> Indices:
        """The last population (assignments, parameters), without duplicates.

        It begins with the trials and with what is best near the budget if the predictor is taken as linear.
        """
        parents = _distinct(self._told.choices, self._linear(table, budget))
        parents = parents[self._survivors(parents, size)]
        for _ in range(generations):
            both = _distinct(parents, self._offspring(parents, size))
            parents = both[self._survivors(both, size)]
        return parents

    def _linear(self, table: Table, budget: float) -> Indices:
        """Exact solutions at the budget of the predictor's tangent planes, each at the one before."""
        choices = np.array(self._known.solve(self._known.losses, table, budget))
        found = [choices]
        for _ in range(_TANGENTS):
            choices = np.array(self._known.solve(self._model.tangent(choices), table, budget))
            found.append(choices)
        return np.array(found)

    def _offspring(self, parents: Indices, size: int) -> Indices:
        """Uniform crossover of two; then a few parameters go a choice up or down, or anywhere."""
        rng, n = self._rng, len(self._sizes)
        pairs = rng.integers(len(parents), size=(2, size))
        swap = (rng.random((size, n)) < 0.5) & (rng.random((size, 1)) < _CROSSOVER)
        children = np.where(swap, parents[pairs[0]], parents[pairs[1]])
        steps = rng.choice([-1, 1], size=(size, n))
        near = np.clip(children + steps, 0, self._sizes - 1)
        anywhere = rng.integers(np.broadcast_to(self._sizes, (size, n)))
        mutated = rng.random((size, n)) < np.minimum(1.5 / n, 0.5)
        moved: Indices = np.where(mutated, np.where(rng.random((size, n)) < 0.8, near, anywhere), children)
        return moved

    def _survivors(self, choices: Indices, size: int) -> Indices:
        """Indices of the `size` best: feasible first, then by front, then by crowding distance."""
        values, violation = self.evaluate(choices)
        # Constrained domination: the violation of the infeasible ones comes before all objectives.
        left = np.lexsort((violation,))
        kept: list[int] = [int(i) for i in left[violation[left] > 0]]
        pool = left[violation[left] <= 0]
        chosen: list[int] = []
        while len(pool) and len(chosen) < size:
            on_front = nondominated(values[pool])
            front = pool[on_front]
            crowded = np.argsort(-_crowding(values[front]), kind="stable")
            chosen += [int(i) for i in front[crowded]]
            pool = pool[~on_front]
        return np.array((chosen + kept)[:size], dtype=np.int64)


def _distinct(*parts: Indices) -> Indices:
    """The different rows of all parts, in their order."""
    rows = np.vstack(parts)
    return rows[list({row.tobytes(): i for i, row in reversed(list(enumerate(rows)))}.values())[::-1]]


def _crowding(values: Floats) -> Floats:
    """Crowding distance (rows,): how far a row's neighbours are apart, summed over objectives."""
    distance = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind="stable")
        gaps = np.concatenate(([np.inf], column[order[2:]] - column[order[:-2]], [np.inf]))[: len(order)]
        distance[order] += gaps / max(float(np.ptp(column)), 1e-30)
    return distance


def _is_sum(bound: Floats, tables: list[Table], choices: Indices) -> bool:
    """Whether a constraint is, to rounding, a line in one of the known sums."""
    for table in tables:
        x = np.stack([np.ones(len(choices)), table.of(choices)], axis=1)
        x[:, 1] = (x[:, 1] - x[:, 1].mean()) / max(float(x[:, 1].std()), 1e-30)
        error = bound - x @ np.linalg.lstsq(x, bound, rcond=None)[0]
        if float(np.abs(error).max()) <= 1e-6 * max(float(np.ptp(bound)), 1e-30):
            return True
    return False


class Predictor(Sampler):
    """AMQ's loop: fit, search on the fit, measure one point of the predicted frontier."""

    uses_losses: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        "n_startup_trials": Option(
            int, f"complete trials, baselines and seeds included, before the fit; default: {MIN_STARTUP}", 2
        ),
        "population_size": Option(int, f"assignments in a generation of the search; default: {POPULATION}", 4, 2000),
        "generations": Option(int, f"generations of the search; default: {GENERATIONS}", 1, 1000),
    }

    def make(
        self, seed: int, number: int, n_startup: int, options: Mapping[str, Value], prior: Prior
    ) -> optuna.samplers.BaseSampler:
        return _Predictor(seed, options, prior)
