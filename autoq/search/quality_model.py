"""The model of quality over assignments: predicted losses per layer, corrected by all that was measured.

With a predicted loss s of every layer l and choice c (`Prior.losses`), an assignment x is expected to lose

    log loss(x) = a + b · log p(x) + i(x) + e(x)
    p(x) = Σ_l s[l, x_l] · exp(θ_kind(l) + θ_depth(l) + θ_level(x_l) + θ_l)

To second order losses of layers add up, so with nothing known θ = 0, a = 0, b = 1. Measured whole models
deviate in ways that repeat: layers of one kind or depth matter more than their own perturbation tells,
because what they pass on is perturbed too, and everything matters more the lower the bits (b > 1). θ, a
and b get Gaussian priors and are fitted by Gauss-Newton steps: a Bayesian linear model, linearized at its
own mode (MacKay 1992). θ_depth are Legendre polynomials of a layer's place. e is a Gaussian process of
exponential covariance over what is left (Rasmussen & Williams 2006, algorithm 2.1).

A slope (`autoq.search.interactions`) is one equation per layer, where a trial alone gives one in all: ½ P[l, x_l]
is what layer l answers for at x. Its noise comes from the other layers' perturbations, of variance ∝ loss / s
relative to s. What layers do to each other around it is i, a correction that is known beforehand.
"""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import cho_solve, solve_triangular

from autoq.search.interactions import Context, Interactions
from autoq.search.layers import Layers

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

_KIND_SD, _LAYER_SD, _LEVEL_SD = 0.3, 0.3, 0.15  # of log factors, where losses were predicted from the model
_ASSUMED_SD = 3.0  # times as much where they were only assumed
_OFFSET_SD, _POWER_SD = 3.0, 0.3
_LEAST_NOISE = 0.02  # standard deviation of a log loss that no fit goes below
_STEPS = 3
_PROCESS_TRIALS = 256
_BROKEN = 0.3  # least residual of a log loss, and _TAIL times the usual one, that counts as a broken trial's
_TAIL = 6.0


