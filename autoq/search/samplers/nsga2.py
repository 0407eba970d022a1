"""NSGA-II: a genetic algorithm for several objectives; fast at any size, best when it starts from good seeds.

Deb, Pratap, Agarwal & Meyarivan 2002, "A fast and elitist multiobjective genetic algorithm: NSGA-II",
as Optuna has it, with constrained domination. From random assignments it is lost on hundreds of
layers; so the baselines and seeds of a study are its first generation. The default population is nine
tenths of them: the generation is then full although a few have failed or still run, and no random
assignments fill it up. The seeds that come after belong to the second generation; none is lost.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import optuna

from autoq.search.prior import Prior
from autoq.search.samplers import Option, Sampler, Value, given, trial_seed

MIN_POPULATION = 20

GENETIC_OPTIONS: Mapping[str, Option] = {
    "population_size": Option(
        int, f"trials per generation; default: 9/10 of baselines and seeds, {MIN_POPULATION} or more", 2
    ),
    "mutation_prob": Option(float, "probability that a child's parameter is drawn anew; default: 1 / parameters", 0, 1),
    "crossover_prob": Option(float, "probability that a child has two parents; default: 0.9", 0, 1),
    "swapping_prob": Option(float, "probability that a parameter comes from the second parent; default: 0.5", 0, 1),
}


def genetic_arguments(seed: int, number: int, n_startup: int, options: Mapping[str, Value]) -> dict[str, Any]:
    """The keyword arguments that Optuna's genetic samplers share."""
    defaults = {"population_size": max(n_startup * 9 // 10, MIN_POPULATION)}
    return {**defaults, **given(options, *GENETIC_OPTIONS), "seed": trial_seed(seed, number)}


class Nsga2(Sampler):
    """Optuna's `NSGAIISampler` with a population that the seeds fill."""

    options: ClassVar[Mapping[str, Option]] = GENETIC_OPTIONS

    def make(
        self, seed: int, number: int, n_startup: int, options: Mapping[str, Value], prior: Prior
    ) -> optuna.samplers.BaseSampler:
        return optuna.samplers.NSGAIISampler(**genetic_arguments(seed, number, n_startup, options))
