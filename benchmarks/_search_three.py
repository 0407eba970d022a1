"""The part of `search.py` with three objectives: KL, size and decode latency, at equal numbers of trials.

Latencies are those of a table that the target torch-cpu times here once; all samplers search by it, so a restless
machine changes the task and not the comparison. Points are compared by hypervolume: log KL, size and latency, each
on a scale from 0 to 1 between its ends: of KL those of uniform assignments, of the others those of the space.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from _report import print_table
from _search_yardstick import Choices, Meter, Table, Yardstick
from controller_overhead import hypervolume

from autoq import plugins
from autoq.search import seeds
from autoq.search.optuna_study import AskTell
from autoq.search.prior import Additive, Prior
from autoq.search.samplers import SLOPES, Sampler
from autoq.spec import build_spec

TRIALS, SEEDS, CALIBRATION = 48, 3, 2048
SCHEMES = [
    "rtn-int4-g64",
    "rtn-int4-g64-sym",
    "rtn-int4-g192",
    "rtn-int8-channel-sym",
]  # torch-cpu has kernels for these
DECODE = "latency_decode_ms"
MAX_REPEATS = 200
REFERENCE = 1.1  # in all three coordinates: a little beyond their worst ends
UNSEEDED = ("frontier", "gradient_ilp", "probe_ilp")  # they begin with solutions or a design of their own

Point = tuple[float, float, float]


class Task:
    """A study's space on torch-cpu, its tables and the scales of its three objectives."""

    def __init__(self, options: argparse.Namespace) -> None:
        window = 256 if options.quick else 512
        exclude = ["*.q_proj", "*.k_proj", "*.v_proj", "*.up_proj", "*.gate_proj"] if options.quick else []
        spec = build_spec(
            {
                "model": {"id": options.model, "dtype": "bfloat16"},  # what its kernels take
                "data": {
                    "calibration_tokens": 8 * window,
                    "search_tokens": 4 * window,
                    "report_tokens": window,
                    "window_tokens": window,
                },
                "target": {"name": "torch-cpu"},
                "space": {"schemes": SCHEMES, "exclude": exclude},
                "objectives": ["kl_nats_per_token", "size_bytes", DECODE],
            }
        )
        self.yard = yard = Yardstick(spec)
        self.costs = yard.evaluator.cost_table({k: [str(s) for s in v] for k, v in yard.space.choices.items()})
        table = self.costs.layer_ms[DECODE]
        self.latency: Table = [
            np.array([sum(table[layer.name][str(s)] for layer in v.members) for s in v.choices]) for v in yard.variables
        ]
        kls = [yard.kl(level, "search", [0]) for level in yard.levels()]
        self.kl_ends = math.log(min(kls)), math.log(max(kls))

    def prior(self, losses: Table) -> Prior:
        names = [name for name, _ in self.yard.parameters]
        latency = Additive(self.costs.base_ms[DECODE], dict(zip(names, self.latency, strict=True)))
        prior = self.yard.prior(losses)
        return Prior(prior.losses, {**prior.additive, 2: latency})

    def ms(self, choices: Sequence[int]) -> float:
        """Predicted milliseconds."""
        layers = sum(float(part[i]) for part, i in zip(self.latency, choices, strict=True))
        return self.costs.base_ms[DECODE] + layers

    def scaled(self, kl: float, choices: Sequence[int]) -> Point:
        """Where an assignment lies between the ends of the space."""
        low, high = self.kl_ends
        found = [(math.log(max(kl, 1e-12)) - low) / (high - low)]
        totals = (self.yard.total(choices), self.ms(choices) - self.costs.base_ms[DECODE])
        for total, parts in zip(totals, (self.yard.bytes, self.latency), strict=True):
            least, most = (sum(float(end(part)) for part in parts) for end in (np.min, np.max))
            found.append((total - least) / (most - least))
        return found[0], found[1], found[2]

    def seeds(self, losses: Table, count: int) -> list[list[int]]:
        """What a study of this tool would begin with."""
        table: dict[str, dict[str, float]] = {}
        for variable, part in zip(self.yard.variables, losses, strict=True):
            own = {str(scheme): float(loss) for scheme, loss in zip(variable.choices, part, strict=True)}
            # The loss of a variable's layers together is on the first.
            table |= {part.name: own if i == 0 else dict.fromkeys(own, 0.0) for i, part in enumerate(variable.members)}
        sizes = list(self.yard.problem.sizes.values())
        return seeds.proposals(self.yard.space, table, sizes, self.costs, [DECODE], count)


