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
from dataclasses import asdict
from typing import Any

from autoq import trained
from autoq.assignment import Assignment
from autoq.cache import cache_dir
from autoq.errors import AutoQError, BadInput, LeaseLost, Stopped
from autoq.search.additions import Additions, require_finished
from autoq.search.executors import Executor, Job, LocalExecutor, make_evaluator
from autoq.search.holding import Hold, StopRequested, Watching, holding
from autoq.search.observer import Observer
from autoq.search.reporting import report
from autoq.search.setup import pose
from autoq.search.stages import run_job
from autoq.search.training import Training
from autoq.spec import StudySpec, WorkersSpec
from autoq.store import Descent, Store, StudyRecord, TrialRecord

__all__ = ["Training", "recover_trial"]

_Layers = dict[str, tuple[str, bytes]]


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
    study, parent = store.study(study_id), store.trial(study_id, number)
    if parent.state != "complete" or parent.assignment is None:
        raise BadInput(f"trial {number} of {study.name!r} is {parent.state}; only a complete one can be trained")
    if not any(map(trained.trainable, parent.assignment.values())):
        raise BadInput(
            f"trial {number} of {study.name!r} has nothing to train: integer schemes and codebooks can be, awq, smooth "
            "and others not"
        )
    require_finished(study, "added to", hold is not None)
    with holding(store, study_id, hold) as hold:
        recovery = _Recovery(hold, study, parent, training, Watching(observer, hold))
        try:
            found = recovery.run(make)
        except StopRequested as stop:
            hold.store.queue.settle(study_id, hold.state_after(stop, "finished"))
            raise Stopped(f"study {study.name!r} was asked to stop before trial {number} was trained") from stop
        except LeaseLost:
            raise
        except BaseException as problem:
            hold.store.queue.settle(study_id, hold.state_after(problem, "finished"))
            raise
        finally:
            hold.executor = None
        hold.store.queue.settle(study_id, "finished")
        return hold.store.trial(study_id, found)


class _Recovery:
    """The training of one trial."""

    def __init__(
        self, hold: Hold, study: StudyRecord, parent: TrialRecord, training: Training, observer: Observer
    ) -> None:
        self.hold, self.store, self.study, self.parent = hold, hold.store, study, parent
        self.training, self.observer = training, observer

    def run(self, make: Callable[[StudySpec], Executor]) -> int:
        """Train, measure and report; the number of the trial that came of it."""
        parent, study_id = self.parent, self.study.id
        assert parent.assignment is not None
        self.observer.stage("load", 1)
        spec = self.study.study_spec()
        spec = spec.model_copy(update={"workers": WorkersSpec(cpus=spec.workers.cpus, gpus=spec.workers.gpus)})
        problem = pose(spec)
        if not problem.qualities:
            raise BadInput(f"study {self.study.name!r} measures no quality; there is nothing to recover")
        with make(spec) as executor:
            self.hold.executor = executor
            # While it trains a study on the command line stays finished: a process that is killed leaves nothing to
            # be put right. A queue's is seen to run, and puts right what a former process left.
            if self.hold.queued:
                self.store.set_state(study_id, "running")
            trained.place(parent.assignment, self.store.trained_layers)
            facts = run_job(executor, Job("describe", "describe")).value
            self.hold.device = str(facts.get("device", ""))
            self.observer.advance()
            additions = Additions(self.hold, self.study, problem, executor)
            if (left := self._left_running()) is not None:
                trial = additions.again(left)
            else:
                layers, told = _train(executor, parent, self.training, self.observer)
                own = parent.assignment
                assignment = Assignment(own, {**own.trained, **_digests(layers)}, own.caches)
                if (same := self.store.find(study_id, assignment.hash)) is not None:
                    self.observer.note(f"this is trial {same.number}, which was trained likewise before")
                    return same.number
                contents = dict(layers.values())
                trained.place(assignment, lambda digests: {digest: contents[digest] for digest in digests})
                self.store.set_state(study_id, "running")
                trial = additions.measure(assignment, "recover", Descent(parent.number, told, contents))
            if trial.error is not None:
                raise AutoQError(f"trial {trial.number}, which was trained, failed: {trial.error.message}")
            report(problem, self.store, study_id, executor, self.observer, also=[trial.number])
        return trial.number

    def _left_running(self) -> TrialRecord | None:
        """What a queue's former process was measuring when it ended."""
        if not self.hold.queued:
            return None
        running = self.store.running_trials(self.study.id)
        return next((trial for trial in running if trial.parent == self.parent.number), None)


def _train(executor: Executor, parent: TrialRecord, training: Training, observer: Observer) -> tuple[_Layers, Any]:
    """The trained layers, layer -> digest and content, and the facts of the training."""
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


def _digests(layers: _Layers) -> dict[str, str]:
    return {name: digest for name, (digest, _) in layers.items()}
