"""Recovering: a trial of a finished study is trained, and what comes of it is a trial of its own.

The layers of the parent's assignment that can be trained are trained towards the unquantized model's answers
(`autoq.recovery`), on text that is in no part of the study. The new trial has the parent's schemes and so its bytes and
kernels, but other weights: its assignment names them by content, so its hash is another. It is of origin `recover`, is
measured like all others, and no sampler hears of it.

Training runs in this process, whatever executor the study has: one copy of the weights is all it can use. An
interrupted training leaves a checkpoint in the cache, from which the same call goes on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from autoq import trained
from autoq.assignment import Assignment
from autoq.cache import cache_dir
from autoq.errors import AutoQError, BadInput
from autoq.search.additions import Additions, require_finished
from autoq.search.executors import Executor, Job, LocalExecutor, make_evaluator
from autoq.search.observer import Observer
from autoq.search.reporting import report
from autoq.search.setup import pose
from autoq.search.stages import run_job
from autoq.spec import StudySpec, WorkersSpec
from autoq.store import Descent, Store, TrialRecord

MAX_STEPS = 10**6
_Layers = dict[str, tuple[str, bytes]]


@dataclass(frozen=True)
class Training:
    """How to train: `steps` updates, each by `windows` windows of text, on at most `tokens` (default: all that are in
    no part of the study). `rate` multiplies the usual learning rates."""

    steps: int
    tokens: int | None = None
    windows: int = 1
    rate: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """Raises `BadInput` for what nothing can be trained by."""
        for name in ("steps", "windows"):
            if not 1 <= getattr(self, name) <= MAX_STEPS:
                raise BadInput(f"{name} must be from 1 to {MAX_STEPS} (got {getattr(self, name)})")
        if self.tokens is not None and self.tokens < 1:
            raise BadInput(f"tokens must be at least 1 (got {self.tokens})")
        if not 0 < self.rate < 1000:
            raise BadInput(f"rate must be above 0 and below 1000 (got {self.rate:g})")
        if not 0 <= self.seed < 2**32:
            raise BadInput(f"seed must be from 0 to {2**32 - 1} (got {self.seed})")


def here(spec: StudySpec) -> Executor:
    """The one process that trains and measures."""
    return LocalExecutor(spec, make_evaluator)


def recover_trial(
    store: Store,
    study_id: int,
    number: int,
    training: Training,
    observer: Observer | None = None,
    make: Callable[[StudySpec], Executor] = here,
) -> TrialRecord:
    """Train trial `number` and store the result as a new trial with both parts measured; the new trial.

    Where the very same was trained before, that trial. Raises `NotFound` for a trial that is not there, `BadInput` for
    one that is not complete or holds nothing to train, for a study that is not finished and a training that cannot be,
    and `AutoQError` where no moment of the training is better than its start. The study is left as it was but for the
    trial, whatever happens.
    """
    observer = observer or Observer()
    training.check()
    study, parent = store.study(study_id), store.trial(study_id, number)
    if parent.state != "complete" or parent.assignment is None:
        raise BadInput(f"trial {number} of {study.name!r} is {parent.state}; only a complete one can be trained")
    if not any(map(trained.trainable, parent.assignment.values())):
        raise BadInput(
            f"trial {number} of {study.name!r} has nothing to train: integer schemes and codebooks can be, awq, smooth "
            "and others not"
        )
    require_finished(study, "added to")
    observer.stage("load", 1)
    spec = study.study_spec()
    spec = spec.model_copy(update={"workers": WorkersSpec(cpus=spec.workers.cpus, gpus=spec.workers.gpus)})
    problem = pose(spec)
    if not problem.qualities:
        raise BadInput(f"study {study.name!r} measures no quality; there is nothing to recover")
    with make(spec) as executor:
        # While it trains the study stays finished: a process that is killed leaves nothing to be put right.
        trained.place(parent.assignment, store.trained_layers)
        run_job(executor, Job("describe", "describe"))
        observer.advance()
        layers, facts = _train(executor, parent, training, observer)
        assignment = Assignment(parent.assignment, {**parent.assignment.trained, **_digests(layers)})
        if (same := store.find(study_id, assignment.hash)) is not None:
            observer.note(f"this is trial {same.number}, which was trained likewise before")
            return store.trial(study_id, same.number)
        contents = dict(layers.values())
        trained.place(assignment, lambda digests: {digest: contents[digest] for digest in digests})
        require_finished(store.study(study_id), "added to")
        store.set_state(study_id, "running")
        try:
            additions = Additions(store, study, problem, executor)
            trial = additions.measure(assignment, "recover", Descent(number, facts, contents))
            if trial.error is not None:
                raise AutoQError(f"trial {trial.number}, which was trained, failed: {trial.error.message}")
            report(problem, store, study_id, executor, observer, also=[trial.number])
        finally:
            store.set_state(study_id, "finished")
    return store.trial(study_id, trial.number)


def _train(executor: Executor, parent: TrialRecord, training: Training, observer: Observer) -> tuple[_Layers, Any]:
    """The trained layers, layer -> digest and content, and the facts of the training."""
    observer.stage("recover", training.steps)
    arguments: dict[str, Any] = {
        "assignment": parent.assignment,
        **asdict(training),
        "tell": lambda step, loss, left: observer.trained(step, training.steps, loss, left),
        "note": observer.note,
        "checkpoints": str(cache_dir() / "recovery"),
    }
    layers, facts = run_job(executor, Job(f"recover-{parent.number}", "recover", arguments)).value
    return layers, facts


def _digests(layers: _Layers) -> dict[str, str]:
    return {name: digest for name, (digest, _) in layers.items()}
