"""All samplers side by side: what each finds for what it costs, on one evaluator, in one run.

SmolLM2's 210 linears, round to nearest with groups of 64 and a zero point at 2, 3, 4, 5, 6 or 8 bits. A sampler
minimizes KL on its share of 4,096 search tokens; the answer is read off at six sizes (bits per weight of the
searched layers, scales and zero points included) on 2,048 held-out tokens. Cost is everything that needs the
model (predicted losses, probes, trials), in forward passes of one window of 512 tokens; a backward pass counts two.
The seed changes a sampler's draws, the windows that it sees and the labels that its predicted losses draw.

    python benchmarks/search.py [--out FILE] [--seeds 3] [--long] [--arms 'frontier-*,uniform'] [--quick]
    python benchmarks/search.py --small | --speed | --three
    python benchmarks/search.py --tiny [--out FILE] [--many 5000] [--minutes 25]

`--out` keeps every finished row as a line of JSON; a run that was cut goes on from there. `--long` adds evolution,
predictor and actor-critic at a cost of 480. `--small` counts evaluations until an enumerable space's exact frontier
is found, `--speed` times proposals, `--three` compares hypervolumes of KL, size and predicted decode latency.
`--tiny` trains a model that is small enough for thousands of trials and runs the others' on it.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import _search_arms as arms
from _report import machine, print_table
from _search_arms import Arm
from _search_yardstick import Meter, Yardstick

from autoq import plugins
from autoq.spec import StudySpec, build_spec

BITS = (3.0, 3.5, 4.0, 4.5, 5.0, 6.0)  # per weight, at which quality is read off
SCHEMES = [f"rtn-int{bits}-g64" for bits in (2, 3, 4, 5, 6, 8)]
FEW, MANY = 96, 480
PROBES = (0, 2)  # index of the choice that probe_ilp probes: 2 and 4 bits
LEARNERS = ("evolution", "predictor", "actor_critic")
# What one window and a layer of each kind are enough for: does it run at all?
QUICK_TOKENS, QUICK_EXCLUDED = 256, ("*.q_proj", "*.k_proj", "*.v_proj", "*.up_proj", "*.gate_proj")

Row = dict[str, Any]


def spec_of(options: argparse.Namespace) -> StudySpec:
    window = QUICK_TOKENS if options.quick else 512
    return build_spec(
        {
            "model": {"id": options.model, "dtype": options.dtype},
            "data": {
                "calibration_tokens": 8 * window,
                "search_tokens": 8 * window,
                "report_tokens": 4 * window,
                "window_tokens": window,
            },
            "target": {"name": "generic"},
            "space": {"schemes": SCHEMES, "exclude": list(QUICK_EXCLUDED) if options.quick else []},
            "objectives": ["kl_nats_per_token", "size_bytes"],
            "workers": {"gpus": options.gpus},
        }
    )


def all_arms(options: argparse.Namespace) -> list[Arm]:
    tokens = options.calibration_tokens
    found = [
        Arm("uniform", "uniform", arms.uniform, calibration=0),
        Arm("gradient_ilp", "gradient_ilp", arms.predicted),
        *(
            Arm(f"probe_ilp-{probe}", "probe_ilp", arms.probed, calibration=0, options={"probe": probe})
            for probe in PROBES
        ),
        *(Arm(f"{name}-{FEW}", name, arms.measured, FEW, tokens) for name in ("random", "nsga2", "tpe", *LEARNERS)),
        *(Arm(f"{name}-{FEW}-split", name, arms.split, FEW, tokens) for name in LEARNERS),
        *(Arm(f"{name}-{FEW}+", name, arms.measured, FEW, tokens, own=True) for name in LEARNERS[:2]),
    ]
    if options.long:
        found += [Arm(f"{name}-{MANY}", name, arms.measured, MANY) for name in LEARNERS]
        found += [Arm(f"{name}-{MANY}-split", name, arms.split, MANY) for name in LEARNERS]
    own = Arm(
        "frontier",
        "frontier",
        arms.modelled,
        calibration=options.frontier_calibration,
        windows=options.windows,
        own=True,
        seeded=False,
        slopes=options.slopes,
        options=json.loads(options.options),
    )
    few = replace(own, name=f"frontier-{FEW // 2}", cost=FEW // 2, calibration=options.frontier_calibration // 2)
    found += [replace(own, name="frontier-0", run=arms.predicted), few, replace(own, name=f"frontier-{FEW}", cost=FEW)]
    there = set(plugins.names("search.samplers")) | {"uniform"}
    return [
        arm
        for arm in found
        if arm.sampler in there and any(fnmatch.fnmatch(arm.name, pattern) for pattern in options.arms.split(","))
    ]


def setting(options: argparse.Namespace, arm: Arm) -> str:
    """What a row depends on beside code and seed: a row of another setting is none of this run's."""
    common = f"{options.model} {options.dtype} quick={options.quick} {arm.name} cost={arm.cost:g}"
    data = f"{arm.calibration} {arm.own} {arm.windows} {arm.slopes}"
    return f"{common} {data} {json.dumps(dict(arm.options), sort_keys=True)}"


