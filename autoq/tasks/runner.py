"""Puts a model to a study's tasks and judges its answers: objectives in, measurements out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from autoq import plugins
from autoq.errors import NotFinite
from autoq.measurement import Measurement, Part
from autoq.models import LoadedModel
from autoq.objectives import TaskObjective
from autoq.objectives import load as load_objective
from autoq.spec import StudySpec
from autoq.statistics import bootstrap_stderr, mean_and_stderr, pseudo_values
from autoq.tasks import Examples, Row, Source, TaskKind, source_of

_Key = tuple[str, str]  # a task's name and its kind


class TaskRunner:
    """The tasks of a study on one model, whose weights may be swapped between measurements.

    Examples are read and tokenized when they are first asked for.
    """

    def __init__(self, spec: StudySpec, model: LoadedModel) -> None:
        self._model = model
        self._objectives: dict[str, tuple[TaskObjective, TaskKind, Source]] = {}
        self._examples: dict[_Key, Examples] = {}
        self._prepared: dict[tuple[_Key, Part], Any] = {}
        for name in (*spec.measured, *spec.reported):
            objective = load_objective(name)
            if isinstance(objective, TaskObjective):
                kind = plugins.load("tasks.kinds", objective.answers, TaskKind)
                self._objectives[name] = objective, kind, source_of(name, kind, spec)

    def names(self, among: Sequence[str]) -> list[str]:
        """Those of some objectives that are measured here."""
        return [name for name in among if name in self._objectives]

    def ready(self) -> None:
        """Read and tokenize all examples now. Raises `DataRefused` with one line for what cannot be used."""
        for objective, kind, source in self._objectives.values():
            for part in ("search", "report"):
                self._ready(objective, kind, source, part)

    def _ready(self, objective: TaskObjective, kind: TaskKind, source: Source, part: Part) -> tuple[Sequence[Row], Any]:
        key = source.name, objective.answers
        if key not in self._examples:
            self._examples[key] = kind.read(source, self._model.info)
        rows = self._examples[key].search if part == "search" else self._examples[key].report
        if (key, part) not in self._prepared:
            self._prepared[key, part] = kind.prepare(self._model, rows, source)
        return rows, self._prepared[key, part]

    def measure(self, names: Sequence[str], part: Part, device: str, dtype: str) -> list[Measurement]:
        """The objectives `names` of the model as it is, on one part of their examples; it answers each once.

        Raises `NotFinite` where its outputs or a value are NaN or infinite.
        """
        answered: dict[_Key, list[Any]] = {}
        found = []
        for name in names:
            objective, kind, source = self._objectives[name]
            rows, prepared = self._ready(objective, kind, source, part)
            key = source.name, objective.answers
            if key not in answered:
                with torch.inference_mode():
                    answered[key] = kind.answers(self._model, prepared)
            scores = [objective.score(row, answer) for row, answer in zip(rows, answered[key], strict=True)]
            value, stderr, each = judged(objective, np.array(scores, dtype=np.float64))
            if not np.isfinite(value):
                raise NotFinite(f"{name} is {value} under this assignment")
            detail = {"task": source.name, "threads": torch.get_num_threads(), "dtype": dtype}
            values = each.astype(np.float32)[:, None]
            found.append(
                Measurement(
                    name, value, objective.unit, "measured", part, stderr, len(rows), device, detail, per_token=values
                )
            )
        return found


def judged(objective: TaskObjective, scores: np.ndarray[Any, np.dtype[np.float64]]) -> tuple[float, float | None, Any]:
    """Value, standard error, and one number per example (n,) by which two models can be compared in pairs.

    `scores` is (n, k). Examples are drawn independently, so the error of a mean is that of independent values.
    """
    if objective.is_mean:
        assert scores.shape[1] == 1, scores.shape
        value, stderr, _ = mean_and_stderr(scores)
        return value, stderr, scores[:, 0]
    statistic = objective.value
    return statistic(scores), bootstrap_stderr(statistic, scores), pseudo_values(statistic, scores)
