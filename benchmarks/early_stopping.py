"""What a trial costs in forward passes once hopeless candidates are stopped and hidden states are reused.

Runs whole studies of the same spec four ways, for several samplers and seeds:

  full        every trial is evaluated on all search tokens, from the first block on
  stopping    `budget.stop_confidence` as by default
  reuse       from the first block that differs from what was evaluated before
  both        the product as it is

Passes are forward passes over the search part per trial, of the sampler's own trials and of all trials (baselines
and seeds are never stopped); slopes, a forward and a backward pass that counts two, stand beside them. Quality is
the frontier's hypervolume over log KL and size: the mean of log(worst KL / KL) over sizes from the lightest to the
heaviest assignment, in nats, so 0.01 more is 1 % less KL. The frontier is chosen on the search part; `report` values
the same points on text that no search saw. `vs full` is its mean difference, seed by seed, and that difference's
standard error. Frontiers of `full` and `reuse` are equal, as are those of `stopping` and `both`, where reuse is exact.

    python benchmarks/early_stopping.py [--model demo:smollm2] [--samplers frontier,nsga2,evolution]
    python benchmarks/early_stopping.py --trials 96 --tokens 4096 --window 512 --seeds 3
    python benchmarks/early_stopping.py --samplers nsga2 --arms full,both --exclude '*.k_proj,*.v_proj'

`--db FILE` keeps the studies for a closer look; `--arms full,both` leaves the others out.
"""

from __future__ import annotations

import argparse
import math
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _report import print_table

from autoq.assignment import Assignment
from autoq.evaluation import SLOPE_TOKENS, Evaluator
from autoq.objectives import computed
from autoq.search.controller import create_study, run_study
from autoq.search.executors import Executor, LocalExecutor
from autoq.search.samplers import SLOPES
from autoq.search.setup import Problem, pose
from autoq.spec import StudySpec, build_spec
from autoq.store import Store, TrialRecord

KL, SIZE = "kl_nats_per_token", "size_bytes"
ARMS = {"full": (False, False), "stopping": (True, False), "reuse": (False, True), "both": (True, True)}
SCHEMES = [f"rtn-int{bits}-g64" for bits in (2, 3, 4, 5, 6, 8)]
BACKWARD = 2  # forward passes that a backward pass counts as

Point = tuple[float, float, float]  # bytes, KL on the search part, KL on the report part


@dataclass(frozen=True)
class Outcome:
    """One study: passes over the search part of its trials, and its frontier by rising size."""

    sampled: Sequence[float]  # of the sampler's own trials
    passes: Sequence[float]  # of all trials
    slopes: float  # forward and backward passes for slopes, per trial of the study
    stopped: float  # share of the sampler's trials
    front: Sequence[Point]


def spec_of(options: argparse.Namespace, sampler: str, seed: int, stopping: bool) -> StudySpec:
    """The study's spec; arms differ in `stop_confidence` alone."""
    confidence = {} if stopping else {"stop_confidence": None}
    return build_spec(
        {
            "name": f"{sampler}-{seed}-{'stopping' if stopping else 'full'}",
            "model": {"id": options.model, "dtype": options.dtype},
            "data": {
                "search_tokens": options.tokens,
                "report_tokens": options.tokens,
                "window_tokens": options.window,
            },
            "target": {"name": "generic"},
            "space": {"schemes": SCHEMES, "exclude": list(filter(None, options.exclude.split(",")))},
            "objectives": [KL, SIZE],
            "sampler": {"name": sampler, "seed": seed},
            "budget": {"trials": options.trials, **confidence},
        }
    )


def run(store: Store, spec: StudySpec, evaluator: Evaluator, reuse: bool) -> Outcome:
    """Run a study from nothing but the bank and the table of sensitivities."""
    evaluator._kept_states = None
    if not reuse:
        evaluator._states.chain = None

    def executor(spec: StudySpec) -> Executor:
        return LocalExecutor(spec, lambda _: evaluator)

    study = create_study(store, spec)
    run_study(store, study.id, None, executor)
    return outcome(store.trials(study.id, states=["complete", "stopped"]), store.frontier(study.id), evaluator)


