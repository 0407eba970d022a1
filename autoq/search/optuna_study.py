"""Asking Optuna for proposals and telling it results, with all that lasts kept elsewhere.

The Optuna study lives in memory; the truth is the store's rows, from which `AskTell.restore` builds it
again. A proposal depends only on the trials told so far, their persisted attributes, the seed and the
trial's number: for every trial a fresh sampler is made from (seed, number), and what samplers
remember beyond trials (a trial's generation, a generation's parents, the next quasi-random point) is
in `attrs` and `study_attrs`, which the store keeps. So a resumed study goes on exactly as the
uninterrupted one would have.

A parameter is the index, 0 to n-1, into choices that are sorted by bytes. A sampler gets it as an
integer or as a category, whichever serves it better. On an additive toy of this tool's shape (log KL
against bits, 6 choices; hypervolume, means of 3 seeds) the Gaussian process needs the order (14.8
against 11.7 after 40 trials on 8 parameters), NSGA-II does not care (10.9 and 11.0 after 300 on 24),
and TPE is lost with it (10.1, random search 10.3) and does well without (12.4).
`benchmarks/controller_overhead.py --quality` prints the comparison.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import math
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.samplers import BaseGASampler, BaseSampler
from optuna.storages import InMemoryStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from autoq import plugins
from autoq.errors import BadInput
from autoq.objectives import Direction
from autoq.search.prior import Prior
from autoq.search.samplers import Sampler, Value

State = Literal["running", "complete", "failed"]

# Above this many assignments a study cannot run out of them, so they are not counted.
COUNTED_ASSIGNMENTS = 1_000_000


@dataclass(frozen=True)
class Row:
    """A stored trial as the sampler needs it: choice indices, state, results and attributes.

    `values` has one entry per objective where `state` is complete, else it is None; `constraints` has
    one per constraint (at most 0 where it holds). `attrs` is what `AskTell.attrs` gave.
    """

    number: int
    indices: Sequence[int]
    state: State
    values: Sequence[float] | None = None
    constraints: Sequence[float] = ()
    attrs: Mapping[str, Any] = field(default_factory=dict)


class AskTell:
    """Proposes choice indices for a fixed list of parameters and learns from results.

    Trials are numbered 0, 1, 2 …, in the order in which they are asked for; an `ask` or `ask_fixed`
    whose trial was not stored is asked for again after `restore`. Not safe for use by several threads.
    """

    def __init__(
        self,
        parameters: Sequence[tuple[str, int]],
        directions: Sequence[Direction],
        sampler: str,
        seed: int,
        options: Mapping[str, Value] | None = None,
        n_constraints: int = 0,
        n_startup: int = 0,
        prior: Prior | None = None,
    ) -> None:
        """`parameters` are names with their numbers of choices; `n_startup` counts baselines and seeds; `prior`
        is what is known of the study beforehand.

        Raises `UnknownName` for a sampler that does not exist and `BadInput` where it refuses the
        space or the options.
        """
        plugin = plugins.load("search.samplers", sampler, Sampler)
        options = dict(options or {})
        assert all(n >= 1 for _, n in parameters), parameters
        assert len({name for name, _ in parameters}) == len(parameters), "a parameter is named twice"
        if reason := plugin.refuses([n for _, n in parameters], len(directions), options):
            raise BadInput(f"sampler {sampler!r}: {reason}")
        self._names = [name for name, _ in parameters]
        self._sizes = [n for _, n in parameters]
        self._n_constraints = n_constraints
        self._places = {name: place for place, name in enumerate(self._names)}
        self._distributions = _Shared(
            {name: _Index(0, n - 1) if plugin.ordinal else _Category(range(n)) for name, n in parameters}
        )
        size = math.prod(self._sizes)
        self._size = size if size <= COUNTED_ASSIGNMENTS else None
        self._proposed: set[tuple[int, ...]] = set()
        space = {name: self._distributions[name] for name, n in parameters if n > 1}
        self._proposer = _Proposer(plugin, seed, n_startup, options, space, prior or Prior())
        self._storage = _Storage()
        with _quiet():
            self._study = optuna.create_study(
                storage=self._storage, sampler=self._proposer, directions=list(directions), study_name="study"
            )
        self._study_id = self._storage.get_study_id_from_name("study")

    @property
    def exhausted(self) -> bool:
        """Whether every assignment of the space has been proposed, whatever came of it."""
        return self._size is not None and len(self._proposed) >= self._size

    def ask(self, number: int) -> list[int] | None:
        """The choice index of every parameter for trial `number`; None if the space is exhausted.

        Samplers other than `exhaustive` may propose what has been proposed before.
        """
        return None if self.exhausted else self._ask(number, None)

    def ask_fixed(self, number: int, indices: Sequence[int]) -> None:
        """Make trial `number` the given choices (a baseline, a seed), as if they had been proposed."""
        self._ask(number, dict(zip(self._names, self._choices(indices).indices, strict=True)))

    def _ask(self, number: int, fixed: dict[str, int] | None) -> list[int]:
        # What `Study.ask` does, but for setting one parameter after the other, each with a copy of all before it: of
        # 210 that takes longer than all else.
        assert number == self._count(), f"trial {number} is asked for and {self._count()} is next"
        self._forget_snapshot()
        with _quiet():
            trial_id = self._storage.create_new_trial(self._study_id)
            trial = self._storage.get_trial(trial_id)
            assert trial.number == number
            self._proposer.fixed = fixed
            chosen = self._proposer.sample_relative(self._study, trial, self._proposer.space)
        proposal = [int(chosen.get(name, 0)) for name in self._names]
        self._storage.settle(trial_id, self._choices(proposal), self._distributions)
        self._remember(proposal)
        return proposal

    def _forget_snapshot(self) -> None:
        """Have samplers see all trials as they are now; Optuna keeps a list of them per trial."""
        self._study._thread_local.cached_all_trials = None

    def tell(self, number: int, values: Sequence[float] | None, constraints: Sequence[float] = ()) -> None:
        """The result of trial `number`: values in the order of the directions, or None if it failed.

        A constraint holds where it is at most 0. Values may be infinite but not NaN.
        """
        self._forget_snapshot()
        if values is None:
            self._storage.set_trial_state_values(number, TrialState.FAIL)
            return
        self._check(values, constraints)
        trial = optuna.Trial(self._study, number)
        for i, value in enumerate(constraints):
            trial.set_constraint(str(i), float(value))
        self._storage.set_trial_state_values(number, TrialState.COMPLETE, [float(value) for value in values])

    def solutions(self, budgets: Sequence[float]) -> list[list[int]]:
        """The choices that a sampler with a model (`frontier`) would answer for totals of the first table."""
        sampler = self._proposer.sampler(self._count())
        found = sampler.solutions(self._study, self._proposer.space, budgets)
        return [[int(choices.get(name, 0)) for name in self._names] for choices in found]

    def learn(self, number: int, attrs: Mapping[str, Any]) -> None:
        """Attach what was found out about trial `number` beside its values, before it is told."""
        for key, value in attrs.items():
            self._storage.set_trial_system_attr(number, key, value)

    def attrs(self, number: int) -> dict[str, Any]:
        """What the sampler remembers of trial `number`, as JSON-able data; complete once it is asked."""
        attributes = self._storage.get_trial_system_attrs(number)
        # Constraints and parameters have columns of their own in the store.
        return {
            k: v for k, v in attributes.items() if not k.startswith("constraints:") and ":relative_params:" not in k
        }

    def study_attrs(self) -> dict[str, Any]:
        """What the sampler remembers of the study, as JSON-able data; may change with every `ask`.

        Of the parents of a genetic sampler's generations only the last two are ever used again.
        """
        attributes = dict(self._storage.get_study_system_attrs(self._study_id))
        parents = [key for key in attributes if ":parent:" in key]
        parents.sort(key=lambda key: int(key.rpartition(":")[2]))
        for key in parents[:-2]:
            del attributes[key]
        return attributes

    def restore(self, rows: Iterable[Row], study_attrs: Mapping[str, Any]) -> None:
        """Bring back a study from its stored rows, ordered by number without gaps, and attributes.

        Running rows count as pending. Only allowed before the first `ask`.
        """
        assert self._count() == 0, "restore comes first"
        with _quiet():
            for key, value in study_attrs.items():
                self._storage.set_study_system_attr(self._study_id, key, value)
            for row in rows:
                assert row.number == self._count(), f"row {row.number} is given and {self._count()} is next"
                self._storage.create_new_trial(self._study_id, template_trial=self._trial(row))
                self._remember(row.indices)

    def _trial(self, row: Row) -> FrozenTrial:
        complete = row.state == "complete"
        assert complete == (row.values is not None), row
        if row.values is not None:
            self._check(row.values, row.constraints)
        trial = create_trial(
            state={"running": TrialState.RUNNING, "complete": TrialState.COMPLETE, "failed": TrialState.FAIL}[
                row.state
            ],
            values=row.values,
            system_attrs=dict(row.attrs),
            constraints={str(i): float(v) for i, v in enumerate(row.constraints)} if complete else None,
        )
        # Set afterwards: `create_trial` would copy and check every range for every trial.
        trial.params = self._choices(row.indices)  # type: ignore[assignment]
        trial.distributions = self._distributions
        trial.user_attrs, trial.intermediate_values = _NOTHING, _NOTHING
        return trial

    def _choices(self, indices: Sequence[int]) -> _Choices:
        assert all(0 <= i < n for i, n in zip(indices, self._sizes, strict=True)), indices
        return _Choices(self._places, indices)

    def _check(self, values: Sequence[float], constraints: Sequence[float]) -> None:
        assert len(values) == len(self._study.directions), values
        assert len(constraints) == self._n_constraints, constraints
        assert not any(math.isnan(x) for x in (*values, *constraints)), (values, constraints)

    def _count(self) -> int:
        return self._storage.get_n_trials(self._study_id)

    def _remember(self, indices: Sequence[int]) -> None:
        if self._size is not None:
            self._proposed.add(tuple(indices))


class _Index(IntDistribution):
    """The range of a parameter, shared by all trials: it never changes, so a copy is itself.

    Optuna copies trials deeply as they come and go; 210 ranges a trial would take longer than all else.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Index:
        return self


