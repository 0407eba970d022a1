"""Evolution: level switches that keep the budget, from the best assignment known at it.

EvoPress (Sieberling, Kuznedelev, Kurtic & Alistarh 2024, "EvoPress: Accurate Dynamic Model Compression
via Evolutionary Search"): an offspring raises some layers by a level and lowers others, so that the
model's size stays what it was; few layers, the smaller of two uniform draws; the fittest becomes the next
parent, a (1 + λ) evolution. They prove that it converges where the loss is a sum over layers.

Where we differ: they search for one budget, we for a frontier. So as many evolutions as there are budgets
take turns, evenly spaced along the range of the first sum that the study budgets, and the parent at a budget
is the best feasible trial that fits it, whoever proposed it. An evolution starts from the exact solution
of the predicted losses instead of a uniform one. Layers differ in size here: after the switches, random
layers are lowered until the offspring fits, then raised while one still fits. They rank offspring on a little
data and the best on more; a trial has one amount of data here, so each is one offspring.

Without a sum to keep, a parent is any trial that no other dominates, and the drawn number of its
layers goes up or down by a level.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np
import optuna
from optuna.trial import FrozenTrial

from autoq.search.prior import Prior
from autoq.search.samplers import Option, Sampler, Value, trial_seed
from autoq.search.samplers._known import Choices, Known, Proposer, Table, Told, nondominated, taken

BUDGETS, MAX_SWITCHES = 8, 3
_ATTEMPTS = 20  # offspring drawn for one that is new and no less feasible than its parent


class _Evolution(Proposer):
    def propose(self, study: optuna.Study, trial: FrozenTrial, known: Known) -> Choices:
        rng = np.random.default_rng(trial_seed(self._seed, trial.number))
        used, told = taken(study, trial, known.names), Told.of(study, known)
        count = int(self._options.get("budgets") or BUDGETS)
        table = known.budgets[0]
        low, high = known.span(table, known.losses)
        budget = low + (trial.number % count + 0.5) / count * (high - low)
        if not known.assumed:
            start = known.solve(known.losses, table, budget)
            if start not in used:
                return start
        parent = _plain_parent(told, rng) if known.assumed else _parent_within(told, table, budget)
        if parent is None:
            parent = tuple(rng.integers(known.sizes).tolist()) if known.assumed else start
        most = int(self._options.get("max_switches") or MAX_SWITCHES)
        for _ in range(_ATTEMPTS):
            switches = int(rng.integers(1, most + 1, size=2).min())
            if known.assumed:
                offspring = _stray(known, parent, switches, rng)
            else:
                offspring = switch_levels(known, table, budget, parent, switches, rng)
            if offspring not in used and known.excess(offspring) <= known.excess(parent):
                break
        return offspring


def _parent_within(told: Told, table: Table, budget: float) -> Choices | None:
    """The best told assignment that fits the budget: the least infeasible, then of the best quality."""
    fits = np.flatnonzero(table.of(told.choices) <= budget * (1 + np.copysign(1e-9, budget)))
    if not len(fits):
        return None
    best = fits[np.lexsort((told.merit[fits], told.violation[fits]))[0]]
    return tuple(told.choices[best].tolist())


def _plain_parent(told: Told, rng: np.random.Generator) -> Choices | None:
    """Any feasible trial that no other dominates; the least infeasible one if there is none."""
    if not len(told.choices):
        return None
    feasible = np.flatnonzero(told.violation <= told.violation.min())
    front = feasible[nondominated(told.values[feasible])]
    return tuple(told.choices[rng.choice(front)].tolist())


def _stray(known: Known, parent: Choices, switches: int, rng: np.random.Generator) -> Choices:
    """The parent with some random parameters a level up or down; at an end there is one way only."""
    child, top = np.array(parent), np.array(known.sizes) - 1
    moved = rng.permutation(len(child))[:switches]
    up = rng.random(len(moved)) < 0.5
    up = (child[moved] == 0) | (up & (child[moved] < top[moved]))
    child[moved] += np.where(up, 1, -1)
    return tuple(child.tolist())


def switch_levels(
    known: Known, table: Table, budget: float, parent: Choices, switches: int, rng: np.random.Generator
) -> Choices:
    """Raise `switches` random parameters by a level, lower others until the budget is kept, then fill it up.

    Levels are choices by their weight in `table`. Afterwards none that was not lowered can be raised.
    """
    order = np.argsort(table.parts, axis=1, kind="stable")  # level -> choice
    weight = np.take_along_axis(table.parts, order, axis=1)
    level = np.argmax(order == np.array(parent)[:, None], axis=1)
    rows, top = np.arange(len(level)), np.array(known.sizes) - 1
    room = budget * (1 + np.copysign(1e-9, budget)) - float(weight[rows, level].sum())

    def step(row: int, by: int) -> None:
        nonlocal room
        room -= float(weight[row, level[row] + by] - weight[row, level[row]])
        level[row] += by

    raised = rng.permutation(rows[level < top])[:switches]
    for row in raised:
        step(row, 1)
    lowered = np.zeros(len(level), dtype=bool)
    while room < 0:
        saves = (level > 0) & (weight[rows, np.maximum(level - 1, 0)] < weight[rows, level])
        others = saves & ~np.isin(rows, raised)
        if not saves.any():
            break
        row = int(rng.choice(np.flatnonzero(others if others.any() else saves)))
        lowered[row] = True
        step(row, -1)
    while True:
        above = weight[rows, np.minimum(level + 1, top)] - weight[rows, level]
        fits = np.flatnonzero((level < top) & ~lowered & (above <= room))
        if not len(fits):
            break
        step(int(rng.choice(fits)), 1)
    return tuple(order[rows, level].tolist())


class Evolution(Sampler):
    """EvoPress's level switches at several budgets in turn."""

    uses_losses: ClassVar[bool] = True
    options: ClassVar[Mapping[str, Option]] = {
        "budgets": Option(int, f"budgets that take turns; default: {BUDGETS}", 1, 1000),
        "max_switches": Option(int, f"most layers that are raised for an offspring; default: {MAX_SWITCHES}", 1, 1000),
    }

    def make(
        self, seed: int, number: int, n_startup: int, options: Mapping[str, Value], prior: Prior
    ) -> optuna.samplers.BaseSampler:
        return _Evolution(seed, options, prior)