def run_arm(arm: Arm, yard: Yardstick, seed: int, told: str) -> Row:
    start = time.perf_counter()
    meter = Meter(yard, seed)
    budgets = [yard.budget(bits) for bits in BITS]
    answers = arm.run(arm, meter, budgets)
    seconds = time.perf_counter() - start
    over = [bits for bits, budget, c in zip(BITS, budgets, answers, strict=True) if yard.total(c) > budget]
    assert not over, f"{arm.name} answers with more than {over} bits"
    return {
        "arm": arm.name,
        "sampler": arm.sampler,
        "own": arm.own,
        "seed": seed,
        "setting": told,
        "cost": meter.cost,
        "kl": [yard.held_out(choices) for choices in answers],
        "bits": [8 * yard.total(choices) / yard.weights for choices in answers],
        "choices": ["".join(map(str, choices)) for choices in answers],
        "seconds": round(seconds, 1),
        "machine": machine(),
    }


def kept(path: Path | None) -> list[Row]:
    """The rows of a file; a last line that was cut is no row."""
    if path is None or not path.exists():
        return []
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            print(f"{path}: a line is no JSON and was left out")
    return rows


def keep(path: Path | None, row: Row) -> None:
    if path is not None:
        with path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def mean(values: Sequence[float]) -> float:
    """Geometric."""
    return math.exp(statistics.fmean(math.log(max(value, 1e-12)) for value in values))


def beside(row: Row, others: Sequence[Row]) -> float:
    """A row's KL over the best of `others` at each size, geometric mean; NaN if there are none."""
    best = [min(kls) for kls in zip(*(other["kl"] for other in others), strict=True)]
    return mean([own / least for own, least in zip(row["kl"], best, strict=True)]) if best else math.nan


def ratios(rows: Sequence[Row], name: str, against: Callable[[Row], bool]) -> list[float]:
    """`beside` of an arm's rows, each against those of the same seed that `against` takes."""
    own = [row for row in rows if row["arm"] == name]
    others = [[other for other in rows if other["seed"] == row["seed"] and against(other)] for row in own]
    return [beside(row, found) for row, found in zip(own, others, strict=True) if found]


def spread(values: Sequence[float]) -> str:
    if not values:
        return "n/a"
    low, high = min(values), max(values)
    return f"{statistics.median(values):.3f}" + (f" ({low:.3f} to {high:.3f})" if len(values) > 1 else "")