class _Category(CategoricalDistribution):
    """The same for samplers that want no order."""

    def __deepcopy__(self, memo: dict[int, Any]) -> _Category:
        return self


class _Shared(dict[Any, Any]):
    """The ranges of all trials, of which a copy is itself for the same reason.

    Optuna's storage in memory never writes to a trial's dictionaries; it replaces them.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class _Choices(Mapping[str, int]):
    """A trial's choices by name: one byte each where all fit, as a dictionary of 210 takes nine kilobytes.

    `places` is shared by all trials. Never changes, so a copy is itself.
    """

    __slots__ = ("_places", "indices")

    def __init__(self, places: Mapping[str, int], indices: Sequence[int]) -> None:
        self._places = places
        self.indices: bytes | array[int] = (
            bytes(indices) if max(indices, default=0) < 256 else array("L", map(int, indices))
        )

    def __getitem__(self, name: str) -> int:
        return self.indices[self._places[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Choices:
        return self


_NOTHING = _Shared()


class _Storage(InMemoryStorage):
    """Optuna's storage in memory, that takes all choices of a trial at once."""

    def settle(self, trial_id: int, choices: _Choices, ranges: _Shared) -> None:
        """Give a running trial its choices."""
        with self._lock:
            trial = copy.copy(self._get_trial(trial_id))
            trial.params, trial.distributions = choices, ranges  # type: ignore[assignment]
            # Both stay empty, and whoever wrote one would replace it: one for all trials instead of two for each.
            trial.user_attrs, trial.intermediate_values = _NOTHING, _NOTHING
            self._set_trial(trial_id, trial)


