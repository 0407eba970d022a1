"""The parts of `search.py` that need no model: small spaces with a known frontier, and the time of proposals.

A toy's loss has what a model's has: a sum over layers that falls fourfold with each bit, errors of pairs of
layers that add to or cancel each other, saturation where it is large, and predictions that are off by a factor.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from _report import print_table
from numpy.typing import NDArray

from autoq import plugins
from autoq.search.optuna_study import AskTell, Row
from autoq.search.prior import Additive, Prior

BITS = np.array([2.0, 3.0, 4.0, 5.0, 6.0, 8.0])
SEEDS, LAYERS, EVALUATIONS = 50, 4, 300
SMALL = ("frontier", "nsga2", "tpe", "random")
SPACES = ((210, 12, 1_000), (500, 20, 10_000))  # parameters, choices, trials
FAST = ("frontier", "evolution", "gradient_ilp", "nsga2", "tpe", "random")
ASKS = 4
SLOPES = 12  # first trials of `--speed` with a table of slopes, as frontier measures them
REPEATS = 20  # asks for each evaluation, after which a sampler that repeats itself is stopped

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Toy:
    """Losses (layers, choices) by themselves, signed errors of pairs, and what is predicted."""

    own: Floats
    pairs: Floats  # (layers, layers), symmetric, zero diagonal
    size: Floats  # (layers, choices)
    predicted: Floats

    @classmethod
    def draw(cls, layers: int, bits: Floats, seed: int) -> Toy:
        rng = np.random.default_rng(seed)
        own = rng.lognormal(0.0, 1.0, layers)[:, None] * 4.0 ** (2.0 - bits) * rng.lognormal(0.0, 0.2, (layers, 1))
        pairs = np.triu(rng.uniform(-0.3, 0.6, (layers, layers)), 1) / math.sqrt(layers)
        weights = rng.choice([1.0, 1.0, 3.0, 4.0], layers)
        predicted = own * rng.lognormal(0.0, 0.4, (layers, 1))
        return cls(own, pairs + pairs.T, weights[:, None] * bits, predicted)

    def loss(self, choices: Sequence[int]) -> float:
        part = self.own[np.arange(len(self.own)), choices]
        root = np.sqrt(part)
        total = max(float(part.sum() + 0.5 * root @ self.pairs @ root), 0.05 * float(part.sum()))
        return float(np.log1p(total))

    def total(self, choices: Sequence[int]) -> float:
        return float(self.size[np.arange(len(self.size)), choices].sum())

    def study(self, sampler: str, seed: int) -> AskTell:
        names = [f"layer{i}" for i in range(len(self.own))]
        size = Additive(0.0, dict(zip(names, self.size, strict=True)))
        prior = Prior(dict(zip(names, self.predicted, strict=True)), {1: size})
        parameters = [(name, self.own.shape[1]) for name in names]
        return AskTell(parameters, ["minimize", "minimize"], sampler, seed, prior=prior)


def exact_frontier(toy: Toy) -> set[tuple[int, ...]]:
    """Every assignment that no other beats in loss and size, by enumeration; of equals, the first."""
    every = itertools.product(range(toy.own.shape[1]), repeat=len(toy.own))
    found, least = set(), math.inf
    for _, loss, choices in sorted((toy.total(c), toy.loss(c), c) for c in every):
        if loss < least:
            least = loss
            found.add(choices)
    return found


def until_found(sampler: str, toy: Toy, wanted: set[tuple[int, ...]], most: int, seed: int) -> tuple[float, float, int]:
    """Different evaluations until nine tenths and all of the frontier were found (inf: never), and how many were."""
    study = toy.study(sampler, seed)
    values: dict[tuple[int, ...], list[float]] = {}
    most_of_them = everything = math.inf
    found = 0
    for number in range(REPEATS * most):
        proposal = study.ask(number)
        if proposal is None:
            break
        choices = tuple(proposal)
        if choices not in values:
            values[choices] = [toy.loss(choices), toy.total(choices)]
            found += choices in wanted
            if found >= 0.9 * len(wanted):
                most_of_them = min(most_of_them, len(values))
            if found == len(wanted):
                everything = len(values)
                break
        study.tell(number, values[choices])
        if len(values) >= most:
            break
    return most_of_them, everything, found


def small(options: argparse.Namespace) -> None:
    there = plugins.names("search.samplers")
    samplers = options.samplers.split(",") if options.samplers else [name for name in SMALL if name in there]
    most, seeds = options.trials or EVALUATIONS, options.seeds if options.seeds > 1 else SEEDS
    toys = [Toy.draw(LAYERS, BITS, seed) for seed in range(seeds)]
    frontiers = [exact_frontier(toy) for toy in toys]
    cells = []
    for sampler in samplers:
        found = [
            until_found(sampler, toy, wanted, most, seed)
            for seed, (toy, wanted) in enumerate(zip(toys, frontiers, strict=True))
        ]
        nine, all_of_it, _ = (list(column) for column in zip(*found, strict=True))
        shares = [count / len(wanted) for (*_, count), wanted in zip(found, frontiers, strict=True)]
        never = sum(math.isinf(value) for value in all_of_it)
        cells.append([sampler, _quartiles(nine), _quartiles(all_of_it), never, f"{statistics.median(shares):.0%}"])
        print(f"{sampler}: done", flush=True)
    points = statistics.median(map(len, frontiers))
    title = f"{LAYERS} layers, {len(BITS)} choices: {len(BITS) ** LAYERS} assignments, {points:.0f} on the frontier"
    header = ["sampler", "evaluations to 90 %", "to all of it", f"never in {most}", "found by the end"]
    print_table(f"{title}, {seeds} seeds", header, cells)
    print("\nMedians (quartiles); > where the figure lies beyond the last evaluation.")


def _quartiles(values: Sequence[float]) -> str:
    ordered = sorted(values)
    low, middle, high = (ordered[round(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return " ".join(
        [f"{middle:.0f}" if math.isfinite(middle) else ">", f"({_bounded(low)} to {_bounded(high)})"],
    )


def _bounded(value: float) -> str:
    return f"{value:.0f}" if math.isfinite(value) else ">"


def speed(options: argparse.Namespace) -> None:
    there = plugins.names("search.samplers")
    samplers = options.samplers.split(",") if options.samplers else [name for name in FAST if name in there]
    cells = []
    for layers, choices, trials in SPACES:
        toy = Toy.draw(layers, np.linspace(2.0, 8.0, choices), 0)
        rows = told(toy, options.trials or trials)
        for sampler in samplers:
            study = toy.study(sampler, 0)
            study.restore(rows, {})
            wall, cpu = [], []
            for number in range(len(rows), len(rows) + ASKS):
                start, before = time.perf_counter(), time.process_time()
                proposal = study.ask(number)
                wall.append(time.perf_counter() - start)
                cpu.append(time.process_time() - before)
                if proposal is None:
                    break
                study.tell(number, [toy.loss(proposal), toy.total(proposal)])
            figures = [wall[0], statistics.median(wall[1:]), max(wall[1:]), statistics.median(cpu[1:])]
            cells.append([f"{layers} × {choices}", len(rows), sampler, *(f"{1e3 * figure:.0f}" for figure in figures)])
            print(" ".join(map(str, cells[-1])), flush=True)
    header = ["space", "trials", "sampler", "first ask, ms", "ask, ms", "slowest, ms", "CPU, ms"]
    print_table("Time of a proposal, with trials told before", header, cells)


def told(toy: Toy, count: int) -> list[Row]:
    """Trials as a search leaves them: random ones and exact solutions that were changed in a few layers."""
    rng = np.random.default_rng(1)
    layers, choices = toy.own.shape
    rows = []
    for number in range(count):
        if number % 2:
            level = rng.integers(choices)
            picked = np.clip(level + rng.integers(-1, 2, layers), 0, choices - 1)
        else:
            gain = toy.own[:, :1] * 4.0 ** -np.arange(choices) + rng.random() * 1e-2 * toy.size
            picked = gain.argmin(axis=1)
            moved = rng.integers(layers, size=max(1, layers // 20))
            picked[moved] = rng.integers(choices, size=len(moved))
        # What a genetic sampler would have noted itself.
        attrs: dict[str, Any] = {f"{kind}Sampler:generation": number // 50 for kind in ("NSGAII", "NSGAIII")}
        values = [toy.loss(picked), toy.total(picked)]
        if number < SLOPES:
            table = {f"layer{i}": (2.0 * own * rng.lognormal(0.0, 0.3)).tolist() for i, own in enumerate(toy.own)}
            attrs["slopes"] = {"loss": values[0], "table": table}
        rows.append(Row(number, picked.tolist(), "complete", values, attrs=json.loads(json.dumps(attrs))))
    return rows
