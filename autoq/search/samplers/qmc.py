"""Quasi-random: a scrambled Sobol or Halton sequence; covers the space evenly, learns nothing.

Bergstra & Bengio 2012, "Random Search for Hyper-Parameter Optimization", recommend low-discrepancy
sequences over random draws. Scrambled, because the first Sobol point is a corner of the space.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import optuna

from autoq.search.prior import Prior
from autoq.search.samplers import Option, Sampler, Value, given

MAX_SOBOL_PARAMETERS = 21_201  # the direction numbers of Joe & Kuo 2008 that SciPy has


class QuasiMonteCarlo(Sampler):
    """Optuna's `QMCSampler`. All trials share one seed; the study counts the points that are taken."""

    options: ClassVar[Mapping[str, Option]] = {
        "qmc_type": Option(str, "the sequence; default: sobol", choices=("halton", "sobol")),
        "scramble": Option(bool, "shift the sequence by the seed; default: true"),
    }

    def refuses_space(self, choices: Sequence[int], n_objectives: int) -> str | None:
        if len(choices) > MAX_SOBOL_PARAMETERS:
            return f"it spans at most {MAX_SOBOL_PARAMETERS} parameters and the space has {len(choices)}"
        return None

    def make(
        self, seed: int, number: int, n_startup: int, options: Mapping[str, Value], prior: Prior
    ) -> optuna.samplers.BaseSampler:
        arguments: dict[str, Any] = {"scramble": True, **given(options, *self.options)}
        return optuna.samplers.QMCSampler(seed=seed, warn_independent_sampling=False, **arguments)
