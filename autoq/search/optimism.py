"""Optimism: how much better frontier points looked on the search part than on the report part.

Of many noisy values the best are chosen, and the best are partly lucky: the winner's curse. Two texts
differ besides, which moves every assignment. Baselines were not chosen by their values, so what they show
is the difference of the texts, and what frontier points show beyond it is the selection's:

    optimism = exp( mean over frontier points of log(report / search) − the same mean over baselines )

A ratio, because losses span decades; above 1 the search part flattered the frontier. (For objectives that
are to be maximized, search / report.) The error is that of drawing other blocks of tokens, by the delta method:
all points were evaluated on the same ones, so what moves both groups alike cancels out. Blocks are longer
here than for a single pair, as a topic may suit one group for pages: on SmolLM2 the error was 0.018 with blocks
of 16 tokens, 0.020 with 64, 0.027 with 256 and 0.029 with 512. Where values per token are not stored, it is
that of the scatter of the points' ratios.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autoq.measurement import Part
from autoq.objectives import QualityObjective
from autoq.search.paging import each_trial
from autoq.statistics import block_sums, error_of_mean
from autoq.store import Store, TrialRecord

NOTHING_LOST = "unquantized"  # what little it loses is rounding, which knows no text
BLOCK_TOKENS = 256
PARTS: tuple[Part, Part] = ("search", "report")


def optimism(store: Store, study_id: int, name: str, objective: QualityObjective) -> dict[str, Any] | None:
    """`{"objective", "ratio", "stderr", "frontier": {number: report/search}, "baselines": {number: …}}`.

    None where no frontier point or no baseline has the objective on both parts and above zero.
    """
    frontier, baselines = [], []
    for trial in each_trial(store, study_id, ["complete"]):
        values = [trial.measurements.get((name, part)) for part in PARTS]
        if all(m is not None and m.value > 0 for m in values):
            if trial.baseline == NOTHING_LOST or trial.parent is not None:
                continue  # what was trained was not selected
            if trial.baseline is not None:
                baselines.append(trial)
            elif trial.on_frontier:
                frontier.append(trial)
    if not frontier or not baselines:
        return None
    sign = 1.0 if objective.direction == "minimize" else -1.0
    logs = {trial.number: sign * _log_ratio(trial, name) for trial in (*frontier, *baselines)}
    groups = [[logs[trial.number] for trial in group] for group in (frontier, baselines)]
    difference = statistics.fmean(groups[0]) - statistics.fmean(groups[1])
    weights = {t.number: 1 / len(frontier) for t in frontier} | {t.number: -1 / len(baselines) for t in baselines}
    error = _error_of_texts(store, study_id, (*frontier, *baselines), weights, name, objective)
    if error is None:
        error = _error_of_scatter(*groups)
    ratio = math.exp(difference)
    return {
        "objective": name,
        "ratio": ratio,
        "stderr": None if error is None else ratio * error,
        "frontier": {str(trial.number): math.exp(logs[trial.number]) for trial in frontier},
        "baselines": {str(trial.number): math.exp(logs[trial.number]) for trial in baselines},
    }


def _log_ratio(trial: TrialRecord, name: str) -> float:
    (search,), (report,) = (trial.values([name], part) for part in PARTS)
    return math.log(report / search)


def _error_of_texts(
    store: Store,
    study_id: int,
    trials: Sequence[TrialRecord],
    weights: Mapping[int, float],
    name: str,
    objective: QualityObjective,
) -> float | None:
    """Standard error of Σ weight · log(report / search), None without all values per token."""
    variance = 0.0
    for part in PARTS:
        combined, counted = None, None
        for trial in trials:
            values = store.token_values(study_id, trial.number, name, part)
            if values is None:
                return None
            sums, counts = block_sums(values, BLOCK_TOKENS)
            if counted is not None and not np.array_equal(counts, counted):
                return None
            mean, _ = error_of_mean(sums, counts)
            # d log(value) of a change of the mean over tokens, by the delta method.
            slope = objective.transform(mean, 1.0)[1] / trial.measurements[name, part].value
            influence = weights[trial.number] * slope * (sums - mean * counts)
            combined, counted = influence if combined is None else combined + influence, counts
        assert combined is not None and counted is not None
        variance += error_of_mean(combined, counted)[1] ** 2
    return math.sqrt(variance)


def _error_of_scatter(frontier: Sequence[float], baselines: Sequence[float]) -> float | None:
    """Of the difference of two means, with the scatter of both groups pooled; None for three points or fewer."""
    freedom = len(frontier) + len(baselines) - 2
    if freedom < 2:
        return None
    squares = sum((x - statistics.fmean(group)) ** 2 for group in (frontier, baselines) for x in group)
    return math.sqrt(squares / freedom * (1 / len(frontier) + 1 / len(baselines)))
