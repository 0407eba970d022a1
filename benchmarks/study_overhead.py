"""Controller overhead per trial: everything but the evaluation, database included.

Runs a real study through the real controller, sampler and SQLite store on a 30-block, 210-linear
Llama skeleton, with an evaluator that answers at once. What is left is ask, duplicate check, trial
row, result row, frontier update and tell.

    python benchmarks/study_overhead.py [--trials 1000] [--sampler nsga2]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from _report import print_table
from transformers import LlamaConfig, LlamaForCausalLM

from autoq.assignment import Assignment
from autoq.measurement import Measurement
from autoq.scheme import code_bits
from autoq.search.controller import create_study, run_study
from autoq.search.executors import Executor, LocalExecutor
from autoq.search.observer import Observer
from autoq.spec import StudySpec, build_spec
from autoq.store import Store, TrialRecord


class Instant:
    """An evaluator whose quality is a made-up sum over layers."""

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec

    def describe(self) -> dict[str, Any]:
        return {}

    def measure(self, assignment: Assignment, part: str) -> list[Measurement]:
        value = sum(4.0 ** -code_bits(scheme) for scheme in assignment.values())
        return [Measurement("kl_nats_per_token", value, "nats/token", "measured", part, stderr=value / 20)]  # type: ignore[arg-type]


class Clock(Observer):
    def __init__(self) -> None:
        self.times: list[float] = [time.perf_counter()]

    def trial(self, trial: TrialRecord, done: int, budget: int) -> None:
        self.times.append(time.perf_counter())


def instant(spec: StudySpec) -> Executor:
    return LocalExecutor(spec, Instant)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--trials", type=int, default=1000)
    parser.add_argument("--sampler", default="nsga2")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = LlamaConfig(
            num_hidden_layers=30,
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=4,
            vocab_size=256,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        spec = build_spec(
            {
                "model": {"id": folder},
                "target": {"name": "generic"},
                "space": {"schemes": [f"rtn-int{bits}-g64" for bits in (2, 3, 4, 5, 6, 8)]},
                "objectives": ["kl_nats_per_token", "size_bytes"],
                "sampler": {"name": options.sampler, "seeds": 0},
                "budget": {"trials": options.trials},
            }
        )
        path = Path(folder, "autoq.db")
        store = Store.open(f"sqlite:///{path}")
        study = create_study(store, spec)
        clock = Clock()
        start = time.perf_counter()
        run_study(store, study.id, clock, instant)
        total = time.perf_counter() - start
        gaps = [1e3 * (b - a) for a, b in zip(clock.times[1:], clock.times[2:], strict=False)]
        megabytes = sum(p.stat().st_size for p in Path(folder).glob("autoq.db*")) / 1e6
        start = time.perf_counter()
        run_study(store, study.id, Observer(), instant)
        resume = time.perf_counter() - start
    late = gaps[-len(gaps) // 10 :]
    title = f"Controller, sampler {options.sampler} and SQLite: 210 layers × 6 schemes, {options.trials} trials"
    rows = [
        ("per trial, median", f"{statistics.median(gaps):.1f} ms"),
        ("per trial, median of the last tenth", f"{statistics.median(late):.1f} ms"),
        ("per trial, 95th percentile of the last tenth", f"{sorted(late)[int(0.95 * len(late))]:.1f} ms"),
        ("whole study", f"{total:.1f} s"),
        ("opening the finished study again", f"{resume:.1f} s"),
        ("database", f"{megabytes:.1f} MB"),
    ]
    print_table(title, ("what", "value"), rows)


if __name__ == "__main__":
    main()
