"""TPE: models good and bad trials by kernel densities; sees trials that are still running.

Bergstra, Bardenet, Bengio & Kégl 2011, "Algorithms for Hyper-Parameter Optimization", and Ozaki et al.
2022, "Multiobjective Tree-structured Parzen Estimator", as Optuna has them. Set up for many parameters
and parallel workers: one joint density (`multivariate`: twenty times faster at 200 parameters than one
per parameter, with several objectives) and running trials counted among the bad ones (constant liar).
Choices are categories to it: over six ordered choices its kernels are too wide to tell neighbours apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import optuna

from autoq.search.prior import Prior
from autoq.search.samplers import Option, Sampler, Value, given, trial_seed

MIN_STARTUP = 10


class Tpe(Sampler):
    """Optuna's `TPESampler`, multivariate; it starts to model after the study's seeds."""

    ordinal: ClassVar[bool] = False
    options: ClassVar[Mapping[str, Option]] = {
        "n_startup_trials": Option(
            int, f"complete trials before the model is used; default: baselines and seeds, {MIN_STARTUP} or more", 0
        ),
        "n_ei_candidates": Option(int, "candidates that the model ranks for each proposal; default: 24", 1, 100_000),
        "constant_liar": Option(bool, "keep away from running trials; default: true"),
    }

    def make(
        self, seed: int, number: int, n_startup: int, options: Mapping[str, Value], prior: Prior
    ) -> optuna.samplers.BaseSampler:
        arguments: dict[str, Any] = {"n_startup_trials": max(n_startup, MIN_STARTUP), **given(options, *self.options)}
        return optuna.samplers.TPESampler(multivariate=True, seed=trial_seed(seed, number), **arguments)
