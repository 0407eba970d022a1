"""Deriving: a trial of a finished study is made into another one of the same schemes, with other weights.

Where a method alone does not make a layer again (it was trained, or quantized by what others make of its inputs), the
new trial's assignment names it by content, so it has a hash of its own, and its layers are stored with it. It has its
parent's bytes and kernels, is measured like all others, and no sampler hears of it.

All runs in this process, whatever executor the study has: one copy of the weights is all it can use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from autoq import trained
from autoq.assignment import Assignment
from autoq.errors import AutoQError, BadInput, LeaseLost, Stopped
from autoq.search.additions import Additions, require_finished
from autoq.search.executors import Executor, Job, LocalExecutor, make_evaluator
from autoq.search.holding import Hold, StopRequested, Watching, holding
from autoq.search.observer import Observer
from autoq.search.reporting import report
from autoq.search.setup import pose
from autoq.search.stages import run_job
from autoq.spec import StudySpec, WorkersSpec
from autoq.store import Descent, Origin, Store, StudyRecord, TrialRecord

Layers = Mapping[str, tuple[str, bytes]]  # layer -> digest and content
# From the executor, the parent and who watches: the layers that are made anew, and facts of how.
Make = Callable[[Executor, TrialRecord, Observer], tuple[Layers, Mapping[str, Any]]]


def here(spec: StudySpec) -> Executor:
    """The one process that makes and measures."""
    return LocalExecutor(spec, make_evaluator)


def derive(
    store: Store,
    parent: TrialRecord,
    origin: Origin,
    make: Make,
    observer: Observer,
    executor_of: Callable[[StudySpec], AbstractContextManager[Executor]] = here,
    hold: Hold | None = None,
) -> TrialRecord:
    """Store what `make` makes of the layers of `parent` as a new trial with both parts measured; the new trial.

    Where the very same was made before, that trial. Raises `BadInput` for a study that is not finished or measures no
    quality, `StudyBusy`, `Stopped` where the study was asked to stop before, and what `make` raises. The study is left
    as it was but for the trial, whatever happens. A queue's process has it in `hold`.
    """
    study_id, study = parent.study_id, store.study(parent.study_id)
    require_finished(study, "added to", hold is not None)
    with holding(store, study_id, hold) as hold:
        derivation = _Derivation(hold, study, parent, origin, Watching(observer, hold))
        try:
            found = derivation.run(make, executor_of)
        except StopRequested as stop:
            hold.store.queue.settle(study_id, hold.state_after(stop, "finished"))
            done = "trained" if origin == "recover" else "quantized in sequence"
            raise Stopped(f"study {study.name!r} was asked to stop before trial {parent.number} was {done}") from stop
        except LeaseLost:
            raise
        except BaseException as problem:
            hold.store.queue.settle(study_id, hold.state_after(problem, "finished"))
            raise
        finally:
            hold.executor = None
        hold.store.queue.settle(study_id, "finished")
        return hold.store.trial(study_id, found)


class _Derivation:
    """The making of one trial of another one."""

    def __init__(self, hold: Hold, study: StudyRecord, parent: TrialRecord, origin: Origin, observer: Observer) -> None:
        self.hold, self.store, self.study, self.parent = hold, hold.store, study, parent
        self.origin: Origin = origin
        self.observer = observer

    def run(self, make: Make, executor_of: Callable[[StudySpec], AbstractContextManager[Executor]]) -> int:
        """Make, measure and report; the number of the trial that came of it."""
        parent, study_id = self.parent, self.study.id
        assert parent.assignment is not None
        self.observer.stage("load", 1)
        spec = self.study.study_spec()
        spec = spec.model_copy(update={"workers": WorkersSpec(cpus=spec.workers.cpus, gpus=spec.workers.gpus)})
        problem = pose(spec)
        if not problem.qualities:
            raise BadInput(f"study {self.study.name!r} measures no quality; there is nothing to gain")
        with executor_of(spec) as executor:
            self.hold.executor = executor
            # While layers are made a study on the command line stays finished: a process that is killed leaves nothing
            # to be put right. A queue's is seen to run, and puts right what a former process left.
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
                layers, told = make(executor, parent, self.observer)
                own = parent.assignment
                digests = {name: digest for name, (digest, _) in layers.items()}
                assignment = Assignment(own, {**own.trained, **digests}, own.caches)
                if (same := self.store.find(study_id, assignment.hash)) is not None:
                    self.observer.note(f"this is trial {same.number}, which was made likewise before")
                    # Whoever made it may have ended before it was reported; what was reported is not done again.
                    report(problem, self.store, study_id, executor, self.observer, also=[same.number])
                    return same.number
                contents = dict(layers.values())
                trained.place(assignment, lambda digests: {digest: contents[digest] for digest in digests})
                self.store.set_state(study_id, "running")
                trial = additions.measure(assignment, self.origin, Descent(parent.number, told, contents))
            if trial.error is not None:
                raise AutoQError(f"trial {trial.number}, made of {parent.number}, failed: {trial.error.message}")
            report(problem, self.store, study_id, executor, self.observer, also=[trial.number])
        return trial.number

    def _left_running(self) -> TrialRecord | None:
        """What a queue's former process was measuring when it ended."""
        if not self.hold.queued:
            return None
        running = self.store.running_trials(self.study.id)
        return next(
            (trial for trial in running if trial.parent == self.parent.number and trial.origin == self.origin), None
        )
