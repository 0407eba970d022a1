"""What layers do to each other: the loss around an assignment, from backward passes at quantized models.

One backward pass at an assignment a gives for every layer and choice P[l, c] = ⟨∂loss/∂W_l, W_l,c − W_l⟩. If
the loss is ½ |Σ_l u_l|², quadratic in the perturbations u of outputs, then P[l, c] = ⟨u_l,c , U⟩ with U = Σ_m u_m,a.
Two things follow from it.

*Own losses.* ½ P[l, a_l] sums to the loss. Where losses just added up it would be the predicted s[l, a_l]; where
much is perturbed already, layers of some kinds and depths lose more. Their factors are a Bayesian linear
regression of ½ P / s (MacKay 1992), a little stronger the closer a place is in predicted loss: t = s · factor.

*What others do.* r[l, c] = P[l, c] − 2 t[l, c] (the second term at c = a_l only) is what the choice meets of the
other layers' perturbations: as cosines, E = r / (2 √(t[l, c] T)) with T = Σ_l t[l, a_l]. They are as large as
the own losses, of both signs, and as measured on few tokens half of them is noise. Two assignments have as much
of them in common as they have choices in common, so E is a Gaussian process over assignments (Rasmussen &
Williams 2006) of covariance κ(x, y) = Σ_l √(t_x t_y / (T_x T_y)) over layers with the same choice, and noise
that is relatively larger where the loss is small. Its ratio to the signal is chosen by evidence, for all layers and
then for each kind: on SmolLM2 at 6 bits the cosines of a `gate_proj` are nothing but noise, those of a `v_proj` not.

With q what P at a is after that, perturbations are measured along U, and across it only predicted. So

    loss(x) ≈ Σ_{l: x_l ≠ a_l} (t[l, x_l] + t[l, a_l]) + (Σ_l q[l, x_l])² / (2 Σ_l q[l, a_l])

which has the loss and the gradient of a, costs whatever leaves it, and knows that choices which all undo U
overshoot together: the BFGS update of the additive model (Nocedal & Wright 2006, section 6.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from autoq.search.layers import Layers

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

_FACTOR_SD, _COMMON_SD = 0.2, 0.05  # of own factors: of a kind or a polynomial in depth; of all, beside their mean
_NEARBY = 0.5  # distance in log predicted loss at which a slope's own factors count for e^-1/2
_UNKNOWN = 0.02  # weight of what was predicted beside them
# A slope is an anchor up to this distance in log predicted loss, and from this covariance on.
_SAME_PLACE, _SAME_CHOICES = 0.12, 0.5
_NOISES = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # of a slope, relative to the signal, at a loss of `_NOISE_LOSS`
_NOISE_LOSS, _NOISE_POWER = 0.3, 0.35  # and by how much more where the loss is less
_USUAL_NOISE, _NOISE_PULL = 2.0, 0.08  # what it is taken for where slopes tell nothing, and how strongly per entry
_KIND_SD = 1.0  # of the log of a kind's noise around that of all
_MOST = 0.5  # log of the ratio to the sum of own losses, beyond which nothing is believed


@dataclass(frozen=True, eq=False)
class Slopes:
    """What one backward pass found at the assignment `choices` (n,): `loss` there and `table` P (n, choices)."""

    choices: Indices
    loss: float
    table: Floats


@dataclass(frozen=True, eq=False)
class Context:
    """The loss of assignments near some place: Σ `cost`[l, x_l] + ½ `weight` (Σ `direction`[l, x_l])²."""

    cost: Floats
    direction: Floats
    weight: float


class Interactions:
    """Fitted to at least one slope. `layers` hold the predicted losses s."""

    def __init__(self, layers: Layers, slopes: Sequence[Slopes]) -> None:
        self.layers, self.slopes = layers, slopes
        self._choices = np.stack([s.choices for s in slopes])
        parts = layers.pick(layers.loss, self._choices)
        self._shares = parts / parts.sum(1, keepdims=True)
        self._places = np.log(parts.sum(1))
        answered = np.stack([0.5 * layers.pick(s.table, s.choices) for s in slopes])
        self._answered = answered / parts.sum(1, keepdims=True)
        self._own = [self.own(place) for place in self._places]  # of each slope's place
        cosines, roots = [], []
        for s, own in zip(slopes, self._own, strict=True):
            there = layers.pick(own, s.choices)
            others = s.table.copy()
            others[np.arange(len(others)), s.choices] -= 2 * there
            cosines.append(_over(others, 2 * np.sqrt(np.where(np.isfinite(own), own, 0.0) * there.sum())))
            roots.append(_roots(there))
        self._cosines, self._roots = np.stack(cosines), np.stack(roots)  # (slopes, n, choices), (slopes, n)
        losses = np.array([s.loss for s in slopes])
        self._smoothing = self._fit((losses / _NOISE_LOSS) ** -_NOISE_POWER)
        self._contexts: dict[int, Context] = {}
        self._told: dict[bytes, float] = {}

    def place(self, choices: Indices) -> float:
        """The log predicted loss of an assignment (n,)."""
        return float(np.log(max(self.layers.pick(self.layers.loss, choices).sum(), 1e-300)))

    def own(self, place: float) -> Floats:
        """t (n, choices): what layers lose by themselves where others lose exp(`place`) as predicted."""
        near = np.exp(-0.5 * ((self._places - place) / _NEARBY) ** 2)
        near = np.append(near, _UNKNOWN) / (near.sum() + _UNKNOWN)
        share = near[:-1] @ self._shares + near[-1] * self._shares.mean(0)
        ratio = _over(near[:-1] @ self._answered + near[-1] * self._shares.mean(0), share)
        mean = max(float(ratio @ share), 0.2)
        trust = share * len(share)
        basis = np.concatenate([np.ones((len(share), 1)), self.layers.basis], 1)
        spread = np.concatenate([[_COMMON_SD], np.full(basis.shape[1] - 1, _FACTOR_SD)])
        excess, noise = ratio / mean - 1, 1.0
        factor = np.ones(len(share))
        for _ in range(3):
            left = (basis.T * (trust / noise)) @ basis + np.diag(spread**-2.0)
            factor = 1 + basis @ np.linalg.solve(left, basis.T @ (trust / noise * excess))
            noise = max(float(((ratio / mean - factor) ** 2 * trust).mean()), 1e-6)
        own: Floats = self.layers.loss * (mean * np.clip(factor, 0.3, 3.0))[:, None]
        return own

    def _fit(self, noises: Floats) -> Floats:
        """What weighs cosines when they are smoothed: (K + λ diag(noises))⁻¹ for each kind (kinds, slopes, slopes)."""
        covariance = self._common(self._choices, self._roots)
        inverses: Floats = np.linalg.inv(np.stack([covariance + np.diag(noise * noises) for noise in _NOISES]))
        logs = np.log(_NOISES)
        # Of one slope alone nothing can be told of noise.
        everywhere = np.ones(len(self.layers.names), dtype=np.bool_)
        evidence = self._evidence(everywhere, inverses)
        evidence -= 0.5 * self._entries(everywhere) * ((logs - np.log(_USUAL_NOISE)) * _NOISE_PULL) ** 2
        usual = logs[int(evidence.argmax())]
        found = []
        for kind in range(int(self.layers.kinds.max()) + 1):
            evidence = self._evidence(self.layers.kinds == kind, inverses)
            evidence -= 0.5 * ((logs - usual) / _KIND_SD) ** 2
            found.append(inverses[int(evidence.argmax())])
        return np.stack(found)

    def _entries(self, some: NDArray[np.bool_]) -> int:
        return int(np.isfinite(self.layers.loss[some]).sum())

    def _evidence(self, some: NDArray[np.bool_], inverses: Floats) -> Floats:
        """Of some layers' cosines under each (K + noise)⁻¹, whatever the signal's variance is."""
        flat = self._cosines[:, some].reshape(len(self._cosines), -1)
        gram, entries = flat @ flat.T, self._entries(some)
        powers = np.array([(inverse * gram).sum() for inverse in inverses]) / (entries * len(gram))
        dets = np.array([-np.linalg.slogdet(inverse)[1] for inverse in inverses])
        found: Floats = -0.5 * entries * (dets + len(gram) * np.log(np.maximum(powers, 1e-300)))
        return found

    def _common(self, choices: Indices, roots: Floats) -> Floats:
        """κ of assignments (k, n), whose layers have `roots` (k, n), and all slopes (k, slopes)."""
        each = zip(self._choices, self._roots, strict=True)
        return np.stack([((choices == c) * r * roots).sum(1) for c, r in each], 1)

    def smoothed(self, choices: Indices, own: Floats) -> Floats:
        """q (n, choices) at an assignment (n,), with own losses `own`."""
        there = self.layers.pick(own, choices)
        weights = self._common(choices[None], _roots(there)[None])[0] @ self._smoothing  # (kinds, slopes)
        cosines = np.einsum("ns,snc->nc", weights[self.layers.kinds], self._cosines)
        found: Floats = 2 * np.sqrt(np.where(np.isfinite(own), own, 0.0) * there.sum()) * cosines
        found[np.arange(len(found)), choices] += 2 * there
        return found

    def anchor(self, near: Indices) -> Indices:
        """Where to look from for assignments about as good as `near`: the latest slope there, or `near` itself."""
        place = self.place(near)
        common = self._common(near[None], _roots(self.layers.pick(self.own(place), near))[None])[0]
        close = np.flatnonzero((common >= _SAME_CHOICES) & (np.abs(self._places - place) <= _SAME_PLACE))
        return self._choices[close[-1]] if len(close) else near

    def excess_of_told(self, choices: Indices) -> Floats:
        """`excess` of trials (k, n), which are asked for again and again."""
        rows = [row.tobytes() for row in choices]
        new = [i for i, row in enumerate(rows) if row not in self._told]
        if new:
            self._told.update(zip((rows[i] for i in new), self.excess(choices[new]).tolist(), strict=True))
        return np.array([self._told[row] for row in rows])

    def excess(self, choices: Indices) -> Floats:
        """Log ratio (k,) of the loss of assignments (k, n) to the sum of their own losses.

        By the slope with which each has most in common, and as far as it has: the square of their covariance.
        """
        common = self._common(choices, _roots(self.layers.pick(self.layers.loss, choices)))
        nearest = common.argmax(1)
        found = np.zeros(len(choices))
        for slope in np.unique(nearest).tolist():
            some, own = nearest == slope, self._own[slope]
            if slope not in self._contexts:
                self._contexts[slope] = self.around(self._choices[slope], own)
            context = self._contexts[slope]
            turned = self.layers.pick(context.direction, choices[some]).sum(1)
            loss = self.layers.pick(context.cost, choices[some]).sum(1) + 0.5 * context.weight * turned**2
            alone = self.layers.pick(own, choices[some]).sum(1)
            ratio = np.log(np.maximum(loss, 1e-300) / np.maximum(alone, 1e-300))
            found[some] = np.clip(ratio, -_MOST, _MOST) * common[some, slope] ** 2
        return found

    def around(self, choices: Indices, own: Floats) -> Context:
        """The loss around an assignment (n,), with own losses `own`."""
        direction = self.smoothed(choices, own)
        rows = np.arange(len(choices))
        there = self.layers.pick(own, choices)
        cost = own + there[:, None]
        cost[rows, choices] = 0.0
        total = float(direction[rows, choices].sum())
        if total <= 0.1 * float(there.sum()):  # slopes that say a perturbed model is better than the model itself
            return Context(own, np.zeros_like(own), 0.0)
        return Context(cost, direction, 1 / total)


def _roots(losses: Floats) -> Floats:
    """√(t / T) of layers (…, n)."""
    roots: Floats = np.sqrt(losses / np.maximum(losses.sum(-1, keepdims=True), 1e-300))
    return roots


def _over(a: Floats, b: Floats) -> Floats:
    """a / b, 0 where nothing is divided by: choices that lose nothing meet nothing."""
    quotient: Floats = np.where(b > 0, a / np.where(b > 0, b, 1.0), 0.0)
    return quotient
