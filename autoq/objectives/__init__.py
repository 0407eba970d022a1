"""Objectives: one measured quantity each, with unit and direction, one file each.

Five kinds. A `TokenObjective` maps the model's outputs to one value per token. A `TaskObjective` judges the
model's answers to labelled examples. A `TableObjective` is
computed exactly from the assignment. A `LatencyObjective` is predicted from the target's table while
searching and timed end to end for reporting. An `EnergyObjective` is estimated for the target while
searching and metered for reporting, where there are meters. To add one, write `autoq/objectives/NAME.py` with one
concrete subclass; the file's name is the objective's name.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from autoq import plugins
from autoq.assignment import Assignment
from autoq.energy.estimate import Estimate
from autoq.layer import ModelInfo, Task
from autoq.measurement import Measurement
from autoq.spec import TargetSpec, split_objective
from autoq.targets import CostTable, Target
from autoq.tasks import TaskKind

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

Direction = Literal["minimize", "maximize"]


class Objective(abc.ABC):
    """What all objectives have: a unit and a direction."""

    unit: ClassVar[str]
    direction: ClassVar[Direction] = "minimize"

    def refuses(self, info: ModelInfo) -> str | None:
        """Why this objective has no meaning for such a model (one clause), or None."""
        return None


def load(name: str) -> Objective:
    """The objective of a name as a spec has it, with or without a task behind a colon. Raises `UnknownName`."""
    return plugins.load("objectives", split_objective(name)[0], Objective)


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
    a distribution p; `reference_entropy`, Σ p log p of exactly that p, in nats. Beside them `reference_top`
    (t,) int64, the unquantized model's first choice before rounding.
    """

    output: Tensor
    next_token: Tensor
    reference: Tensor
    log_normalizer: Tensor | None = None
    reference_mass: Tensor | None = None
    reference_entropy: Tensor | None = None
    reference_top: Tensor | None = None


class QualityObjective(Objective):
    """What needs the model to run on data: on text, or on labelled examples."""

    def transform(self, mean: float, stderr: float) -> tuple[float, float]:
        """The objective's value and standard error from the mean over tokens or examples and its error."""
        return mean, stderr


class TaskObjective(QualityObjective):
    """Judges answers to labelled examples: a number or more per example, and one value of them all.

    `answers` names the kind of task (`autoq/tasks/kinds/`), which says what an example holds and what the model
    answers. Where `is_mean`, the value is the mean of one number per example; else it is a statistic of all of
    them, whose error comes from drawing them again. `packages` are imported to judge; `extra` installs them.
    """

    unit: ClassVar[str] = "share"
    direction: ClassVar[Direction] = "maximize"
    answers: ClassVar[str]
    is_mean: ClassVar[bool] = True
    packages: ClassVar[tuple[str, ...]] = ()
    extra: ClassVar[str] = "tasks"

    def refuses(self, info: ModelInfo) -> str | None:
        """A model that such tasks cannot be put to, or None."""
        return _wrong_task(plugins.load("tasks.kinds", self.answers, TaskKind).models, info)

    @abc.abstractmethod
    def score(self, example: Mapping[str, Any], answer: Any) -> Sequence[float]:
        """One example's numbers, equally many for each, from its columns and the model's answer."""

    def value(self, scores: NDArray[np.float64]) -> float:
        """The value of some examples from their numbers (examples, k), one row or more."""
        return float(scores[:, 0].mean())


class TokenObjective(QualityObjective):
    """One value per token; the study sees their mean, transformed, with its standard error.

    A classification model answers once per window: what is said of tokens here is then said of windows.
    """

    tasks: ClassVar[frozenset[Task]] = frozenset({"causal", "masked", "seq2seq", "classification"})

    def refuses(self, info: ModelInfo) -> str | None:
        """A model of another task, or None."""
        return _wrong_task(self.tasks, info)

    @abc.abstractmethod
    def per_token(self, chunk: TokenChunk) -> Tensor:
        """Values (t,) float32; NaN for tokens that do not count."""


def can_be_compared(objectives: Sequence[Objective]) -> bool:
    """Whether a candidate can be held against a rival in all of these while it is evaluated.

    All are means over tokens of the same text, or all are means over labelled examples. A statistic of all examples
    (BLEU, F1) has no value for each, and text and examples have no order in common.
    """
    return all(isinstance(o, TokenObjective) for o in objectives) or all(
        isinstance(o, TaskObjective) and o.is_mean for o in objectives
    )


def distance_of(task: Task) -> TokenObjective:
    """How far outputs of a model for `task` are from the unquantized model's: the objective that says so."""
    found = plugins.load("objectives", "cosine_distance" if task == "encoder" else "kl_nats_per_token", Objective)
    assert isinstance(found, TokenObjective)
    return found


class TableObjective(Objective):
    """Computed exactly from shapes, schemes and the workload."""

    @abc.abstractmethod
    def compute(self, info: ModelInfo, assignment: Assignment, workload: TargetSpec) -> float:
        """The value for `assignment` under the spec's `workload`; layers it does not name keep their weights."""


class LatencyObjective(Objective):
    """Milliseconds on the target: predicted from a table, then timed end to end."""

    unit: ClassVar[str] = "ms"
    tasks: ClassVar[frozenset[Task]] = frozenset({"causal", "masked", "seq2seq", "encoder", "classification"})

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
            value = objective.compute(info, assignment, workload)
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
