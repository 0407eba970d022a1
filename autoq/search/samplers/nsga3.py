"""NSGA-III: like NSGA-II, spreading along reference directions; for four objectives and more.

Deb & Jain 2014, "An Evolutionary Many-Objective Optimization Algorithm Using Reference-Point-Based
Nondominated Sorting Approach, Part I", as Optuna has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import optuna

from autoq.search.prior import Prior
from autoq.search.samplers import Option, Sampler, Value, given
from autoq.search.samplers.nsga2 import GENETIC_OPTIONS, genetic_arguments


class Nsga3(Sampler):
    """Optuna's `NSGAIIISampler` with a population that the seeds fill."""

    options: ClassVar[Mapping[str, Option]] = {
        **GENETIC_OPTIONS,
        "dividing_parameter": Option(int, "divisions between reference points on each axis; default: 3", 1, 100),
    }

    def make(
        self, seed: int, number: int, n_startup: int, options: Mapping[str, Value], prior: Prior
    ) -> optuna.samplers.BaseSampler:
        arguments = genetic_arguments(seed, number, n_startup, options)
        return optuna.samplers.NSGAIIISampler(**arguments, **given(options, "dividing_parameter"))
