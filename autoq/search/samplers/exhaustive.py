"""Exhaustive: every assignment of a small space once, in random order; ends when all are done.

Random order, so that a study that is stopped early has seen an even part of the space.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial

from autoq.search.prior import Prior
from autoq.search.samplers import Sampler, Value

MAX_ASSIGNMENTS = 100_000
POSITION = "exhaustive:position"


@functools.lru_cache(maxsize=4)
def _order(seed: int, size: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).permutation(size)


class _Enumeration(optuna.samplers.BaseSampler):
    """Walks a seeded permutation of all assignments; each trial's system attributes hold its place."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return dict(optuna.search_space.intersection_search_space(study.get_trials(deepcopy=False)))

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        sizes = []
        for distribution in search_space.values():
            assert isinstance(distribution, IntDistribution) and distribution.low == 0, distribution
            sizes.append(distribution.high + 1)
        order = _order(self._seed, math.prod(sizes))
        position, taken = -1, set()
        for other in study.get_trials(deepcopy=False):
            if POSITION in other.system_attrs:
                position = max(position, other.system_attrs[POSITION])
            elif other.number != trial.number:
                taken.add(int(np.ravel_multi_index([other.params[name] for name in search_space], sizes)))
        position += 1
        while position < len(order) and int(order[position]) in taken:
            position += 1
        assert position < len(order), "every assignment has been proposed"
        # The sampler interface of Optuna hands out trials by value; this is how its own samplers
        # attach what they must remember.
        study._storage.set_trial_system_attr(trial._trial_id, POSITION, position)
        places = np.unravel_index(int(order[position]), sizes)
        return {name: int(place) for name, place in zip(search_space, places, strict=True)}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"parameter {param_name!r} is not part of the space")


class Exhaustive(Sampler):
    """Enumerates spaces of at most 100,000 assignments; a trial that failed is not tried again."""

    def refuses_space(self, choices: Sequence[int], n_objectives: int) -> str | None:
        size = math.prod(choices)
        if size > MAX_ASSIGNMENTS:
            shown = f"{size:,}" if size < 10**15 else f"about 10^{round(math.log10(size))}"
            return f"it enumerates at most {MAX_ASSIGNMENTS:,} assignments and the space has {shown}"
        return None

    def make(
        self, seed: int, number: int, n_startup: int, options: Mapping[str, Value], prior: Prior
    ) -> optuna.samplers.BaseSampler:
        return _Enumeration(seed)