def volume(points: Sequence[Point]) -> float:
    """Volume that the points dominate below the reference, all coordinates minimized, by slabs of the third."""
    inside = sorted((point for point in points if max(point) < REFERENCE), key=lambda point: point[2])
    total = 0.0
    for i, point in enumerate(inside):
        until = inside[i + 1][2] if i + 1 < len(inside) else REFERENCE
        total += hypervolume([p[:2] for p in inside[: i + 1]], (REFERENCE, REFERENCE)) * (until - point[2])
    return total


def run(task: Task, sampler: str, seed: int, count: int, slopes: int | None) -> tuple[list[Point], float]:
    """The points of `count` different trials, and what they cost in passes."""
    yard, meter = task.yard, Meter(task.yard, seed)
    losses = meter.losses(CALIBRATION, own=True)
    first = [] if sampler in UNSEEDED else task.seeds(losses, count // 4)
    study = AskTell(yard.parameters, ["minimize"] * 3, sampler, seed, n_startup=len(first), prior=task.prior(losses))
    if slopes is None:
        slopes = getattr(plugins.load("search.samplers", sampler, Sampler), "slopes", 0)
    known: dict[Choices, float] = {}
    number = repeats = 0
    while len(known) < count and repeats < MAX_REPEATS:
        if number < len(first):
            choices = tuple(first[number])
            study.ask_fixed(number, choices)
        else:
            choices = tuple(study.ask(number) or ())
        repeats = repeats + 1 if choices in known else 0
        if not repeats and len(known) < slopes:
            known[choices], table = meter.slopes(choices, 1)
            study.learn(number, {SLOPES: {"loss": known[choices], "table": table}})
        elif not repeats:
            known[choices] = meter.kl(choices, 1)
        study.tell(number, [known[choices], yard.total(choices), task.ms(choices)])
        number += 1
    return [task.scaled(kl, choices) for choices, kl in known.items()], meter.cost


def compare(options: argparse.Namespace, keep: Callable[[Path | None, Any], None]) -> None:
    """Every sampler with every seed; a row each in the file of `--out`, and the table."""
    count, n_seeds = options.trials or TRIALS, options.seeds if options.seeds > 1 else SEEDS
    task = Task(options)
    # A table of latencies is timed anew in each run, so rows of another run are not comparable.
    parameters = [n for _, n in task.yard.parameters]
    wanted = options.samplers.split(",") if options.samplers else plugins.names("search.samplers")
    loaded = {name: plugins.load("search.samplers", name, Sampler) for name in wanted}
    able = [name for name, plugin in loaded.items() if plugin.refuses(parameters, 3, {}) is None]
    rows = []
    for seed in range(n_seeds):
        for sampler in able:
            points, cost = run(task, sampler, seed, count, options.slopes)
            row = {
                "three": sampler,
                "seed": seed,
                "half": volume(points[: count // 2]),
                "volume": volume(points),
                "trials": len(points),
                "cost": cost,
            }
            keep(options.out, row)
            rows.append(row)
            print(f"{sampler}, seed {seed}: {row['volume']:.4f}, cost {cost:g}", flush=True)
    cells = []
    for sampler in able:
        own = [row for row in rows if row["three"] == sampler]
        figures = []
        for key in ("half", "volume"):
            values = [row[key] for row in own]
            figures.append(f"{statistics.median(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        cells.append([sampler, own[0]["trials"], f"{own[0]['cost']:g}", *figures])
    cells.sort(key=lambda row: row[-1], reverse=True)
    header = ["sampler", "trials", "cost", f"volume after {count // 2}", "at the end"]
    title = f"Hypervolume of log KL, size and predicted decode latency, {options.model}, {len(parameters)} variables"
    print_table(f"{title} of up to {max(parameters)} choices, {n_seeds} seeds", header, cells)
