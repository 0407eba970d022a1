"""A task of EleutherAI's lm-eval for causal models; the answer is the task's first metric, per example.

`lm_eval:NAME` is the task of that name in the study's `tasks`, whose `source` is a task's YAML file or the name
of one of lm-eval's own; else lm-eval's own task NAME, which it fetches from the hub. Prompts, shots, choices,
filters and metrics are lm-eval's. The model that it asks is the one in memory, with whatever is swapped in.

The examples of both parts are drawn from those that lm-eval evaluates on. A file is read as plain data: its
`!function` tags are refused, and so are fields that would fetch code or run some (`_FIELDS` are all that it may have,
and its metrics must be lm-eval's own). Its templates are programs (Jinja), which run in Jinja's sandbox. It names its
data, from wherever that is: a server takes files of tasks from admins alone.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autoq import strict_yaml
from autoq.errors import AutoQError, BadInput, DataRefused, SpecError
from autoq.layer import ModelInfo
from autoq.models import LoadedModel
from autoq.spec import StudySpec, TaskSpec
from autoq.tasks import Examples, Row, Source, TaskKind, named_source
from autoq.tasks.data import split
from autoq.tasks.kinds.choices import continuation, first_token, log_likelihoods
from autoq.tasks.kinds.text import generate, settings

_SEED = 1234  # which shots are drawn; lm-eval's own default
_NEW_TOKENS = 256  # where the task does not say; lm-eval's own default
_FILES = (".yaml", ".yml")
_OWN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")
_FIELDS = frozenset(
    [
        "task",
        "task_alias",
        "tag",
        "dataset_path",
        "dataset_name",
        "dataset_kwargs",
        "training_split",
        "validation_split",
        "test_split",
        "fewshot_split",
        "doc_to_text",
        "doc_to_target",
        "doc_to_choice",
        "description",
        "target_delimiter",
        "fewshot_delimiter",
        "fewshot_config",
        "num_fewshot",
        "metric_list",
        "output_type",
        "generation_kwargs",
        "repeats",
        "filter_list",
        "should_decontaminate",
        "doc_to_decontamination_query",
        "gen_prefix",
        "metadata",
    ]
)


class Harness(TaskKind):
    """Any task of lm-eval whose first metric is a number per example."""

    columns = {}  # noqa: RUF012 - ClassVar in the base; the task knows its own
    models = frozenset({"causal"})

    def source(self, task: str | None, spec: StudySpec) -> Source:
        """The study's task of that name, else lm-eval's."""
        if task is None or task in spec.tasks:
            return named_source(task, spec)
        if not _OWN_NAME.fullmatch(task) or task.endswith(_FILES):
            raise SpecError(
                f"{task[:80]!r} is no name of lm-eval's; name a file under tasks: {{mine: {{source: FILE}}}}"
            )
        return Source(task, TaskSpec(source=task), spec.data.seed)

    def read(self, source: Source, info: ModelInfo) -> Examples:
        """Rows that hold the places of their examples in lm-eval's list, each example once."""
        docs = _loaded(source.spec.source, source.field).eval_docs
        places = {json.dumps(doc, sort_keys=True, default=str): place for place, doc in enumerate(docs)}
        return split(source, [{"place": place} for place in places.values()])

    def check(self, row: Row, info: ModelInfo) -> Row:
        """Rows are lm-eval's and are right."""
        return row

    def prepare(self, model: LoadedModel, rows: Sequence[Row], source: Source) -> tuple[Any, list[int]]:
        """The task, and the places of its examples."""
        return _loaded(source.spec.source, source.field), [row["place"] for row in rows]

    def answers(self, model: LoadedModel, prepared: Any) -> list[Any]:
        """The first metric of each example."""
        from lm_eval.evaluator import evaluate

        task, places = prepared
        ordered = sorted(places)  # the order in which lm-eval goes through them, whatever it is given
        with _silent():
            found = evaluate(
                lm=_model_class()(model),
                task_dict={"tasks": {task.task_name: task}, "groups": {}, "group_map": {}},
                samples={task.task_name: ordered},
                bootstrap_iters=0,
            )
        samples = found["samples"][task.task_name]
        # One after another for each filter; the first filter is the task's own choice too.
        own = [sample for sample in samples if sample["filter"] == samples[0]["filter"]]
        metric = own[0]["metrics"][0]
        values = {place: sample[metric] for place, sample in zip(ordered, own, strict=True)}
        if not all(isinstance(value, int | float) for value in values.values()):
            raise AutoQError(f"lm-eval's {task.task_name}: its metric {metric} is no number per example")
        return [float(values[place]) for place in places]


