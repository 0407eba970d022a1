"""A study past these machines: the real controller, sampler and store under a thousand simulated workers.

Workers exist in virtual time (`_simulation.py`); their trials last as long as those of the demo's study did on two
cores (`recorded_demo.json`, or `--study NAME --of DATABASE` for another one), times `--work`. Some die and some hang.
What the controller and the store take is real and is charged to virtual time, so that a controller that is too slow
leaves workers idle.

    python benchmarks/simulation.py [--workers 1000] [--trials 100000] [--sampler random] [--db URL] [--clock cpu]
    python benchmarks/simulation.py --sampler frontier --trials 10000 --work 60
    python benchmarks/simulation.py --lengths 1,4,10,30 --trials 8000
    python benchmarks/simulation.py --plan

`--lengths` runs one study for each mean length of a trial evaluated in full, in seconds, and prints one table.
A worker is busy while it runs a trial, whatever comes of it, and useful while it runs one that comes to a result;
otherwise it loads, in the place of one that died or was ended with its trial, or is idle: it has nothing to run.
`--clock cpu` charges the controller's CPU time instead of wall time, for a machine that others use; what the disk or a
database server takes is then left out. `--plan` runs nothing: it prints how costs grow and what a model of 70 billion
weights on eight nodes of eight GPUs would take, by the arithmetic of `autoq.search.cost_model`, with its assumptions.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import resource
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import sqlalchemy as sa
from _report import print_table
from _simulation import (
    QUALITY,
    Faults,
    Recording,
    SimulatedEvaluator,
    SimulatedExecutor,
    Tally,
    median,
    percentile,
    write_skeleton,
)

from autoq.search import cost_model as cost
from autoq.search.controller import create_study, run_study
from autoq.search.observer import Observer
from autoq.search.optuna_study import AskTell
from autoq.spec import StudySpec, build_spec
from autoq.store import Store, StudyRecord, TrialRecord

BITS = (2, 3, 4, 5, 6, 8)
NEAR = 0.99  # of the final hypervolume, at which a study counts as having its frontier


@dataclass
class Watch(Observer):
    """What happens when, in virtual seconds, and how the process grows."""

    executor: SimulatedExecutor | None = None
    ends: list[tuple[float, int, float]] = field(default_factory=list)  # when, how many, and what the controller took
    points: list[tuple[float, float, float]] = field(default_factory=list)
    stage_seconds: dict[str, float] = field(default_factory=dict)
    stage_processor: dict[str, float] = field(default_factory=dict)
    tenths: list[tuple[int, float]] = field(default_factory=list)

    def stage(self, name: str, total: int | None) -> None:
        if self.executor is not None:
            self.stage_seconds[name] = self.executor.tally.controller
            self.stage_processor[name] = self.executor.tally.processor

    def trial(self, trial: TrialRecord, done: int, budget: int) -> None:
        assert self.executor is not None
        self.ends.append((self.executor.now, done, self.executor.tally.controller))
        if trial.state == "complete" and trial.feasible:
            kl, size = trial.values([QUALITY, "size_bytes"])
            self.points.append((self.executor.now, kl, size))
        if done % max(1, budget // 10) == 0:
            self.tenths.append((done, self.executor.tally.controller))


def spec_of(model: Path, options: argparse.Namespace) -> StudySpec:
    """210 linears of SmolLM2's shapes with six choices each."""
    budget: dict[str, Any] = {"trials": options.trials, "report_points": 8, "trial_time": f"{options.limit:g}s"}
    if options.no_stopping:
        budget["stop_confidence"] = None
    return build_spec(
        {
            "model": {"id": str(model)},
            "data": {"search_tokens": 2048, "window_tokens": 512},
            "target": {"name": "generic"},
            "space": {"schemes": [f"rtn-int{bits}-g64" for bits in BITS]},
            "objectives": [QUALITY, "size_bytes"],
            "sampler": {"name": options.sampler, "seed": options.seed},
            "budget": budget,
            "workers": {"executor": "ray", "count": options.workers},
        }
    )


def skeleton(folder: Path, blocks: int = 30) -> Path:
    """SmolLM2's shapes without its weights."""
    from transformers import LlamaConfig

    shape = {"num_hidden_layers": blocks, "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152}
    heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}
    return write_skeleton(LlamaConfig(**shape, **heads), folder)


class TimedAsks:
    """Times every proposal of a sampler while it is entered."""

    def __init__(self, clock: Any) -> None:
        self.clock, self.seconds = clock, []

    def __enter__(self) -> TimedAsks:
        self._ask = own = AskTell.ask

        def ask(this: AskTell, number: int) -> Any:
            start = self.clock()
            try:
                return own(this, number)
            finally:
                self.seconds.append(self.clock() - start)

        AskTell.ask = ask  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        AskTell.ask = self._ask  # type: ignore[method-assign]


def database_bytes(store: Store) -> int:
    """What the database takes on the disk."""
    engine = store._database._engine
    if engine.dialect.name == "postgresql":
        with engine.connect() as connection:
            return int(connection.execute(sa.text("SELECT pg_database_size(current_database())")).scalar_one())
    path = Path(str(engine.url.database))
    return sum(file.stat().st_size for file in path.parent.glob(path.name + "*"))


