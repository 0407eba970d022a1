"""A survey: the first phase of a study alone. Sensitivities of all layers, and the frontier they predict.

Everything in it is a prediction: losses come from the curvature proxy, an assignment's is the sum over
its layers, and the best assignment for a budget is solved exactly under that sum. Below 4 bits true
losses are no longer additive, so there it ranks better than it measures.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from autoq.assignment import Assignment
from autoq.kv_cache import KeyValue
from autoq.layer import Layer
from autoq.scheme import Keep
from autoq.search.budget import frontier
from autoq.search.executors import Executor, Job, make_executor
from autoq.search.observer import Observer
from autoq.search.sensitivity import Losses, gather
from autoq.search.setup import Problem, baselines, cache_bytes, pose
from autoq.search.stages import run_job
from autoq.spec import StudySpec
from autoq.store import Store

BUDGETS = 12  # sizes at which the predicted frontier is shown, besides those of the baselines


@dataclass(frozen=True)
class Point:
    """The assignment of least predicted loss within a budget of `budget_bytes`, of the survey's `axis`.

    Where the budget is a uniform baseline's size, `baseline` names it and `baseline_loss` is its own
    predicted loss. `exact` says whether the solution is proved to be the best.
    """

    budget_bytes: float
    size_bytes: float
    bits_per_weight: float
    loss: float
    exact: bool
    baseline: str | None = None
    baseline_loss: float | None = None


@dataclass(frozen=True)
class Survey:
    """Predicted losses in `unit`, bytes per layer and scheme, and the predicted frontier, smallest first.

    `kept` are the bytes of each layer as it is. KV caches stand among the layers, with the bytes of the target's
    workload. `axis` is what budgets are of: the study's first quantity in bytes.
    """

    model: str
    unit: str
    layers: Losses
    sizes: Mapping[str, Mapping[str, int]]
    kept: Mapping[str, int]
    frontier: list[Point]
    axis: str = "size_bytes"

    def to_json(self) -> dict[str, Any]:
        """`{"model", "kind", "unit", "layers": {layer: {scheme: loss}}, "sizes", "axis", "frontier"}`."""
        return {
            "model": self.model,
            "kind": "predicted",
            "unit": self.unit,
            "layers": self.layers,
            "sizes": {layer: dict(sizes) for layer, sizes in self.sizes.items()},
            "axis": self.axis,
            "frontier": [asdict(point) for point in self.frontier],
        }


def survey(
    store: Store,
    spec: StudySpec,
    observer: Observer | None = None,
    make: Callable[[StudySpec], Executor] = make_executor,
) -> Survey:
    """Calibrate, quantize every searched layer under each of its choices, and predict.

    No study is made. The sensitivities are kept in `store` for every later study of the same model and
    calibration data. Raises `BadInput` for what does not fit, before anything is loaded.
    """
    observer = observer or Observer()
    problem = pose(spec)
    observer.stage("load", 1)
    with make(spec) as executor:
        run_job(executor, Job("describe", "describe"))
        observer.advance()
        choices = {name: [str(s) for s in schemes] for name, schemes in problem.space.choices.items()}
        losses = gather(choices, spec.target.name, store, executor, observer)
    sizes, kept = _bytes(problem)
    unit = "1-cos" if problem.info.task == "encoder" else "nats/token"
    points = predicted_frontier(problem, losses)
    return Survey(spec.model.id, unit, losses, sizes, kept, points, next(iter(problem.sizes)))


def _bytes(problem: Problem) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Name of a layer or cache -> scheme -> bytes, and name -> bytes as it is; of a cache those of the whole batch."""
    sizes, kept = cache_bytes(problem), {name: own["keep"] for name, own in cache_bytes(problem).items()}
    for variable in problem.space.variables:
        for layer in variable.members:
            if isinstance(layer, Layer):
                schemes = [scheme for scheme in variable.choices if not isinstance(scheme, KeyValue)]
                sizes[layer.name] = {str(scheme): layer.nbytes(scheme) for scheme in schemes}
                kept[layer.name] = layer.nbytes(Keep())
    return sizes, kept


def predicted_frontier(problem: Problem, losses: Losses, count: int = BUDGETS) -> list[Point]:
    """Exact solutions at `count` even budgets of bytes and at those of the baselines.

    A baseline that uses a scheme beyond the study's choices has no prediction and is left out.
    """
    variables = problem.space.variables
    cost = [[sum(losses[part.name][str(s)] for part in v.members) for s in v.choices] for v in variables]
    axis, table = next(iter(problem.sizes.items()))
    weight, fixed = [table.parts[v.name] for v in variables], table.constant
    lightest = fixed + sum(float(w.min()) for w in weight)
    # Beyond the size of the assignment of least loss there is nothing to gain.
    best = [int(np.lexsort((w, np.array(c)))[0]) for c, w in zip(cost, weight, strict=True)]
    heaviest = fixed + sum(float(w[i]) for w, i in zip(weight, best, strict=True))
    yardsticks: dict[float, tuple[float, str]] = {}
    for proposal in baselines(problem):
        size, loss = problem.computed(axis, proposal.assignment), _predicted(proposal.assignment, losses)
        if loss is not None and size <= heaviest:
            named = (loss, str(proposal.baseline))
            yardsticks[size] = min(yardsticks.get(size, named), named)
    budgets = sorted({float(int(b)) for b in np.linspace(lightest, heaviest, count)} | set(yardsticks))
    found = frontier(cost, weight, [budget - fixed for budget in budgets])
    points = []
    for budget, solution in zip(budgets, found, strict=True):
        if solution is None:  # a baseline smaller than anything that is searched
            continue
        assignment = problem.space.assignment(solution.choices)
        size, bits = (problem.computed(name, assignment) for name in ("size_bytes", "bits_per_weight"))
        loss, name = yardsticks.get(budget, (None, None))
        points.append(Point(budget, size, bits, solution.cost, solution.exact, name, loss))
    return points


def _predicted(assignment: Assignment, losses: Losses) -> float | None:
    """The summed loss of the layers and caches that are not kept; None where a scheme has no prediction."""
    total = 0.0
    for layer, scheme in [*assignment.items(), *assignment.caches.items()]:
        if isinstance(scheme, Keep):
            continue
        if str(scheme) not in losses.get(layer, {}):
            return None
        total += losses[layer][str(scheme)]
    return total
