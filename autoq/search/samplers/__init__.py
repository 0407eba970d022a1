"""Samplers: what proposes the next assignment, one file each.

A plugin builds an Optuna sampler for one trial. It is made afresh for every trial, from the study's
seed and the trial's number, so that no proposal depends on what a process did before: a resumed study
proposes what the uninterrupted one would have. To add one, write `autoq/search/samplers/NAME.py`
with one subclass of `Sampler`; the contract tests enrol it by themselves.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from autoq.errors import UnknownName

if TYPE_CHECKING:
    from optuna.samplers import BaseSampler

    from autoq.search.prior import Prior

Value = int | float | bool | str | None

SLOPES = "slopes"


@dataclass(frozen=True)
class Option:
    """One setting of a sampler: its type, its range (bounds included) or choices, and what it does.

    None always stands for the sampler's own default, which `help` tells.
    """

    kind: type[int] | type[float] | type[bool] | type[str]
    help: str
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] = ()

    def refuses(self, value: Value) -> str | None:
        """Why `value` cannot be used (a clause that goes on after the option's name), or None."""
        if value is None:
            return None
        accepted = (int, float) if self.kind is float else self.kind
        if not isinstance(value, accepted) or (isinstance(value, bool) and self.kind is not bool):
            return f"must be of type {self.kind.__name__} (got {value!r})"
        if self.choices and value not in self.choices:
            return f"must be one of {', '.join(self.choices)} (got {value!r})"
        if not isinstance(value, str):
            # Comparisons written so that NaN is refused.
            if self.low is not None and not value >= self.low:
                return f"must be at least {self.low:g} (got {value!r})"
            if self.high is not None and not value <= self.high:
                return f"must be at most {self.high:g} (got {value!r})"
        return None


class Sampler(abc.ABC):
    """One way of proposing assignments. `options` are the settings that a spec may give.

    `ordinal` says whether parameters are integers to it, indices into choices sorted by bytes, or
    categories without an order. `uses_losses` says whether it looks at the losses that are predicted of
    layers, which take a pass over the calibration data. `slopes` is how many of a study's first seeds and
    proposals are measured with a backward pass (`autoq.calibration.slopes`), which `SLOPES` of a trial's
    system attributes then holds: `{"loss": …, "table": {parameter: [one per choice]}}`.
    """

    options: ClassVar[Mapping[str, Option]] = {}
    ordinal: ClassVar[bool] = True
    uses_losses: ClassVar[bool] = False
    slopes: ClassVar[int] = 0

    def refuses(self, choices: Sequence[int], n_objectives: int, options: Mapping[str, Value]) -> str | None:
        """Why this sampler cannot search (one clause, naming field, value and choices), or None.

        `choices` holds the number of choices of each parameter.
        """
        for name, value in options.items():
            if name not in self.options:
                return str(UnknownName("option", name, self.options))
            if problem := self.options[name].refuses(value):
                return f"option {name!r} {problem}"
        return self.refuses_space(choices, n_objectives)

    def refuses_space(self, choices: Sequence[int], n_objectives: int) -> str | None:
        """Why this sampler cannot search such a space (one clause, naming the rule), or None."""
        return None

    @abc.abstractmethod
    def make(self, seed: int, number: int, n_startup: int, options: Mapping[str, Value], prior: Prior) -> BaseSampler:
        """An Optuna sampler that proposes trial `number` of a study with that `seed`.

        `n_startup` is how many trials (baselines and seeds) the study starts with. `options` were
        accepted by `refuses`. `prior` is what is known beforehand. Constraints that are learned from
        trials need no mention: Optuna finds them on the trials.
        """


def trial_seed(seed: int, number: int) -> int:
    """A 32-bit seed for trial `number` of a study with `seed`; streams of all pairs are independent."""
    import numpy as np

    return int(np.random.SeedSequence((seed, number)).generate_state(1)[0])


def given(options: Mapping[str, Value], *names: str) -> dict[str, Any]:
    """Those of the named options that are set, for passing on as keyword arguments."""
    return {name: options[name] for name in names if options.get(name) is not None}
