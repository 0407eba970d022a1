"""A study's trials as arrays, kept from one proposal to the next: a trial that has ended changes no more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from autoq.search.interactions import Interactions, Slopes
from autoq.search.layers import Layers
from autoq.search.prior import Prior
from autoq.search.quality_model import QualityModel
from autoq.search.samplers import SLOPES
from autoq.search.samplers._known import Floats, Indices, Known

PREDICTED = "frontier:predicted"

MODELLED = 600  # trials that the model is fitted to: the best for their size, and the latest
_BINS = 32  # of sizes, in each of which the best are kept
_ROUNDING = 1e-3  # times the usual loss: what is less than zero by no more is a loss of zero
_MARGIN = 0.05  # of the range, by which the least loss is above zero after a shift


@dataclass(frozen=True, eq=False)
class Told:
    """A complete trial: choices (n,), totals (tables,), learned values, of which less is better, and slopes."""

    number: int
    choices: NDArray[np.int32]
    totals: Floats
    values: Sequence[float]
    feasible: bool
    slopes: Slopes | None


@dataclass(frozen=True)
class Used:
    """Assignments that were asked for; two sets, as joining them would copy every trial for every proposal."""

    ended: AbstractSet[bytes]
    pending: AbstractSet[bytes]

    def __contains__(self, key: bytes) -> bool:
        return key in self.ended or key in self.pending


@dataclass(frozen=True, eq=False)
class Pending:
    """A trial that has not ended: choices (n,) with their key, totals (tables,), and whether a model proposed it."""

    choices: Indices
    key: bytes
    totals: Floats
    modelled: bool


@dataclass(frozen=True)
class Snapshot:
    """The trials of a study at one time: those told, and those pending, by number; all assignments that were used.

    `values` (k, qualities), `totals` (k, tables) and `feasible` (k,) are those of the k that were told. `turn` counts
    the sampler's own proposals, `interactions` are those of the slopes of all that were told.
    """

    told: Sequence[Told]
    values: Floats
    totals: Floats
    feasible: NDArray[np.bool_]
    interactions: Interactions | None
    pending: Sequence[Pending]
    used: Used
    turn: int


class Trials:
    """The trials over some parameters, and what is known of these."""

    def __init__(self, study: optuna.Study, search_space: Mapping[str, BaseDistribution], prior: Prior) -> None:
        self.prior, self.space = prior, dict(search_space)
        self.menus = {name: _menu(distribution) for name, distribution in search_space.items()}
        indexed: dict[str, BaseDistribution] = {n: IntDistribution(0, len(m) - 1) for n, m in self.menus.items()}
        self.known = Known.of(study.directions, indexed, prior)
        self.layers = layers_of(self.known)
        self._places = [{value: i for i, value in enumerate(menu)} for menu in self.menus.values()]
        names = self.known.names
        # Of one name `itemgetter` gives the value itself.
        self._picked: Callable[[Mapping[str, Any]], Sequence[Any]] = (
            itemgetter(*names) if len(names) > 1 else lambda params: (params[names[0]],)
        )
        self._signs = [1.0 if d == optuna.study.StudyDirection.MINIMIZE else -1.0 for d in study.directions]
        self._ended: set[int] = set()
        self._first_open = 0  # all trials before it have ended
        self._pending: dict[int, Pending] = {}  # as they were when they were seen
        self._told: list[Told] = []
        self._columns = self._columns_of(())
        self._used: set[bytes] = set()
        self._turn = 0
        self._interactions: Interactions | None = None
        self._lock = threading.Lock()

    @classmethod
    def of(cls, study: optuna.Study, search_space: Mapping[str, BaseDistribution], prior: Prior) -> Trials:
        """Those of a study, anew where the space or the prior is another than before."""
        kept = _KEPT.get(study)
        if kept is None or kept.prior is not prior or kept.space != search_space:
            kept = _KEPT[study] = cls(study, search_space, prior)
        return kept

    def snapshot(self, study: optuna.Study, number: int) -> Snapshot:
        """All trials but the one with that number."""
        with self._lock:
            ended: list[tuple[FrozenTrial, Pending]] = []
            pending: list[Pending] = []
            trials = study.get_trials(deepcopy=False)
            while self._first_open in self._ended:
                self._ended.remove(self._first_open)
                self._first_open += 1
            for trial in trials[self._first_open :]:
                if trial.number in self._ended or trial.number == number:
                    continue
                row = self._pending.get(trial.number)
                if finished := trial.state.is_finished():
                    self._ended.add(trial.number)
                    self._pending.pop(trial.number, None)
                if row is None and (row := self._row(trial)) is None:
                    continue
                if finished:
                    ended.append((trial, row))
                    self._turn += row.modelled
                else:
                    self._pending[trial.number] = row
                    pending.append(row)
            self._add(ended)
            used = Used(self._used, {row.key for row in pending})
            turn = self._turn + sum(row.modelled for row in pending)
            return Snapshot(list(self._told), *self._columns, self._interactions, pending, used, turn)

    def _row(self, trial: FrozenTrial) -> Pending | None:
        """A trial as it is pending, None where it lies outside of the space or lacks choices yet."""
        if (read := self._read(trial)) is None:
            return None
        row = np.array(read, dtype=np.int64)
        totals = np.array([table.of(row) for table in self.known.budgets], dtype=np.float64)
        return Pending(row, keys(row[None])[0], totals, PREDICTED in trial.system_attrs)

    def _read(self, trial: FrozenTrial) -> list[int] | None:
        try:
            picked = self._picked(trial.params)
        except KeyError:
            return None
        row = [places.get(value, -1) for places, value in zip(self._places, picked, strict=True)]
        return None if -1 in row else row

    def _add(self, ended: Sequence[tuple[FrozenTrial, Pending]]) -> None:
        new = []
        for trial, row in ended:
            self._used.add(row.key)
            if trial.state != TrialState.COMPLETE or trial.values is None:
                continue
            signed = [self._signs[q] * trial.values[q] for q in self.known.qualities]
            feasible = all(value <= 0 for value in trial.constraints.values())
            slopes = self._slopes(row.choices, trial.system_attrs.get(SLOPES))
            choices = row.choices.astype(np.int32)
            new.append(Told(trial.number, choices, row.totals, signed, feasible, slopes))
        if not new:
            return
        # Trials end in any order, and proposals are to depend on their numbers alone.
        in_order = not self._told or self._told[-1].number < new[0].number
        self._told = sorted([*self._told, *new], key=attrgetter("number"))
        if in_order:
            before, after = self._columns, self._columns_of(new)
            values, totals = (np.concatenate([before[i], after[i]]) for i in (0, 1))
            self._columns = values, totals, np.concatenate([before[2], after[2]])
        else:
            self._columns = self._columns_of(self._told)
        if any(told.slopes is not None for told in new):
            self._interactions = interactions_of(self.layers, [told.slopes for told in self._told])

    def _columns_of(self, told: Sequence[Told]) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Values, totals and feasibility of trials, as in a `Snapshot`."""
        values = np.array([each.values for each in told], dtype=np.float64)
        totals = np.array([each.totals for each in told], dtype=np.float64)
        return (
            values.reshape(-1, len(self.known.qualities)),
            totals.reshape(-1, len(self.known.budgets)),
            np.array([each.feasible for each in told], dtype=np.bool_),
        )

    def _slopes(self, row: Indices, found: Mapping[str, Any] | None) -> Slopes | None:
        return None if found is None else slopes_of(row, found, self.known)