class _Proposer(BaseSampler):
    """Delegates every trial to a sampler made for it, over a space that is known beforehand.

    A fresh sampler would work out the space from all trials. Nothing else of Optuna's protocol is
    delegated: before and after a trial, samplers only handle what AutoQ does not use.
    """

    def __init__(
        self,
        plugin: Sampler,
        seed: int,
        n_startup: int,
        options: Mapping[str, Value],
        space: dict[str, BaseDistribution],
        prior: Prior,
    ) -> None:
        self._plugin = plugin
        self._seed = seed
        self._n_startup = n_startup
        self._options = options
        self.space = space
        self._prior = prior
        self.fixed: dict[str, int] | None = None

    def sampler(self, number: int) -> Any:
        """The sampler of trial `number`."""
        return self._plugin.make(self._seed, number, self._n_startup, self._options, self._prior)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self.space

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if not search_space:
            return {}
        sampler = self.sampler(trial.number)
        if self.fixed is not None:
            if isinstance(sampler, BaseGASampler):
                # Without a generation a trial would never be a parent.
                sampler.get_trial_generation(study, trial)
            return {name: self.fixed[name] for name in search_space}
        proposal = sampler.sample_relative(study, trial, search_space)
        return {
            name: proposal[name] if name in proposal else sampler.sample_independent(study, trial, name, distribution)
            for name, distribution in search_space.items()
        }

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        raise AssertionError(f"parameter {param_name!r} is not part of the space")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Optuna's log and warnings: they speak of its interfaces, which no user of AutoQ sees."""
    # Setting a logger's level instead empties the caches of all loggers there are, with every proposal.
    handlers = list(logging.getLogger("optuna").handlers)
    for handler in handlers:
        handler.addFilter(_is_error)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(_is_error)


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