def outcome(trials: Sequence[TrialRecord], front: Sequence[TrialRecord], evaluator: Evaluator) -> Outcome:
    windows, tokens = evaluator.parts.search.shape
    sloped = sum(SLOPES in trial.sampler_attrs for trial in trials)
    share = max(1, SLOPE_TOKENS // tokens) / windows
    mine = [trial for trial in trials if trial.origin == "sampler"]
    return Outcome(
        [passes(trial) for trial in mine],
        [passes(trial) for trial in trials],
        sloped * min(1.0, share) * (1 + BACKWARD) / len(trials),
        sum(trial.state == "stopped" for trial in mine) / max(len(mine), 1),
        sorted((t.values([SIZE])[0], t.values([KL])[0], t.measurements[KL, "report"].value) for t in front),
    )


def passes(trial: TrialRecord) -> float:
    found = trial.measurements[KL, "search"].detail["forward_passes"]
    assert isinstance(found, float)
    return found


def span(problem: Problem) -> tuple[float, float]:
    """Bytes of the lightest and of the heaviest assignment."""
    variables = problem.space.variables

    def size(assignment: Assignment) -> float:
        found = computed(problem.objectives, problem.info, assignment, None, problem.spec.target, problem.target)
        return next(m.value for m in found if m.objective == SIZE)

    ends = ([0] * len(variables), [len(v.choices) - 1 for v in variables])  # choices are sorted by bytes
    low, high = (size(problem.space.assignment(indices)) for indices in ends)
    return low, high


def hypervolume(front: Sequence[Point], column: int, worst: float, low: float, high: float) -> float:
    """Mean of log(worst / KL) over sizes from `low` to `high` bytes; KL is that in `column`.

    At a size stands the heaviest point that fits; before the first the worst.
    """
    total = 0.0
    within = [point for point in front if point[0] < high and point[column] > 0]
    for point, end in zip(within, [*(other[0] for other in within[1:]), high], strict=True):
        total += math.log(worst / point[column]) * (end - max(point[0], low))
    return total / (high - low)


def compared(differences: Sequence[float]) -> str:
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return f"{mean:+.4f}"
    return f"{mean:+.4f} ± {statistics.stdev(differences) / len(differences) ** 0.5:.4f}"


def rows(found: dict[tuple[str, str], list[Outcome]], low: float, high: float) -> Iterable[Sequence[Any]]:
    every = [point for outcomes in found.values() for each in outcomes for point in each.front]
    worst = [max(point[column] for point in every) for column in (1, 2)]

    def volumes(outcomes: Sequence[Outcome], column: int) -> list[float]:
        return [hypervolume(each.front, column, worst[column - 1], low, high) for each in outcomes]

    def mean(outcomes: Sequence[Outcome], of: Callable[[Outcome], float]) -> float:
        return statistics.fmean(of(each) for each in outcomes)

    for (sampler, arm), outcomes in found.items():
        report, whole = volumes(outcomes, 2), found.get((sampler, "full"))
        yield (
            sampler,
            arm,
            f"{mean(outcomes, lambda each: each.stopped):.0%}",
            f"{mean(outcomes, lambda each: statistics.fmean(each.sampled or [0.0])):.2f}",
            f"{mean(outcomes, lambda each: statistics.fmean(each.passes)):.2f}",
            f"{mean(outcomes, lambda each: each.slopes):.2f}",
            f"{statistics.fmean(volumes(outcomes, 1)):.3f}",
            f"{statistics.fmean(report):.3f}",
            compared([a - b for a, b in zip(report, volumes(whole, 2), strict=True)]) if whole else "",
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="demo:smollm2")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--samplers", default="frontier,nsga2,evolution")
    parser.add_argument("--arms", default=",".join(ARMS))
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--exclude", default="", help="patterns of layers that stay as they are, with commas")
    parser.add_argument("--db", type=Path)
    options = parser.parse_args()
    found: dict[tuple[str, str], list[Outcome]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        store = Store.open(f"sqlite:///{options.db or Path(folder, 'autoq.db')}")
        base = spec_of(options, options.samplers.split(",")[0], 0, True)
        evaluator = Evaluator(base)
        for sampler in options.samplers.split(","):
            for arm in options.arms.split(","):
                stopping, reuse = ARMS[arm]
                for seed in range(options.seeds):
                    spec = spec_of(options, sampler, seed, stopping)
                    found[sampler, arm].append(run(store, spec, evaluator, reuse))
                    print(f"{sampler} {arm} {seed}: {statistics.fmean(found[sampler, arm][-1].passes):.3f}", flush=True)
    low, high = span(pose(base))
    title = f"Trials of {options.model}, {options.tokens} tokens in windows of {options.window}, "
    header = ("sampler", "arm", "stopped", "passes, sampler's", "passes, all", "slopes", "search", "report", "vs full")
    print_table(title + f"{options.trials} trials, {options.seeds} seeds", header, list(rows(found, low, high)))


if __name__ == "__main__":
    main()
