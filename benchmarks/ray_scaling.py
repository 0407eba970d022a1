"""Two Ray workers with a thread each against one: trials a minute; and Ray's share of a trial's time.

The demo's model with a target that times nothing, so that a trial is a forward pass over `--tokens` tokens. Both
studies are the same spec but for `workers.count`; what counts is the search alone, between the first and the last
trial's end after `--warm` trials, with the bank filled by a study before. The machine's cores should have nothing else
to do.

Ray's share is what the controller sees of a job beyond what the worker says it took: packing, sending, waking,
unpacking. It is measured with jobs of one second that carry what a trial carries, an assignment and a rival's values
per token.

    python benchmarks/ray_scaling.py [--trials 48] [--tokens 1024]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import numpy as np
from _report import print_table

from autoq.assignment import Assignment
from autoq.scheme import parse_scheme
from autoq.search.controller import create_study, run_study
from autoq.search.executors import Job
from autoq.search.observer import Observer
from autoq.spec import StudySpec, build_spec
from autoq.statistics import Rival
from autoq.store import Store, TrialRecord
from autoq.workers.executor import RayExecutor

SCHEMES = ["rtn-int4-g64", "rtn-int6-g64", "rtn-int8-channel-sym"]


class Ends(Observer):
    """When trials ended, and how long each took on its worker."""

    def __init__(self) -> None:
        self.ends: list[float] = []
        self.seconds: list[float] = []

    def trial(self, trial: TrialRecord, done: int, budget: int) -> None:
        if trial.state in ("complete", "stopped", "failed"):
            self.ends.append(time.perf_counter())
            self.seconds.append(trial.seconds or 0.0)


class Sleeper:
    """An evaluator of which a job takes a second and no processor."""

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec

    def work(self, assignment: Assignment, rival: Rival, seconds: float) -> Any:
        time.sleep(seconds)
        return rival.values


def spec_of(options: argparse.Namespace, count: int, trials: int) -> StudySpec:
    return build_spec(
        {
            "model": {"id": options.model},
            "data": {"search_tokens": options.tokens, "window_tokens": 512, "report_tokens": 512},
            "target": {"name": "generic"},
            "space": {"schemes": SCHEMES},
            "objectives": ["kl_nats_per_token", "size_bytes"],
            # No seeds and no stopping: every trial is one whole pass, and both studies do the same work.
            "sampler": {"name": "random", "seeds": 0},
            "budget": {"trials": trials, "stop_confidence": None, "report_points": 1},
            "workers": {"executor": "ray", "count": count, "cpus": 1},
        }
    )


def rate(store: Store, options: argparse.Namespace, count: int, trials: int) -> tuple[float, float]:
    """Trials a minute, and the median seconds of a trial on its worker."""
    ends = Ends()
    run_study(store, create_study(store, spec_of(options, count, trials)).id, ends)
    warm = options.warm
    return 60 * (len(ends.ends) - 1 - warm) / (ends.ends[-1] - ends.ends[warm]), statistics.median(ends.seconds[warm:])


def ray_share(options: argparse.Namespace, jobs: int, seconds: float = 1.0) -> list[float]:
    """For each of `jobs` jobs in turn, seconds from submission to result beyond what the worker took."""
    spec = spec_of(options, 1, 1)
    layers = {f"model.layers.{b}.self_attn.{k}_proj": parse_scheme(SCHEMES[0]) for b in range(53) for k in "qkvo"}
    rival = Rival(0, {"kl_nats_per_token": np.random.default_rng(0).random((4, 512), dtype=np.float32)}, 0.99)
    arguments = {"assignment": Assignment(layers), "rival": rival, "seconds": seconds}
    found = []
    with RayExecutor(spec, Sleeper) as executor:  # type: ignore[arg-type]
        for number in range(jobs + 1):
            start = time.perf_counter()
            executor.submit(Job(f"trial-{number}", "work", arguments))
            result = executor.next()
            assert result is not None
            assert result.failure is None, result.failure
            found.append(time.perf_counter() - start - result.seconds)
    return found[1:]  # the first waits for the worker


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--trials", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--warm", type=int, default=6)
    parser.add_argument("--jobs", type=int, default=20)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Store.open(str(Path(folder, "autoq.db"))) as store:
        rate(store, options, 1, options.warm + 4)  # what is quantized once, is
        one, alone = rate(store, options, 1, options.trials)
        two, beside = rate(store, options, 2, options.trials)
        share = ray_share(options, options.jobs)
    rows = [
        ("trials a minute, one worker", f"{one:.1f}"),
        ("trials a minute, two workers", f"{two:.1f}"),
        ("two against one", f"{two / one:.2f} ×"),
        ("a trial on its worker, alone, beside another", f"{alone:.2f}, {beside:.2f} s"),
        ("Ray, of a trial of one second, median, most", f"{statistics.median(share):.2%}, {max(share):.2%}"),
    ]
    print_table(f"{options.model}, {options.tokens} tokens, a thread each", ("what", "value"), rows)


if __name__ == "__main__":
    main()
