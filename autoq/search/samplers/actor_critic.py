"""Actor-critic: a small network walks the layers and picks each one's level; learns from all trials.

HAQ (Wang, Liu, Lin, Lin & Han 2019, "HAQ: Hardware-Aware Automated Quantization with Mixed Precision").
An episode is one assignment. At layer k the actor sees oₖ (what the layer is, its share of the size, the
action before) and gives an action aₖ in [0, 1], which stands for the choice ⌊aₖ n⌋ of n. If the result is
too large, layers give up a level one after the other, from the last, until it fits the budget. Actor μ and
critic Q are trained by deterministic policy gradients (Lillicrap et al. 2016, DDPG) on replayed trials:

    critic  minimize (Q(oₖ, aₖ) − R)²,     actor  maximize Q(oₖ, μ(oₖ)).

Exploration is HAQ's: random actions at first, then normal noise around μ, truncated to [0, 1], whose width
decays from trial to trial.

Where we differ, as this is a search for a frontier in hundreds of trials, not thousands:

- Budgets take turns, as in `evolution`; the budget is part of oₖ.
- R is how much better a trial's quality (on the log scale) is than a parabola through all trials expects at
  that size, so that a small model is not punished for being small. Any trial teaches, of a baseline's or
  a seed's proposing too: its budget is then the size that it has.
- HAQ gives every step of an episode its reward and bootstraps, so that R counts as often as layers follow.
  Here R is the return of each step, and the critic needs no target network.
- oₖ has the predicted loss of the layer too, where there is one.

Trials are learned in the order of their numbers, a fixed number of updates each. So the networks are a function
of the trials and the seed, and those that are kept, to learn only what is new at the next ask, change nothing.
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from typing import ClassVar

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from autoq.search.prior import Prior
from autoq.search.samplers import Option, Sampler, Value, trial_seed
from autoq.search.samplers._known import Choices, Floats, Indices, Known, Proposer, Table, Told, taken
from autoq.search.samplers.evolution import BUDGETS

WARMUP, NOISE, DECAY = 20, 0.5, 0.98
_UPDATES, _BATCH = 12, 128  # gradient steps for each trial, transitions in a step
_RATE_ACTOR, _RATE_CRITIC = 1e-3, 3e-3
_ATTEMPTS = 5  # walks tried for an assignment that is new
_MAX_KINDS = 12
_KEPT: OrderedDict[bytes, _Agent] = OrderedDict()
_MAX_KEPT = 16


class _Net:
    """A perceptron with two tanh layers and one linear output, trained by Adam (Kingma & Ba 2015)."""

    def __init__(self, inputs: int, hidden: int, rate: float, rng: np.random.Generator) -> None:
        widths = (inputs, hidden, hidden // 2, 1)
        self.weights = [rng.standard_normal((a, b)) / np.sqrt(a) for a, b in pairwise(widths)]
        self.weights[-1] *= 0.1
        self.biases = [np.zeros(b) for b in widths[1:]]
        self._rate, self._steps = rate, 0
        # First layer first, weights before biases.
        self._parameters = [p for pair in zip(self.weights, self.biases, strict=True) for p in pair]
        self._means = [np.zeros_like(p) for p in self._parameters]
        self._squares = [np.zeros_like(p) for p in self._parameters]

    def __call__(self, x: Floats) -> Floats:
        """Outputs (rows, 1) for inputs (rows, features)."""
        return self._layers(x)[-1]

    def _layers(self, x: Floats) -> list[Floats]:
        layers = [x]
        for w, b in zip(self.weights[:-1], self.biases[:-1], strict=True):
            layers.append(np.tanh(layers[-1] @ w + b))
        return [*layers, layers[-1] @ self.weights[-1] + self.biases[-1]]

    def backward(self, x: Floats, upstream: Floats, update: bool = True) -> Floats:
        """Descend along `upstream`, the gradient with respect to the outputs; returns that of the inputs."""
        layers = self._layers(x)
        gradients: list[Floats] = []
        for i in reversed(range(len(self.weights))):
            gradients += [upstream.sum(axis=0), layers[i].T @ upstream]
            upstream = upstream @ self.weights[i].T
            if i:
                upstream = upstream * (1.0 - layers[i] ** 2)
        if update:
            self._adam(gradients[::-1])
        return upstream

    def _adam(self, gradients: list[Floats]) -> None:
        self._steps += 1
        for p, g, mean, square in zip(self._parameters, gradients, self._means, self._squares, strict=True):
            mean += 0.1 * (g - mean)
            square += 0.001 * (g * g - square)
            unbiased = np.sqrt(square / (1 - 0.999**self._steps)) + 1e-8
            p -= self._rate * (mean / (1 - 0.9**self._steps)) / unbiased


class _Agent:
    """Actor and critic after some trials. Observations end with the budget and the action before."""

    def __init__(self, features: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.actor = _Net(features + 2, 32, _RATE_ACTOR, rng)
        self.critic = _Net(features + 3, 48, _RATE_CRITIC, rng)

    def learn(self, layers: Floats, actions: Floats, fraction: Floats, rewards: Floats, seed: int) -> None:
        """Some updates on replayed trials: actions (trials, layers), budgets (trials,), rewards (trials,)."""
        rng = np.random.default_rng(trial_seed(seed, len(actions)))
        before = np.hstack([np.ones((len(actions), 1)), actions[:, :-1]])
        for _ in range(_UPDATES):
            t, k = rng.integers(len(actions), size=_BATCH), rng.integers(len(layers), size=_BATCH)
            seen = np.hstack([layers[k], fraction[t, None], before[t, k, None]])
            done = np.hstack([seen, actions[t, k, None]])
            error = self.critic(done) - rewards[t, None]
            self.critic.backward(done, error / _BATCH)
            would = _sigmoid(self.actor(seen))
            by_input = self.critic.backward(np.hstack([seen, would]), np.full((_BATCH, 1), -1 / _BATCH), update=False)
            self.actor.backward(seen, by_input[:, -1:] * would * (1 - would))


def _sigmoid(x: Floats) -> Floats:
    squashed: Floats = 0.5 * (1.0 + np.tanh(0.5 * x))
    return squashed


def rewards(merit: Floats, fraction: Floats) -> Floats:
    """How far each trial (trials,) is below what its size lets expect, in standard deviations."""
    x = np.stack([np.ones_like(fraction), fraction, fraction**2], axis=1)
    # Its trend is flat as long as there are few trials.
    b = np.linalg.solve(x.T @ x + np.diag([1e-6, 1e-3, 1e-1]), x.T @ merit)
    below = x @ b - merit
    scaled: Floats = np.clip(below / max(float(below.std()), 1e-9), -3.0, 3.0)
    return scaled


class _ActorCritic(Proposer):
    def propose(self, study: optuna.Study, trial: FrozenTrial, known: Known) -> Choices:
        rng = np.random.default_rng(trial_seed(self._seed, trial.number))
        used, told = taken(study, trial, known.names), Told.of(study, known)
        table = known.budgets[0]
        layers = _layer_features(known, table)
        warmup = self._options.get("warmup")
        episodes = len(told.choices) - (WARMUP if warmup is None else int(warmup))
        agent = self._agent(known, table, told, layers)
        count = int(self._options.get("budgets") or BUDGETS)
        fraction = (trial.number % count + 0.5) / count
        low, high = known.span(table, known.losses)
        width = float(self._options.get("noise") or NOISE) * float(self._options.get("decay") or DECAY) ** episodes
        for attempt in range(_ATTEMPTS):
            # A wider walk where the last was not new.
            spread = np.inf if episodes < 0 else min(width * 2.0**attempt, 1.0)
            walked = _walk(agent, layers, known, fraction, spread, rng)
            choices = lower_to_fit(known, table, low + fraction * (high - low), walked)
            if choices not in used:
                break
        return choices

    def _agent(self, known: Known, table: Table, told: Told, layers: Floats) -> _Agent:
        """The agent that has learned from all told trials, in order; from the nearest that is kept."""
        low, high = known.span(table, known.losses)
        fraction = np.clip((table.of(told.choices) - low) / max(high - low, 1e-30), 0.0, 1.5)
        actions = (told.choices + 0.5) / np.array(known.sizes)
        parts = [repr((self._seed, known.names, known.sizes, low, high)).encode(), layers.tobytes()]
        keys = [hashlib.sha256(b"".join(parts)).digest()]
        for rows in zip(told.choices, told.values, fraction, strict=True):
            keys.append(hashlib.sha256(keys[-1] + b"".join(row.tobytes() for row in rows)).digest())
        start = next((n for n in reversed(range(len(keys))) if keys[n] in _KEPT), 0)
        agent = copy.deepcopy(_KEPT.get(keys[start])) or _Agent(layers.shape[1], self._seed)
        for n in range(start + 1, len(keys)):
            merit = Told(told.choices[:n], told.values[:n], told.bounds[:n]).merit
            agent.learn(layers, actions[:n], fraction[:n], rewards(merit, fraction[:n]), self._seed)
        _KEPT[keys[-1]] = agent
        _KEPT.move_to_end(keys[-1])
        while len(_KEPT) > _MAX_KEPT:
            _KEPT.popitem(last=False)
        return agent


def _layer_features(known: Known, table: Table) -> Floats:
    """What the actor sees of each layer (layers, features), all about in [0, 1]."""
    n = len(known.names)
    last = np.array(known.sizes) - 1
    kinds = [re.sub(r"\d+", "", name) for name in known.names]
    common = list(dict.fromkeys(kinds))[:_MAX_KINDS]
    one_hot = np.array([[kind == other for other in common] for kind in kinds], dtype=np.float64)
    share = table.parts[np.arange(n), last]
    share = share / max(float(np.abs(share).max()), 1e-30)
    lowest = np.log(np.maximum(known.losses[:, 0], 1e-30)) if known.predicted else np.zeros(n)
    loss = (lowest - lowest.min()) / max(float(np.ptp(lowest)), 1e-30)
    return np.column_stack([np.arange(n) / n, share, last / last.max(), loss, one_hot])


def _walk(
    agent: _Agent, layers: Floats, known: Known, fraction: float, spread: float, rng: np.random.Generator
) -> Indices:
    """One episode: choices (layers,), by the actor with noise of width `spread`; infinite: at random."""
    choices = np.zeros(len(layers), dtype=np.int64)
    action = 1.0
    for k, size in enumerate(known.sizes):
        if np.isinf(spread):
            action = float(rng.random())
        else:
            seen = np.concatenate((layers[k], (fraction, action)))[None]
            action = _truncated(float(_sigmoid(agent.actor(seen))[0, 0]), spread, rng)
        choices[k] = min(int(action * size), size - 1)
        action = (choices[k] + 0.5) / size
    return choices


def _truncated(mean: float, spread: float, rng: np.random.Generator) -> float:
    for drawn in rng.normal(mean, spread, size=16):
        if 0.0 <= drawn <= 1.0:
            return float(drawn)
    return mean


def lower_to_fit(known: Known, table: Table, budget: float, walked: Indices) -> Choices:
    """HAQ's way to keep a budget: a level less for one layer after the other, from the last, until it fits.

    A level less is the next lighter choice. Bounds on other sums are kept too, where that can keep them.
    """
    order = np.argsort(table.parts, axis=1, kind="stable")  # level -> choice
    level = np.argmax(order == walked[:, None], axis=1)
    rows = np.arange(len(level))
    kept = [(t, t.limit) for t in known.limits if t.of(order[:, 0]) <= t.limit] + [(table, budget)]
    kept = [(t, bound + 1e-9 * abs(bound)) for t, bound in kept]
    while level.any():
        for k in reversed(rows):
            choices = order[rows, level]
            if all(t.of(choices) <= bound for t, bound in kept):
                return tuple(choices.tolist())
            level[k] = max(level[k] - 1, 0)
    return tuple(order[rows, level].tolist())


class ActorCritic(Sampler):
    """HAQ's agent at several budgets in turn."""

    uses_losses: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        "budgets": Option(int, f"budgets that take turns; default: {BUDGETS}", 1, 1000),
        "warmup": Option(int, f"complete trials before the actor walks; random until then; default: {WARMUP}", 0),
        "noise": Option(float, f"width of the first walks' noise; default: {NOISE}", 1e-6, 1),
        "decay": Option(float, f"factor of the noise's width for each trial; default: {DECAY}", 0.5, 1),
    }

    def make(
        self, seed: int, number: int, n_startup: int, options: Mapping[str, Value], prior: Prior
    ) -> optuna.samplers.BaseSampler:
        return _ActorCritic(seed, options, prior)
