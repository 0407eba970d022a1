"""What a proposal costs: asking and telling each sampler, and building a study again from its rows.

The space is SmolLM2's: 210 parameters of 6 choices, three objectives, one constraint. The study holds
`--trials` finished trials when timing begins. CPU time, so that a busy machine does not show. Sampler
and Optuna only; `study_overhead.py` times the controller with its database.

    python benchmarks/controller_overhead.py [--trials 1000] [--samplers nsga2,tpe] [--quality]

`--quality` compares parameters as ordered integers with parameters as categories: the hypervolume of
log KL (0 at 0 bits a layer, lower is better) against mean index, reference point (0, 5), on an additive toy.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from _report import print_table

from autoq import plugins
from autoq.search.optuna_study import AskTell, Row
from autoq.search.samplers import Sampler

CHOICES, N_STARTUP, ASKS = 6, 50, 7
PARAMETERS = {"gp": 8, "exhaustive": 6}  # these refuse 210; the table says how many they get
TRIALS = {"gp": 50}  # fitting costs the cube of the trials


def results(indices: list[int], sensitivity: np.ndarray) -> tuple[list[float], list[float]]:
    bits = np.array(indices)
    size = float(bits.mean())
    return [float(np.log((sensitivity * 4.0**-bits).sum() / sensitivity.sum())), size, 1.0 + size], [size - 3.0]


def cpu_ms(action: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    value = action()
    return 1e3 * (time.process_time() - start), value


def overhead(name: str, trials: int) -> list[object]:
    n = PARAMETERS.get(name, 210)
    trials = min(trials, TRIALS.get(name, trials))
    rng = np.random.default_rng(0)
    sensitivity = rng.lognormal(0, 1.5, n)
    rows = []
    for number in range(trials):
        indices = rng.integers(0, CHOICES, n).tolist()
        values, constraints = results(indices, sensitivity)
        # What a genetic sampler would have noted itself.
        attrs = {f"{kind}Sampler:generation": number // 50 for kind in ("NSGAII", "NSGAIII")}
        rows.append(Row(number, indices, "complete", values, constraints, json.loads(json.dumps(attrs))))
    study = AskTell(
        [(f"layer{i}", CHOICES) for i in range(n)],
        ["minimize"] * 3,
        name,
        0,
        n_constraints=1,
        n_startup=N_STARTUP,
    )
    restore, _ = cpu_ms(lambda: study.restore(rows, {}))
    asks, tells = [], []
    for number in range(trials, trials + ASKS):
        ask, indices = cpu_ms(lambda number=number: study.ask(number))
        values, constraints = results(indices, sensitivity)
        tell, _ = cpu_ms(lambda number=number, v=values, c=constraints: study.tell(number, v, c))
        asks.append(ask)
        tells.append(tell)
    middle = [statistics.median(times) for times in (asks, tells)]
    return [name, n, trials, f"{middle[0]:.1f}", f"{max(asks):.1f}", f"{middle[1]:.2f}", f"{restore:.0f}"]


def hypervolume(points: list[tuple[float, float]], reference: tuple[float, float]) -> float:
    """Area that the points dominate below the reference, both coordinates minimized."""
    area, level = 0.0, reference[1]
    for x, y in sorted(point for point in points if point[0] < reference[0]):
        if y < level:
            area, level = area + (reference[0] - x) * (level - y), y
    return area


def quality(name: str, n: int, trials: int, ordinal: bool, seed: int) -> float:
    """Hypervolume after `trials` trials from scratch."""
    plugin = plugins.load("search.samplers", name, Sampler)
    original = type(plugin).ordinal
    type(plugin).ordinal = ordinal
    try:
        study = AskTell([(f"layer{i}", CHOICES) for i in range(n)], ["minimize"] * 2, name, seed)
    finally:
        type(plugin).ordinal = original
    sensitivity = np.random.default_rng(seed).lognormal(0, 1.5, n)
    points = []
    for number in range(trials):
        values, _ = results(study.ask(number), sensitivity)
        study.tell(number, values[:2])
        points.append((values[0], values[1]))
    return hypervolume(points, (0.0, 5.0))


def compare(seeds: int) -> list[list[object]]:
    rows = []
    for name, n, trials in (("nsga2", 24, 300), ("tpe", 24, 300), ("gp", 8, 40)):
        found = SimpleNamespace(
            ordered=[quality(name, n, trials, True, seed) for seed in range(seeds)],
            categories=[quality(name, n, trials, False, seed) for seed in range(seeds)],
            random=[quality("random", n, trials, True, seed) for seed in range(seeds)],
        )
        differences = np.subtract(found.ordered, found.categories)
        error = differences.std(ddof=1) / len(differences) ** 0.5
        rows.append(
            [
                name,
                n,
                trials,
                f"{np.mean(found.ordered):.2f}",
                f"{np.mean(found.categories):.2f}",
                f"{differences.mean():.2f} ± {error:.2f}",
                f"{np.mean(found.random):.2f}",
            ]
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--samplers", default=",".join(plugins.names("search.samplers")))
    parser.add_argument("--quality", action="store_true")
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    if arguments.quality:
        header = ["sampler", "parameters", "trials", "integers", "categories", "paired difference", "random search"]
        print_table("Hypervolume, higher is better", header, compare(arguments.seeds))
        return
    header = ["sampler", "parameters", "trials", "ask, ms", "slowest ask, ms", "tell, ms", "restore, ms"]
    print_table(
        f"Sampler overhead, CPU time, {CHOICES} choices per parameter, 3 objectives, 1 constraint",
        header,
        [overhead(name, arguments.trials) for name in arguments.samplers.split(",")],
    )


if __name__ == "__main__":
    main()
