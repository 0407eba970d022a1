"""Recovering: a trial of a finished study is trained, and what comes of it is a trial of its own.

The layers of the parent's assignment that can be trained are trained towards the unquantized model's answers
(`autoq.recovery`), on text that is in no part of the study. The new trial, of origin `recover`, is what
`autoq.search.deriving` makes of them. An interrupted training leaves a checkpoint in the cache, from which the same
call goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from autoq.cache import cache_dir
from autoq.search.deriving import Layers, derive, here
from autoq.search.executors import Executor, Job
from autoq.search.holding import Hold
from autoq.search.lineage import recoverable
from autoq.search.observer import Observer
from autoq.search.stages import run_job
from autoq.search.training import Training
from autoq.spec import StudySpec
from autoq.store import Store, TrialRecord

__all__ = ["Training", "recover_trial"]


def recover_trial(
    store: Store,
    study_id: int,
    number: int,
    training: Training,
    observer: Observer | None = None,
    make: Callable[[StudySpec], Executor] = here,
    hold: Hold | None = None,
) -> TrialRecord:
    """Train trial `number` and store the result as a new trial with both parts measured; the new trial.

    Where the very same was trained before, that trial. Raises `NotFound` for a trial that is not there, `BadInput` for
    one that is not complete or holds nothing to train, for a study that is not finished and a training that cannot be,
    `StudyBusy`, `Stopped` where the study was asked to stop before, and `AutoQError` where no moment of the training is
    better than its start. The study is left as it was but for the trial, whatever happens. A queue's process has it in
    `hold`.
    """
    observer = observer or Observer()
    training.check()
    parent = recoverable(store, study_id, number)

    def train(executor: Executor, trial: TrialRecord, watching: Observer) -> tuple[Layers, Mapping[str, Any]]:
        return _train(executor, trial, training, watching)

    return derive(store, parent, "recover", train, observer, make, hold)


def _train(
    executor: Executor, parent: TrialRecord, training: Training, observer: Observer
) -> tuple[Layers, Mapping[str, Any]]:
    """The trained layers and the facts of the training."""
    observer.stage("recover", training.steps)
    arguments: dict[str, Any] = {
        "assignment": parent.assignment,
        **asdict(training),
        "tell": observer.trained,
        "note": observer.note,
        "checkpoints": str(cache_dir() / "recovery"),
    }
    layers, facts = run_job(executor, Job(f"recover-{parent.number}", "recover", arguments)).value
    return layers, facts
