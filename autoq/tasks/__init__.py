"""Tasks: labelled examples that a model is put to, and what it answers.

A kind of task (`kinds/`, one file each) says which columns an example has, which models it can be put to, and
how a model answers. An objective (`TaskObjective`) names its kind and judges the answers, so objectives of one
kind share one run of the model. To add a kind, write `autoq/tasks/kinds/NAME.py` with one concrete subclass of
`TaskKind`.

The rows of a source are shuffled by `data.seed`. The first of them are for the search, the next for the report;
rows that are equal count once, so no example is in both.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from autoq.errors import DataRefused, SpecError, UnknownName
from autoq.layer import ModelInfo, Task
from autoq.spec import StudySpec, TaskSpec, split_objective

if TYPE_CHECKING:
    from autoq.models import LoadedModel

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """A task of a study: its name there, its spec, and the seed that shuffles its rows."""

    name: str
    spec: TaskSpec
    seed: int

    @property
    def field(self) -> str:
        """Where it stands in the study's spec."""
        return f"tasks.{self.name}"


@dataclass(frozen=True)
class Examples:
    """The rows of both parts of a task."""

    search: Sequence[Row]
    report: Sequence[Row]


class TaskKind(abc.ABC):
    """What an example of such a task holds, and how a model answers.

    `columns` maps the name of each column to what it holds, `models` are the models that it can be put to.
    """

    columns: ClassVar[Mapping[str, str]]
    models: ClassVar[frozenset[Task]]

    def source(self, task: str | None, spec: StudySpec) -> Source:
        """The task that an objective of this kind is measured on. Raises `SpecError` where that is not said."""
        return named_source(task, spec)

    def read(self, source: Source, info: ModelInfo) -> Examples:
        """The source's examples. Raises `DataRefused` with one line for what cannot be used."""
        from autoq.tasks.data import read_rows, split

        rows = []
        for place, row in read_rows(source, self.columns):
            try:
                rows.append(self.check(row, info))
            except ValueError as problem:
                raise DataRefused(f"{source.field}: {source.spec.source!r}, {place}: {problem}") from None
        return split(source, rows)

    @abc.abstractmethod
    def check(self, row: Row, info: ModelInfo) -> Row:
        """A row with what it holds as it is needed. Raises `ValueError` with one clause for what does not fit."""

    @abc.abstractmethod
    def prepare(self, model: LoadedModel, rows: Sequence[Row], source: Source) -> Any:
        """What `answers` takes: whatever is the same for every assignment. Raises `DataRefused`."""

    @abc.abstractmethod
    def answers(self, model: LoadedModel, prepared: Any) -> list[Any]:
        """One answer per row, in their order, from the model as it is now. Raises `NotFinite`."""


def named_source(task: str | None, spec: StudySpec) -> Source:
    """The task of that name, or the study's only one. Raises `SpecError` and `UnknownName`."""
    if task is None:
        if not spec.tasks:
            raise SpecError("it needs labelled examples: name them under tasks, such as tasks: {mine: {source: FILE}}")
        if len(spec.tasks) > 1:
            raise SpecError(f"say on which task, behind a colon; choose from {', '.join(sorted(spec.tasks))}")
        task = next(iter(spec.tasks))
    if task not in spec.tasks:
        raise UnknownName("task", task, sorted(spec.tasks))
    return Source(task, spec.tasks[task], spec.data.seed)


def source_of(objective: str, kind: TaskKind, spec: StudySpec) -> Source:
    """The task that an objective of a study is measured on. Raises `SpecError`, which names the objective."""
    try:
        return kind.source(split_objective(objective)[1], spec)
    except (SpecError, UnknownName) as problem:
        raise SpecError(f"objectives: {objective}: {problem}") from None