class QualityModel:
    """Fitted to trials: `choices` (k, n) with their `losses` (k,), and to slopes. Costs milliseconds.

    Losses are positive and less is better; an infinite one counts as a little more than the worst finite.
    """

    def __init__(
        self, layers: Layers, choices: Indices, losses: Floats, interactions: Interactions | None = None
    ) -> None:
        self.layers, self.interactions = layers, interactions
        self.slopes = () if interactions is None else interactions.slopes
        self._choices = choices.reshape(-1, len(layers.names)).astype(np.int64)
        finite = losses[np.isfinite(losses)]
        worst = 2 * float(finite.max()) if finite.size else 1.0
        log = np.log(np.clip(np.where(np.isfinite(losses), losses, worst), 1e-300, None))
        # What the sum over layers has to explain.
        self._log = log if interactions is None else log - interactions.excess_of_told(self._choices)
        self._prior_sd = self._scales()
        self._mode = np.zeros(len(self._prior_sd))
        self._mode[-1] = 1.0
        self._centre = 0.0
        self.noise = 0.1
        self._fit()
        self._process = _Process(self, self._choices, self._log)

    # -- the parametric part ----------------------------------------------------------------------

    def _scales(self) -> Floats:
        wide = 1.0 if self.layers.known else _ASSUMED_SD
        levels = self.layers.loss.shape[1]
        features = self.layers.basis.shape[1]
        sizes = [(features, _KIND_SD), (levels, _LEVEL_SD), (len(self.layers.names), _LAYER_SD)]
        spread = [np.full(count, sd * wide) for count, sd in sizes]
        return np.concatenate([*spread, [_OFFSET_SD * wide, _POWER_SD]])

    def _factors(self, theta: Floats) -> Floats:
        """exp(B θ) for every parameter and choice (n, choices)."""
        features, levels = self.layers.basis.shape[1], self.layers.loss.shape[1]
        kind, level, own = np.split(theta[:-2], [features, features + levels])
        exponent = (self.layers.basis @ kind + own)[:, None] + level
        factors: Floats = np.exp(np.clip(exponent, -6.0, 6.0))
        return factors

    def _design(self, shares: Floats, choices: Indices) -> Floats:
        """Σ_l shares[k, l] B[l, x_l]: derivatives of log p (k, parameters of θ)."""
        levels, rows = self.layers.loss.shape[1], len(choices)
        place = choices + levels * np.arange(rows)[:, None]
        level = np.bincount(place.ravel(), shares.ravel(), levels * rows).reshape(rows, levels)
        return np.concatenate([shares @ self.layers.basis, level, shares], 1)

    def _fit(self) -> None:
        precision = np.diag(self._prior_sd**-2.0)
        start = self._mode.copy()
        for _ in range(_STEPS):
            left, right = precision.copy(), precision @ start
            if len(self._log):
                self._add_trials(left, right)
            if self.slopes:
                self._add_slopes(left, right)
            self._factor: Floats = np.asarray(np.linalg.cholesky(left), dtype=np.float64)
            self._mode = cho_solve((self._factor, True), right)
        self.cost = np.where(np.isfinite(self.layers.loss), self.layers.loss * self._factors(self._mode), np.inf)

    def _add_trials(self, left: Floats, right: Floats) -> None:
        parts = self.layers.pick(self.layers.loss * self._factors(self._mode), self._choices)
        total = np.maximum(parts.sum(1), self.layers.least)
        log = np.log(total)
        self._centre = float(np.median(log))
        power = self._mode[-1]
        design = self._design(parts / total[:, None], self._choices) * power
        design = np.concatenate([design, np.ones((len(log), 1)), (log - self._centre)[:, None]], 1)
        residual = self._log - (self._mode[-2] + self._centre + power * (log - self._centre))
        self.noise = float(np.clip(np.median(np.abs(residual)) * 1.4826, _LEAST_NOISE, 1.0))
        # A mode that fits every trial says nothing of the noise: a few trials count as if they were rougher.
        variance = self.noise**2 + 0.1**2 / len(log)
        left += design.T @ design / variance
        # Heavy tails: one broken candidate must not bend the model for all others.
        bounded = np.clip(residual, -4 * np.sqrt(variance), 4 * np.sqrt(variance))
        right += design.T @ (bounded + design @ self._mode) / variance

    def _add_slopes(self, left: Floats, right: Floats) -> None:
        choices = np.stack([s.choices for s in self.slopes])
        parts, factors = (
            self.layers.pick(self.layers.loss, choices),
            self.layers.pick(self._factors(self._mode), choices),
        )
        answered = 0.5 * np.stack([self.layers.pick(s.table, s.choices) for s in self.slopes])
        ratio = answered / np.where(parts > 0, parts, 1.0)
        trust = parts / np.array([s.loss for s in self.slopes])[:, None]
        scale = (ratio * trust).sum(1) / (factors * trust).sum(1)
        residual = ratio / np.where(scale > 0, scale, 1.0)[:, None] - factors
        noise = (residual**2 * trust).sum(1) / (parts > 0).sum(1)
        trust *= np.where(scale > 0, 1 / np.maximum(noise, 1e-12), 0.0)[:, None]
        # An equation holds the features of one layer only, so their products are sums over equations.
        levels, basis = self.layers.loss.shape[1], self.layers.basis
        kind, level, own = np.split(self._mode[:-2], [basis.shape[1], basis.shape[1] + levels])
        mode = (basis @ kind + own) + level[choices]
        weight, wanted = np.zeros((2, *self.layers.loss.shape))
        place = (np.broadcast_to(np.arange(len(basis)), choices.shape), choices)
        np.add.at(weight, place, trust * factors**2)
        np.add.at(wanted, place, trust * factors * (residual + factors * mode))
        k, o, sums = basis.shape[1], basis.shape[1] + levels, weight.sum(1)  # kinds and depths, levels, own
        left[:k, :k] += (basis.T * sums) @ basis
        for rows, columns, block in (
            (slice(0, k), slice(k, o), basis.T @ weight),
            (slice(0, k), slice(o, -2), basis.T * sums),
            (slice(k, o), slice(o, -2), weight.T),
        ):
            left[rows, columns] += block
            left[columns, rows] += block.T
        diagonal = np.arange(k, len(left) - 2)
        left[diagonal, diagonal] += np.concatenate([weight.sum(0), sums])
        right[:-2] += np.concatenate([basis.T @ wanted.sum(1), wanted.sum(0), wanted.sum(1)])

    def _parametric(self, choices: Indices) -> tuple[Floats, Floats]:
        """Mean and variance (k,) of the log loss, without the process."""
        parts = self.layers.pick(self.cost, choices)
        total = np.maximum(parts.sum(1), self.layers.least)
        log = np.log(total) - self._centre
        design = self._design(parts / total[:, None], choices) * self._mode[-1]
        design = np.concatenate([design, np.ones((len(log), 1)), log[:, None]], 1)
        spread = solve_triangular(self._factor, design.T, lower=True, check_finite=False)
        return self._mode[-2] + self._centre + self._mode[-1] * log, (spread**2).sum(0)

    # -- what a sampler asks ----------------------------------------------------------------------

    def predict(self, choices: Indices) -> tuple[Floats, Floats]:
        """Mean and standard deviation (k,) of the log loss of assignments (k, n)."""
        choices = choices.reshape(-1, len(self.layers.names))
        mean, variance = self._parametric(choices)
        shift, left = self._process.predict(choices)
        if self.interactions is not None:
            shift = shift + self.interactions.excess(choices)
        return mean + shift, np.sqrt(variance * left + self._process.variance * left + 1e-12)

    def sample(self, rng: np.random.Generator, heat: float = 1.0) -> Floats:
        """Additive losses (n, choices) under a draw from the posterior; `heat` scales its spread."""
        draw = solve_triangular(self._factor, rng.standard_normal(len(self._mode)), lower=True, trans="T")
        return np.where(
            np.isfinite(self.layers.loss), self.layers.loss * self._factors(self._mode + heat * draw), np.inf
        )

    def own(self, near: Indices, cost: Floats | None = None) -> Floats:
        """Additive losses (n, choices) of assignments about as good as `near` (n,).

        `cost` are those of a draw (`sample`); by default the fitted ones, which slopes know better near them.
        """
        cost = self.cost if cost is None else cost
        if self.interactions is None:
            return cost
        return self.interactions.own(self.interactions.place(near)) * (cost / self._usable)

    def context(self, near: Indices, cost: Floats | None = None) -> Context:
        """The loss of assignments about as good as `near` (n,); `cost` as in `own`."""
        own = self.own(near, cost)
        if self.interactions is None:
            return Context(own, np.zeros_like(own), 0.0)
        return self.interactions.around(self.interactions.anchor(near), own)

    @cached_property
    def _usable(self) -> Floats:
        """The fitted additive losses, 1 where there are none: what a draw is divided by."""
        divisor: Floats = np.where((self.cost > 0) & np.isfinite(self.cost), self.cost, 1.0)
        return divisor


