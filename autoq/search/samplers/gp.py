"""Gaussian process: the fewest trials on small spaces; at most 30 parameters.

Optuna's `GPSampler`: a Matérn-5/2 process with one length scale per parameter for each objective and
constraint, and log expected (hypervolume) improvement as the acquisition function (Ament et al. 2023,
"Unexpected Improvements to Expected Improvement for Bayesian Optimization"). Fitting costs seconds
and grows with the cube of the trials.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import optuna

from autoq.search.prior import Prior
from autoq.search.samplers import Option, Sampler, Value, given, trial_seed

MAX_PARAMETERS = 30
MIN_STARTUP = 10


class GaussianProcess(Sampler):
    """Optuna's `GPSampler`; it starts to model after the study's seeds."""

    options: ClassVar[Mapping[str, Option]] = {
        # Its model needs a trial to fit.
        "n_startup_trials": Option(
            int, f"complete trials before the model is used; default: baselines and seeds, {MIN_STARTUP} or more", 1
        ),
    }

    def refuses_space(self, choices: Sequence[int], n_objectives: int) -> str | None:
        if len(choices) > MAX_PARAMETERS:
            return (
                f"it models at most {MAX_PARAMETERS} parameters and the space has {len(choices)}; "
                "search fewer layers or choose nsga2 or tpe"
            )
        return None

    def make(
        self, seed: int, number: int, n_startup: int, options: Mapping[str, Value], prior: Prior
    ) -> optuna.samplers.BaseSampler:
        arguments: dict[str, Any] = {"n_startup_trials": max(n_startup, MIN_STARTUP), **given(options, *self.options)}
        return optuna.samplers.GPSampler(seed=trial_seed(seed, number), warn_independent_sampling=False, **arguments)
