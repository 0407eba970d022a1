"""Puts a model to a study's tasks and judges its answers: objectives in, measurements out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from autoq import plugins
from autoq.errors import NotFinite
from autoq.measurement import Measurement, Part
from autoq.models import LoadedModel
from autoq.objectives import TaskObjective
from autoq.objectives import load as load_objective
from autoq.spec import StudySpec
from autoq.statistics import LEAST_EXAMPLES, Rival, bootstrap_stderr, mean_and_stderr, pseudo_values, shards
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

    def _ready(
        self, objective: TaskObjective, kind: TaskKind, source: Source, part: Part
    ) -> tuple[Sequence[Row], list[Any]]:
        """The part's examples, and shard by shard what the kind answers them from."""
        key = source.name, objective.answers
        if key not in self._examples:
            self._examples[key] = kind.read(source, self._model.info)
        rows = self._examples[key].search if part == "search" else self._examples[key].report
        if (key, part) not in self._prepared:
            # Only the search gives up, and what is answered in one go is batched better.
            steps = shards(len(rows), 1, LEAST_EXAMPLES) if part == "search" else [range(len(rows))]
            shares = [[rows[i] for i in step] for step in steps]
            self._prepared[key, part] = [kind.prepare(self._model, share, source) for share in shares]
        return rows, self._prepared[key, part]

    def measure(
        self, names: Sequence[str], part: Part, device: str, dtype: str, rival: Rival | None = None
    ) -> list[Measurement]:
        """The objectives `names` of the model as it is, on one part of their examples; it answers each once.

        Shard by shard of all tasks together, it ends as soon as `rival` is known to be better in all that it is
        compared in, on the examples that both answered. Raises `NotFinite` where outputs or a value are not finite.
        """
        kinds: dict[_Key, tuple[TaskKind, Sequence[Row], list[Any]]] = {}
        for name in names:
            objective, kind, source = self._objectives[name]
            kinds[source.name, objective.answers] = kind, *self._ready(objective, kind, source, part)
        answered: dict[_Key, list[Any]] = {key: [] for key in kinds}
        looks = max(len(prepared) for _, _, prepared in kinds.values())
        stopped = False
        for look in range(looks):
            for key, (kind, _, prepared) in kinds.items():
                if look < len(prepared):
                    with torch.inference_mode():
                        answered[key] += kind.answers(self._model, prepared[look])
            stopped = look + 1 < looks and self._worse(rival, answered, kinds, looks - 1)
            if stopped:
                break
        found = []
        for name in names:
            objective, _, source = self._objectives[name]
            key = source.name, objective.answers
            scores = self._scores(objective, kinds[key][1], answered[key])
            value, stderr, each = judged(objective, scores)
            if not np.isfinite(value):
                raise NotFinite(f"{name} is {value} under this assignment")
            detail = {"task": source.name, "threads": torch.get_num_threads(), "dtype": dtype}
            values = np.full((len(kinds[key][1]), 1), np.nan, dtype=np.float32)
            values[: len(each), 0] = each
            if rival is not None and stopped:
                estimate = rival.expected(name, values) if name in rival.values else value
                detail |= {"of": len(values), "rival": rival.number, "estimate": float(estimate)}
            found.append(
                Measurement(
                    name, value, objective.unit, "measured", part, stderr, len(scores), device, detail, per_token=values
                )
            )
        return found

    @staticmethod
    def _scores(objective: TaskObjective, rows: Sequence[Row], answers: Sequence[Any]) -> NDArray[np.float64]:
        """The numbers (n, k) of the examples that were answered."""
        scored = [objective.score(row, answer) for row, answer in zip(rows, answers, strict=False)]
        return np.array(scored, dtype=np.float64)

    def _worse(
        self,
        rival: Rival | None,
        answered: Mapping[_Key, Sequence[Any]],
        kinds: Mapping[_Key, tuple[TaskKind, Sequence[Row], list[Any]]],
        looks: int,
    ) -> bool:
        """Whether `rival` is known to be better in all that it is compared in, means over examples each."""
        if rival is None or not rival.values:
            return False
        for name, theirs in rival.values.items():
            objective, _, source = self._objectives[name]
            key = source.name, objective.answers
            rows = kinds[key][1]
            if theirs.shape != (len(rows), 1):
                return False  # a study that was resumed on other examples has none in common
            ours = np.full(theirs.shape, np.nan)
            scores = self._scores(objective, rows, answered[key])
            ours[: len(scores)] = scores
            sign = 1.0 if objective.direction == "minimize" else -1.0
            if not rival.beats(name, ours, sign, looks):
                return False
        return True


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
