"""Objectives: one measured quantity each, with unit and direction, one file each.

Four kinds. A `TokenObjective` maps the model's outputs to one value per token. A `TableObjective` is
computed exactly from the assignment. A `LatencyObjective` is predicted from the target's table while
searching and timed end to end for reporting. An `EnergyObjective` is estimated for the target while
searching and metered for reporting, where there are meters. To add one, write `autoq/objectives/NAME.py` with one
concrete subclass; the file's name is the objective's name.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from autoq import plugins
from autoq.assignment import Assignment
from autoq.energy.estimate import Estimate
from autoq.layer import ModelInfo, Task
from autoq.measurement import Measurement
from autoq.spec import TargetSpec
from autoq.targets import CostTable, Target

if TYPE_CHECKING:
    from torch import Tensor

Direction = Literal["minimize", "maximize"]


class Objective(abc.ABC):
    """What all objectives have: a unit and a direction."""

    unit: ClassVar[str]
    direction: ClassVar[Direction] = "minimize"

    def refuses(self, info: ModelInfo) -> str | None:
        """Why this objective has no meaning for such a model (one clause), or None."""
        return None


def _wrong_task(tasks: frozenset[Task], info: ModelInfo) -> str | None:
    if info.task not in tasks:
        return f"it needs a {' or '.join(sorted(tasks))} model, and {info.architecture} is {info.task}"
    return None


@dataclass(frozen=True, slots=True, eq=False)
class TokenChunk:
    """Outputs of some consecutive tokens, shared by all token objectives. Shapes: t tokens, v outputs.

    `output` (t, v) float32: logits, or final hidden states for an encoder without a head.
    `next_token` (t,) int64: the true next token, -1 where there is none.
    `reference` (t, v): the unquantized model's probabilities in reduced precision, or its final
    hidden states.

    For models with logits, else None, each (t,) float32: `log_normalizer`, the logsumexp of `output`;
    `reference_mass`, the sum of `reference`, nearly 1 after rounding, by which it must be divided to be
    a distribution p; `reference_entropy`, Σ p log p of exactly that p, in nats.
    """

    output: Tensor
    next_token: Tensor
    reference: Tensor
    log_normalizer: Tensor | None = None
    reference_mass: Tensor | None = None
    reference_entropy: Tensor | None = None


class TokenObjective(Objective):
    """One value per token; the study sees their mean, transformed, with its standard error."""

    tasks: ClassVar[frozenset[Task]] = frozenset({"causal", "masked", "seq2seq"})

    def refuses(self, info: ModelInfo) -> str | None:
        """A model of another task, or None."""
        return _wrong_task(self.tasks, info)

    @abc.abstractmethod
    def per_token(self, chunk: TokenChunk) -> Tensor:
        """Values (t,) float32; NaN for tokens that do not count."""

    def transform(self, mean: float, stderr: float) -> tuple[float, float]:
        """The objective's value and standard error from the mean over tokens and its error."""
        return mean, stderr


def distance_of(task: Task) -> TokenObjective:
    """How far outputs of a model for `task` are from the unquantized model's: the objective that says so."""
    found = plugins.load("objectives", "cosine_distance" if task == "encoder" else "kl_nats_per_token", Objective)
    assert isinstance(found, TokenObjective)
    return found


class TableObjective(Objective):
    """Computed exactly from shapes and schemes."""

    @abc.abstractmethod
    def compute(self, info: ModelInfo, assignment: Assignment) -> float:
        """The value for `assignment`; layers it does not name keep their weights."""


class LatencyObjective(Objective):
    """Milliseconds on the target: predicted from a table, then timed end to end."""

    unit: ClassVar[str] = "ms"
    tasks: ClassVar[frozenset[Task]] = frozenset({"causal", "masked", "seq2seq", "encoder"})

    def refuses(self, info: ModelInfo) -> str | None:
        """A model of another task, or None."""
        return _wrong_task(self.tasks, info)


class EnergyObjective(Objective):
    """Joules on the target: estimated from the work of a token, then metered end to end."""

    @abc.abstractmethod
    def estimate(self, info: ModelInfo, assignment: Assignment, workload: TargetSpec, target: Target) -> Estimate:
        """The value for `assignment`, and what it was estimated for; layers it does not name keep their weights."""


def computed(
    objectives: Mapping[str, Objective],
    info: ModelInfo,
    assignment: Assignment,
    costs: CostTable | None,
    workload: TargetSpec,
    target: Target,
) -> list[Measurement]:
    """Measurements that need no model: sizes exactly, latencies as predicted by `costs`, energy as estimated."""
    found = []
    for name, objective in objectives.items():
        if isinstance(objective, TableObjective):
            value = objective.compute(info, assignment)
            found.append(Measurement(name, value, objective.unit, "computed", "search"))
        elif isinstance(objective, LatencyObjective):
            assert costs is not None, name
            value = costs.predict(name, assignment)
            found.append(Measurement(name, value, objective.unit, "predicted", "search", device=costs.device))
        elif isinstance(objective, EnergyObjective):
            found.append(_estimated(name, objective, objective.estimate(info, assignment, workload, target)))
    return found


def _estimated(name: str, objective: Objective, estimate: Estimate) -> Measurement:
    device, detail = estimate.device, estimate.detail
    return Measurement(name, estimate.joules, objective.unit, "computed", "search", device=device, detail=detail)