def report(rows: Sequence[Row], title: str) -> None:
    cells = []
    for name in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == name]
        sampler = own[0]["sampler"]
        kls = [f"{statistics.median(column):.4f}" for column in zip(*(row["kl"] for row in own), strict=True)]
        others = ratios(rows, name, lambda other, sampler=sampler: other["sampler"] != sampler and not other["own"])
        cost = f"{statistics.median(row['cost'] for row in own):.0f}"
        cells.append([name, cost, len(own), *kls, spread([mean(row["kl"]) for row in own]), spread(others)])
    header = ["arm", "cost", "seeds", *(f"{bits:g} bits" for bits in BITS), "geometric mean", "÷ best other"]
    print_table(title, header, cells)
    print("\nKL in nats per token on held-out tokens, medians over seeds (least to most in brackets).")
    print("÷ best other: size by size over the best arm of any other sampler, geometric mean. Arms begin with exact")
    print("solutions of losses that the usual gradient proxy predicts; those with + and frontier have AutoQ's own.")
    goals = [
        (f"frontier-{FEW}", "all others", lambda other: not other["own"], 0.85),
        (f"frontier-{FEW}", "all, those with + too", lambda other: other["sampler"] != "frontier", 1.0),
        *(
            (f"frontier-{FEW // 2}", f"{name} at {MANY}", lambda other, name=name: name_of(other, name), 1.0)
            for name in LEARNERS[:2]
        ),
    ]
    for name, what, against, goal in goals:
        if found := ratios(rows, name, against):
            verdict = "reached" if statistics.median(found) <= goal else "missed"
            print(f"- {name} ÷ best of {what}: {spread(found)}; wanted at most {goal:g}: {verdict}")


def name_of(row: Row, sampler: str) -> bool:
    """Whether a row is a long one of `sampler`."""
    return bool(row["sampler"] == sampler and row["arm"].startswith(f"{sampler}-{MANY}"))


def yardstick(options: argparse.Namespace) -> None:
    wanted = all_arms(options)
    rows = [row for row in kept(options.out) if any(row.get("setting") == setting(options, arm) for arm in wanted)]
    done = {(row["arm"], row["seed"]) for row in rows}
    missing = [(seed, arm) for seed in range(options.seeds) for arm in wanted if (arm.name, seed) not in done]
    if missing:
        start = time.perf_counter()
        yard = Yardstick(spec_of(options))
        print(f"{len(yard.parameters)} variables, {yard.weights / 1e6:.1f} million weights, {machine()}")
        print(f"loaded and quantized in {time.perf_counter() - start:.0f} s", flush=True)
    for seed, arm in missing:
        row = run_arm(arm, yard, seed, setting(options, arm))
        keep(options.out, row)
        rows.append(row)
        kls = " ".join(f"{kl:.4f}" for kl in row["kl"])
        print(f"{arm.name}, seed {seed}: cost {row['cost']:g}, {row['seconds']} s, KL {kls}", flush=True)
    if rows:
        window = QUICK_TOKENS if options.quick else 512
        report(rows, f"Held-out KL at six sizes, {options.model} in {options.dtype}, a pass is {window} tokens")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--gpus", type=float, default=0)
    parser.add_argument("--out", type=Path, help="a file of JSON lines, added to")
    parser.add_argument("--seeds", type=int, default=1, help="how many, from 0")
    parser.add_argument("--arms", default="*", help="globs, separated by commas")
    parser.add_argument("--long", action="store_true", help=f"arms with a cost of {MANY} too")
    parser.add_argument("--quick", action="store_true", help=f"60 layers and windows of {QUICK_TOKENS} tokens")
    parser.add_argument("--calibration-tokens", type=int, default=2048, help=f"of others' arms at {FEW}")
    parser.add_argument(
        "--frontier-calibration", type=int, default=2048, help="calibration tokens of frontier at its full cost"
    )
    parser.add_argument("--windows", type=int, default=1, help="search windows of a trial of frontier's arms")
    parser.add_argument("--slopes", type=int, help="first trials of frontier's arms with slopes; default: its own")
    parser.add_argument("--options", default="{}", help="further options of frontier, as JSON")
    parser.add_argument("--samplers", help="for --small, --speed and --three; default: all that can")
    parser.add_argument("--trials", type=int, help="most evaluations of --small and --three")
    parser.add_argument("--many", type=int, default=5000, help="passes of --tiny's long arms")
    parser.add_argument("--minutes", type=float, default=25, help="most CPU time that a long arm of --tiny takes")
    for part in ("small", "speed", "three", "tiny"):
        parser.add_argument(f"--{part}", action="store_true")
    options = parser.parse_args()
    if options.small or options.speed:
        import _search_toys as toys

        (toys.small if options.small else toys.speed)(options)
    elif options.three:
        import _search_three as three

        three.compare(options, keep)
    elif options.tiny:
        import _search_tiny as tiny

        tiny.compare(options)
    else:
        yardstick(options)


if __name__ == "__main__":
    main()