_KEPT: WeakKeyDictionary[optuna.Study, Trials] = WeakKeyDictionary()


def keys(choices: Indices) -> list[bytes]:
    """What tells assignments (k, n) apart."""
    return [row.tobytes() for row in choices.astype(np.int32)]


def layers_of(known: Known) -> Layers:
    """The parameters of a study for the model: predicted losses, or assumed ones."""
    loss = known.losses.copy()
    for i, count in enumerate(known.sizes):
        loss[i, count:] = np.inf
    return Layers(known.names, loss, known.predicted)


def slopes_of(row: Sequence[int] | Indices, found: Mapping[str, Any], known: Known) -> Slopes:
    """What `SLOPES` of a trial's attributes holds, as a matrix; 0 for what it does not name."""
    table = np.zeros(known.losses.shape)
    for i, name in enumerate(known.names):
        own = found["table"].get(name, ())
        table[i, : len(own)] = own
    return Slopes(np.array(row, dtype=np.int64), float(found["loss"]), table)


def positive(values: Floats) -> tuple[Floats, float]:
    """Values of which less is better as finite positive losses, and the shift that makes them values again."""
    found = values[np.isfinite(values)]
    if not found.size:
        return np.ones_like(values), 0.0
    shift, floor = 0.0, 0.0
    if found.min() <= 0:
        above = found[found > 0]
        if 2 * above.size >= found.size and -found.min() <= _ROUNDING * np.median(above):
            floor = 0.5 * float(above.min())
        else:
            # The lower half's range: one value that is far too high must not make all others alike.
            span = 2 * float(np.median(found) - found.min()) or float(np.ptp(found)) or 1.0
            shift = float(found.min()) - _MARGIN * span
    losses = np.maximum(values - shift, floor)
    worst = float(losses[np.isfinite(losses)].max())
    return np.where(np.isfinite(values), losses, 2 * worst), shift


def interactions_of(layers: Layers, slopes: Sequence[Slopes | None]) -> Interactions | None:
    """What trials' slopes tell of layers together; None where there are none."""
    # Where nothing is lost they are rounding.
    usable = [s for s in slopes if s is not None and s.loss > 0 and (layers.pick(layers.loss, s.choices) > 0).any()]
    return Interactions(layers, usable) if usable else None


def fitted(
    choices: Sequence[NDArray[np.integer]],
    losses: Floats,
    sizes: Floats,
    layers: Layers,
    interactions: Interactions | None,
) -> QualityModel:
    """The model of k trials: choices (n,) of each, positive losses (k,), sizes (k,); of at most `MODELLED` of them."""
    kept = kept_trials(losses, sizes)
    rows = np.array([choices[i] for i in kept], dtype=np.int64).reshape(-1, len(layers.names))
    return QualityModel(layers, rows, losses[kept], interactions)


def kept_trials(losses: Floats, sizes: Floats) -> NDArray[np.int64]:
    """Those that the model is fitted to: the latest, and the best in each of several bins of size."""
    kept = np.arange(len(losses))
    if len(kept) <= MODELLED:
        return kept
    bins = np.argsort(np.argsort(sizes, kind="stable"), kind="stable") * _BINS // len(sizes)
    rank = np.empty(len(kept))
    for b in range(_BINS):
        inside = np.flatnonzero(bins == b)
        rank[inside[np.argsort(losses[inside], kind="stable")]] = np.arange(len(inside))
    latest = kept[-MODELLED // 4 :]
    best = np.argsort(rank, kind="stable")[: MODELLED - len(latest)]
    return np.unique(np.concatenate([best, latest]))


def _menu(distribution: BaseDistribution) -> Sequence[Any]:
    if isinstance(distribution, IntDistribution):
        return range(distribution.low, distribution.high + 1, distribution.step)
    assert isinstance(distribution, CategoricalDistribution), distribution
    return distribution.choices