def reached(points: list[tuple[float, float, float]], share: float) -> float:
    """The virtual second at which the area in log KL and size that points dominate was so much of the last one."""
    import numpy as np

    if not points:
        return float("nan")
    logs = np.log(np.maximum([p[1] for p in points], 1e-12))
    sizes = np.array([p[2] for p in points])
    x, y = (logs - logs.min()) / max(np.ptp(logs), 1e-12), (sizes - sizes.min()) / max(np.ptp(sizes), 1e-12)

    def area(count: int) -> float:
        found, level = 0.0, 1.1
        for i in np.lexsort((y[:count], x[:count])):
            if y[i] < level:
                found, level = found + (1.1 - x[i]) * (level - y[i]), y[i]
        return float(found)

    wanted, low, high = share * area(len(points)), 1, len(points)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if area(middle) >= wanted else (middle + 1, high)
    return points[low - 1][0]


@dataclass(frozen=True)
class Run:
    """A study that has run: what was seen of it, and by how many bytes its database and this process have grown; the
    most that the process had is its peak."""

    study: StudyRecord
    watch: Watch
    tally: Tally
    asks: list[float]
    database: int
    growth: int
    peak: int

    @property
    def results(self) -> int:
        """How many trials have ended."""
        return len(self.watch.ends)

    @property
    def searching(self) -> float:
        """Seconds that the controller took while it searched, by the clock that was chosen."""
        return self.watch.stage_seconds["report"] - self.watch.stage_seconds["search"]

    @property
    def processor(self) -> float:
        """CPU seconds of its thread for the same."""
        return self.watch.stage_processor["report"] - self.watch.stage_processor["search"]


def simulate(store: Store, spec: StudySpec, recording: Recording, options: argparse.Namespace) -> Run:
    """Run the study."""
    clock = time.thread_time if options.clock == "cpu" else time.perf_counter
    watch, process = Watch(), psutil.Process()
    study = create_study(store, spec)
    empty = database_bytes(store)
    gc.collect()
    before = process.memory_info().rss

    def make(spec: StudySpec) -> SimulatedExecutor:
        evaluator = SimulatedEvaluator(spec, recording, options.seed)
        faults = Faults(options.crashes, options.hangs, options.load)
        watch.executor = SimulatedExecutor(spec, evaluator, faults, seed=options.seed, clock=clock)
        return watch.executor

    with TimedAsks(clock) as asks:
        run_study(store, study.id, watch, make)
    assert watch.executor is not None
    growth = process.memory_info().rss - before
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    grown = database_bytes(store) - empty
    return Run(study, watch, watch.executor.tally, asks.seconds, grown, growth, peak)


