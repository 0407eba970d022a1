"""Random: uniform and independent draws; the yardstick for all others."""

from __future__ import annotations

from collections.abc import Mapping

import optuna

from autoq.search.prior import Prior
from autoq.search.samplers import Sampler, Value, trial_seed


class Random(Sampler):
    """Optuna's `RandomSampler`."""

    def make(
        self, seed: int, number: int, n_startup: int, options: Mapping[str, Value], prior: Prior
    ) -> optuna.samplers.BaseSampler:
        return optuna.samplers.RandomSampler(seed=trial_seed(seed, number))