class _Process:
    """The Gaussian process over what the parametric part leaves of some trials' log losses."""

    def __init__(self, model: QualityModel, choices: Indices, log: Floats) -> None:
        self._model = model
        self.variance = 0.0
        self._choices = choices[-_PROCESS_TRIALS:]
        self._weights = np.zeros(0)
        if len(log) < 4:
            return
        log = log[-_PROCESS_TRIALS:]
        mean, _ = model._parametric(self._choices)
        residual = log - mean
        # One broken trial must not make all others uncertain.
        usual = 1.4826 * float(np.median(np.abs(residual)))
        residual = np.clip(residual, -max(_BROKEN, _TAIL * usual), max(_BROKEN, _TAIL * usual))
        cost = np.where(np.isfinite(model.cost), model.cost, np.nan)
        floor = np.nanmin(np.where(cost > 0, cost, np.nan)) if (cost > 0).any() else 1e-12
        parts = model.layers.pick(model.cost, self._choices)
        share = (parts / np.maximum(parts.sum(1, keepdims=True), 1e-300)).mean(0)
        self._place = np.log(np.maximum(np.nan_to_num(cost), floor)) / np.log(4.0) * np.sqrt(share)[:, None]
        points = model.layers.pick(self._place, self._choices)
        distance = _distance(points, points)
        typical = float(np.median(distance[distance > 0])) if (distance > 0).any() else 1.0
        power = float((residual**2).mean())
        best = -np.inf
        for length in (0.3 * typical, typical, 3 * typical):
            shape = np.exp(-distance / length)
            for share_explained in (0.1, 0.5, 0.9, 0.99):
                covariance = power * (share_explained * shape + (1 - share_explained) * np.eye(len(shape)))
                covariance[np.diag_indices_from(covariance)] += 1e-10 + 1e-9 * power
                try:
                    factor = np.linalg.cholesky(covariance)
                except np.linalg.LinAlgError:
                    continue
                white = solve_triangular(factor, residual, lower=True, check_finite=False)
                evidence = -0.5 * float(white @ white) - float(np.log(np.diag(factor)).sum())
                if evidence > best:
                    best, self.variance, self._length = evidence, power * share_explained, length
                    self._factor, self._points = factor, points
                    self._weights = solve_triangular(factor, white, lower=True, trans="T", check_finite=False)

    def predict(self, choices: Indices) -> tuple[Floats, Floats]:
        """The shift of the mean and the share of variance that is left (k,)."""
        if not self._weights.size or self.variance == 0.0:
            return np.zeros(len(choices)), np.ones(len(choices))
        points = self._model.layers.pick(self._place, choices)
        across = np.exp(-_distance(points, self._points) / self._length) * self.variance
        spread = solve_triangular(self._factor, across.T, lower=True, check_finite=False)
        return across @ self._weights, np.clip(1 - (spread**2).sum(0) / self.variance, 1e-6, 1.0)


def _distance(a: Floats, b: Floats) -> Floats:
    square = (a**2).sum(1)[:, None] + (b**2).sum(1) - 2 * a @ b.T
    distance: Floats = np.sqrt(np.maximum(square, 0.0))
    return distance
