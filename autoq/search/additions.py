"""Additions: trials of a finished study that no sampler proposed, measured one at a time.

They get the numbers that come next. A study that is finished has no trial that runs, whatever happens.
"""

from __future__ import annotations

import dataclasses

from autoq import trained
from autoq.assignment import Assignment
from autoq.errors import BadInput, LeaseLost, NotFinite
from autoq.objectives import computed
from autoq.search.controller import MAX_KILLED
from autoq.search.executors import Executor, Failure, Job, completed
from autoq.search.holding import Hold
from autoq.search.outcomes import violations
from autoq.search.paging import each_trial
from autoq.search.reporting import is_finite
from autoq.search.setup import Problem
from autoq.store import Descent, Origin, StudyRecord, TrialRecord
from autoq.targets import CostTable


def require_finished(study: StudyRecord, done: str, held: bool = False) -> None:
    """Refuse a study that is not finished: what runs it, or will, numbers its trials. `done` is what it cannot be.

    Whoever has it `held`, from the queue of what is to be done with finished studies, is the one who runs it.
    """
    if study.state != "finished" and not held:
        hint = "wait for its end" if study.state == "running" else f"first: autoq resume {study.name}"
        raise BadInput(f"study {study.name!r} is {study.state} and cannot be {done}; {hint}")


class Additions:
    """Measures assignments of one study on the search part, as trials."""

    def __init__(self, hold: Hold, study: StudyRecord, problem: Problem, executor: Executor) -> None:
        self.hold, self.store, self.study, self.problem, self.executor = hold, hold.store, study, problem, executor
        store = self.store
        costs = store.table(study.id, "costs")
        self.costs = None if costs is None else CostTable(**costs)

    def measure(self, assignment: Assignment, origin: Origin, descent: Descent | None = None) -> TrialRecord:
        """The new trial, complete or failed."""
        number = 1 + max(trial.number for trial in each_trial(self.store, self.study.id))
        trial = self.store.start_trial(self.study.id, number, assignment, origin, descent=descent)
        try:
            self._finish(trial, assignment)
        except LeaseLost:
            raise
        except BaseException as problem:
            # What waits in a queue goes on with it.
            if self.hold.state_after(problem, "finished") != "queued":
                self._fail(trial, Failure.of(problem), 0.0, "")
            raise
        return self.store.trial(self.study.id, number)

    def again(self, trial: TrialRecord) -> TrialRecord:
        """A trial that was running when the process that measured it ended; it ends as it would have then."""
        assert trial.assignment is not None
        if trial.attempt >= MAX_KILLED:
            reason = f"quarantined: the study's process ended {trial.attempt} times while it ran"
            self._fail(trial, Failure("WorkerLost", reason), 0.0, "")
        else:
            trained.place(trial.assignment, self.store.trained_layers)
            attempt = self.store.retry_trial(trial.id)
            self._finish(dataclasses.replace(trial, attempt=attempt), trial.assignment)
        return self.store.trial(self.study.id, trial.number)

    def _finish(self, trial: TrialRecord, assignment: Assignment) -> None:
        problem, spec = self.problem, self.problem.spec
        job = Job(
            f"trial-{trial.number}",
            "measure",
            {"assignment": assignment, "part": "search"},
            limit_seconds=spec.budget.trial_time,
        )
        (result,) = completed(self.executor, [job])
        if result.failure is not None:
            self._fail(trial, result.failure, result.seconds, result.worker)
            return
        tables = computed(problem.objectives, problem.info, assignment, self.costs, spec.target, problem.target)
        measurements = [*result.value, *tables]
        if bad := next((m for m in measurements if not is_finite(m)), None):
            failure = Failure.of(NotFinite(f"{bad.objective} is {bad.value} under this assignment"))
            self._fail(trial, failure, result.seconds, result.worker)
            return
        excess = violations(spec.constraints, measurements)
        self.store.finish_trial(trial.id, trial.attempt, measurements, excess, result.seconds, result.worker)

    def _fail(self, trial: TrialRecord, failure: Failure, seconds: float, worker: str) -> None:
        self.store.fail_trial(
            trial.id, trial.attempt, failure.error, failure.message, failure.traceback, seconds, worker
        )