def figures(store: Store, run: Run, options: argparse.Namespace) -> dict[str, str]:
    """Figures by name."""
    watch, tally, searching = run.watch, run.tally, run.searching
    stays = [stay for stay in tally.stays if stay.key.startswith("trial-")]
    first, last = min(s.start for s in stays), watch.ends[-1][0]
    # While all have work: neither the first round, nor the last trials, for which there are fewer than workers.
    full = [each for each in watch.ends if options.workers <= each[1] <= options.trials - options.workers]
    (begin, a, before), (end, b, after) = (full[0], full[-1]) if len(full) > 1 else ((first, 0, 0.0), watch.ends[-1])
    busy, loading = (share(options.workers, begin, end) for share in (tally.busy, tally.loading))
    waits = [1e3 * stay.waited for stay in stays[options.workers :]]
    late = run.asks[-max(1, len(run.asks) // 10) :]
    states = {s: len(store.trials(run.study.id, [s])) for s in ("complete", "stopped", "failed", "duplicate")}
    return {
        "results a second that controller, sampler and store sustain": f"{run.results / searching:.0f}",
        "controller, a result": f"{1e3 * searching / run.results:.2f} ms",
        "the same, last tenth": f"{1e3 * _last_tenth(watch, searching):.2f} ms",
        "results a second that the workers make": f"{(b - a) / (end - begin):.0f}",
        "controller busy": f"{(after - before) / (end - begin):.0%}",
        "workers busy": f"{busy:.1%}",
        "useful": f"{tally.useful(options.workers, begin, end):.1%}",
        "loading": f"{loading:.1%}",
        "idle": f"{1 - busy - loading:.1%}",
        "a worker waits for its next trial, p50, p95": f"{median(waits):.1f}, {percentile(waits, 0.95):.1f} ms",
        "a proposal, last tenth, p50, p95": f"{1e3 * median(late):.1f}, {1e3 * percentile(late, 0.95):.1f} ms",
        "a trial, mean": f"{sum(stay.end - stay.start for stay in stays) / len(stays):.1f} s",
        "virtual time": f"{last - first:.0f} s",
        f"virtual time to {NEAR:.0%} of the hypervolume": f"{reached(watch.points, NEAR) - first:.0f} s",
        "complete, stopped, failed, duplicate": ", ".join(str(count) for count in states.values()),
        "workers that died, hung": f"{tally.crashes}, {tally.hangs}",
        "frontier": str(len(store.frontier(run.study.id))),
        "controller memory, growth": f"{run.growth / 1e6:.0f} MB",
        "controller memory, whole process at most": f"{run.peak / 1e6:.0f} MB",
        "database": f"{run.database / 1e6:.0f} MB",
    }


def _last_tenth(watch: Watch, searching: float) -> float:
    if len(watch.tenths) < 2:
        return searching / len(watch.ends)
    (a, before), (b, after) = watch.tenths[-2:]
    return (after - before) / (b - a) if b > a else searching / len(watch.ends)


COMPARED = (
    "a trial, mean", "workers busy", "useful", "loading", "idle", "results a second that the workers make",
    "controller busy", "a worker waits for its next trial, p50, p95",
    "a proposal, last tenth, p50, p95",
)  # fmt: skip


def print_lengths(recording: Recording, model: Path, options: argparse.Namespace) -> None:
    """One study for each length of trials, on SQLite."""
    header, rows = ["evaluated in full, s", *COMPARED], []
    for length in options.lengths:
        with tempfile.TemporaryDirectory() as folder, Store.open(f"{folder}/autoq.db") as store:
            run = simulate(store, spec_of(model, options), recording.scaled(length / recording.per_pass), options)
            found = figures(store, run, options)
        rows.append([f"{length:g}", *(found[name] for name in COMPARED)])
    title = f"{options.trials} trials, {options.workers} workers, {options.sampler}, controller by {options.clock} time"
    print_table(title, header, rows)


def print_plan() -> None:
    """Predictions, and what they assume."""
    software, bits = cost.Software(), (3.3, 4.3, 5.3, 6.3, 8.0)
    header = (
        "what",
        "210 layers, 6 choices, 10,000 trials",
        "10 × layers",
        "10 × choices",
        "10 × trials",
        "10 × tokens",
    )
    print_table("Predicted: how costs grow", header, cost.growth(software))
    for model, trials in ((cost.LLAMA_8B, 10_000), (cost.LLAMA_70B, 10_000)):
        study = cost.Study(model, bits, trials, given_up=0.2)
        rows = cost.plan(study, cost.ONE_H100, software, nodes=8, devices=8)
        print_table(f"Predicted: {model.name}, 8 nodes × 8 {cost.ONE_H100.name}", ("what", "predicted", "how"), rows)
    print(f"\nAssumed of devices: {cost.ONE_H100.origin}.")
    print("Assumed of the search: stopping saves a fifth of the tokens; five choices, gptq at 3 to 6 bits and 8.")
    print("Not there yet: a worker runs on one device, so a model that needs several has no worker that holds it.")
    print(f"Of AutoQ: {software}.")


def add_options(parser: argparse.ArgumentParser) -> None:
    """What tells of the study and of its workers."""
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--trials", type=int, default=100_000)
    parser.add_argument("--sampler", default="random")
    parser.add_argument("--work", type=float, default=5.0, help="times the demo's work a trial; 1 is a second")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds that a trial may take")
    parser.add_argument("--crashes", type=float, default=0.002, help="share of dispatches")
    parser.add_argument("--hangs", type=float, default=0.0005, help="share of dispatches")
    parser.add_argument("--load", type=float, default=20.0, help="seconds that a new worker takes to load")
    parser.add_argument("--no-stopping", action="store_true", help="evaluate every candidate in full")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--lengths", type=lambda text: [float(part) for part in text.split(",")], help="see above")
    parser.add_argument("--db", help="a SQLAlchemy URL; default: SQLite in a temporary folder")
    parser.add_argument("--study", help="record durations from this study")
    parser.add_argument("--of", help="of this database")
    parser.add_argument("--plan", action="store_true", help="print predictions and run nothing")
    options = parser.parse_args()
    if options.plan:
        print_plan()
        return
    if options.study:
        with Store.open(options.of or "autoq.db", create=False) as store:
            recording = Recording.of(store, options.study)
    else:
        recorded = Path(__file__).parent / "recorded_demo.json"
        recording = Recording.from_json(json.loads(recorded.read_text()))
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder, "model")
        model.mkdir()
        skeleton(model)
        if options.lengths:
            print_lengths(recording, model, options)
            return
        spec = spec_of(model, options)
        with Store.open(options.db or f"{folder}/autoq.db") as store:
            rows = figures(store, simulate(store, spec, recording.scaled(options.work), options), options)
            kind = store._database._engine.dialect.name
    title = (
        f"{options.trials} trials on {options.workers} simulated workers, {options.sampler}, {kind}, 210 layers × "
        f"{len(BITS)}, controller by {options.clock} time"
    )
    print_table(title, ("what", "value"), [(name, value) for name, value in rows.items()])
    sys.stdout.flush()
    os._exit(0)  # a hundred thousand trials take seconds to free


if __name__ == "__main__":
    main()