@functools.lru_cache(maxsize=8)
def _loaded(source: str, field: str) -> Any:
    """lm-eval's task, ready to be evaluated. Raises `DataRefused` with one line."""
    from lm_eval.tasks import TaskManager

    path = Path(source).expanduser()
    try:
        with _silent():
            _confine()
            if path.suffix in _FILES:
                told = strict_yaml.parse(strict_yaml.read(path, repr(source)), repr(source))
                _check(told)
                loaded = TaskManager(include_defaults=False).load([told])
            else:
                manager = _own_tasks()
                if source not in manager.task_index:  # what is no name it would take for a file, and run its code
                    raise BadInput("it has no such task")
                loaded = manager.load([source])
            (task,) = loaded["tasks"].values()
            if task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=_SEED)
            len(task.eval_docs)
    except Exception as problem:
        # lm-eval, its datasets and the network raise whatever they run into; for the user it is one thing.
        line = " ".join(str(problem).split())[:300] or type(problem).__name__
        raise DataRefused(f"{field}: lm-eval cannot load {source!r} as one task: {line}") from problem
    return task


@functools.cache
def _own_tasks() -> Any:
    """All tasks that lm-eval has; it takes seconds to look through them."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _check(told: Any) -> None:
    """Raise `BadInput` for a task in a file that would bring code along, or fetch some."""
    if not isinstance(told, Mapping) or not isinstance(told.get("task"), str):
        raise BadInput("must be a mapping with a name under 'task'")
    if more := sorted(str(key)[:80] for key in told if key not in _FIELDS):
        raise BadInput(f"{more[0]!r} is not taken from a file; choose from {', '.join(sorted(_FIELDS))}")
    import lm_eval.api.metrics  # noqa: F401 - registers them
    from lm_eval.api.registry import metric_registry

    # What is no metric of its own, lm-eval has the package evaluate look for, which runs scripts of hubs and folders.
    for metric in told.get("metric_list") or ():
        name = metric.get("metric") if isinstance(metric, Mapping) else None
        if name not in metric_registry or metric.get("hf_evaluate"):
            raise BadInput(f"metric_list: {str(name)[:80]!r} is no metric of lm-eval itself")
    for name in ("doc_to_text", "doc_to_target"):
        if not isinstance(told.get(name, ""), str | int):
            raise BadInput(f"{name} must be text")


@functools.cache
def _confine() -> None:
    """Have lm-eval's templates run in Jinja's sandbox, where they reach nothing but what they are given."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    free = utils.env
    utils.env = ImmutableSandboxedEnvironment(
        loader=free.loader, undefined=free.undefined, keep_trailing_newline=free.keep_trailing_newline
    )
    utils.env.filters.update(free.filters)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without lm-eval's progress bars, log lines and warnings; what matters is raised."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@functools.cache
def _model_class() -> Any:
    """The model as lm-eval asks it; made here because lm-eval takes seconds to import."""
    from lm_eval.api.model import LM

    class InMemory(LM):  # type: ignore[misc]
        """A `LoadedModel` with whatever is swapped in."""

        def __init__(self, model: LoadedModel) -> None:
            super().__init__()
            self._model = model

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            """Log-likelihood of each continuation, and whether it is the greedy one."""
            return log_likelihoods(self._model, [self._cut(*continuation(self._model, *r.args)) for r in requests])

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            """Log-likelihood of whole texts, window by window, every token once.

            A window's first token has the last one before it, or what a text begins with, as its context.
            """
            limit = self._model.info.max_positions or 2048
            pieces, owners = [], []
            for owner, request in enumerate(requests):
                ids = self._model.tokenizer(request.args[0], add_special_tokens=False)["input_ids"]
                whole = [first_token(self._model), *ids]
                for start in range(0, len(ids), limit - 1):
                    piece = whole[start : start + limit]
                    pieces.append((piece, len(piece) - 1))
                    owners.append(owner)
            totals = [0.0] * len(requests)
            for owner, (value, _) in zip(owners, log_likelihoods(self._model, pieces), strict=True):
                totals[owner] += value
            return totals

        def generate_until(self, requests: list[Any]) -> list[str]:
            """Greedy continuations, each cut at the first of its stops."""
            texts = []
            for request in requests:
                prompt, options = request.args
                new = int(options.get("max_gen_toks", _NEW_TOKENS))
                ids = self._model.tokenizer(prompt)["input_ids"]
                room = self._model.info.max_positions
                if room is not None:
                    new = min(new, room // 2)
                    ids = ids[-(room - new) :]
                (text,) = generate(self._model, [ids], settings(self._model, new))
                stops = options.get("until") or []
                for stop in [stops] if isinstance(stops, str) else stops:
                    text = text.partition(stop)[0] if stop else text
                texts.append(text)
            return texts

        def _cut(self, ids: list[int], count: int) -> tuple[list[int], int]:
            """What the model can read: the end of it."""
            limit = self._model.info.max_positions
            return (ids, count) if limit is None else (ids[-limit:], min(count, limit - 1))

    return InMemory
