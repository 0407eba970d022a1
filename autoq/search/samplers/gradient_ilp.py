"""Gradient ILP: exact solutions of predicted losses at budgets along the range; never learns.

The way of AutoQuantize (NVIDIA's TensorRT Model Optimizer, `mtq.auto_quantize`) and, before it, of
HAWQ-V3 (Yao et al. 2021, "HAWQ-V3: Dyadic Neural Network Quantization"): predict from gradients how much
every layer loses under every choice, and let an integer program pick one choice per layer,

    minimize Σᵢ losses[i][xᵢ]   subject to   Σᵢ parts[i][xᵢ] ≤ budget.

Those solve for the one budget that they are given. Here each trial is another budget: both ends of the
range, then fractions of it in van der Corput's order, shifted by the seed, so that any number of trials is
spread over the range from coarse to fine. Several tables (size, latency) take turns. Bounds on further
sums are met by the greedy repair of `Known.solve`, not exactly.

Without predicted losses a choice of index i is assumed to lose 4**-i, what one bit more saves of the
squared rounding error: a rule that treats all layers alike. Without tables the budget is the sum of all
indices. Where all budgets of a small space give what has been proposed before, losses are multiplied by
log-normal noise.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from autoq.search.prior import Prior
from autoq.search.samplers import Sampler, Value, trial_seed
from autoq.search.samplers._known import Choices, Floats, Known, Proposer, taken

POSITION = "gradient_ilp:position"
_ATTEMPTS = 12  # solutions tried for one that is new; the second half with noise
_NOISE = 0.3  # standard deviation of a noisy log loss


@functools.lru_cache(maxsize=4096)
def place(position: int, seed: int) -> float:
    """The place in [0, 1] of a position: both ends, then van der Corput's sequence shifted by the seed."""
    if position < 2:
        return float(position)
    shift = float(np.random.default_rng(seed).random())
    backwards = f"{position - 1:b}"[::-1]
    return (int(backwards, 2) / float(1 << len(backwards)) + shift) % 1.0


def next_solution(
    study: optuna.Study, trial: FrozenTrial, known: Known, losses: Floats, seed: int, attribute: str
) -> Choices:
    """The solution at the next budget that gives a new one; the trial's `attribute` holds its position."""
    tables, used = known.budgets, taken(study, trial, known.names)
    position = max((t.system_attrs.get(attribute, -1) for t in study.get_trials(deepcopy=False)), default=-1)
    rng = np.random.default_rng(trial_seed(seed, trial.number))
    for attempt in range(_ATTEMPTS):
        position += 1
        table = tables[position % len(tables)]
        low, high = known.span(table, losses)
        noisy = attempt >= _ATTEMPTS // 2 or (low == high and position > 1)
        noise = _NOISE * noisy * rng.standard_normal(losses.shape)
        budget = low + place(position // len(tables), seed) * (high - low)
        choices = known.solve(losses * np.exp(noise), table, budget)
        if choices not in used:
            break
    # The sampler interface of Optuna hands out trials by value; this is how its own samplers attach
    # what they must remember.
    study._storage.set_trial_system_attr(trial._trial_id, attribute, position)
    return choices


class _GradientIlp(Proposer):
    def propose(self, study: optuna.Study, trial: FrozenTrial, known: Known) -> Choices:
        return next_solution(study, trial, known, known.losses, self._seed, POSITION)


class GradientIlp(Sampler):
    """Exact budget solutions of the predicted losses, by `autoq.search.budget`."""

    uses_losses: ClassVar[bool] = True

    def make(
        self, seed: int, number: int, n_startup: int, options: Mapping[str, Value], prior: Prior
    ) -> optuna.samplers.BaseSampler:
        return _GradientIlp(seed, options, prior)
