"""Refining: new trials of a finished study, where somebody who picks would want a point and there is none.

What is measured is what the study's model offers for the bounds, one assignment after the other, each
after the model has learned from the last. They are trials like all others, of origin `refine`, with the
numbers that come next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autoq.assignment import Assignment
from autoq.errors import BadInput, NotFinite
from autoq.objectives import computed
from autoq.search.controller import violations
from autoq.search.executors import Executor, Failure, Job, completed, make_executor
from autoq.search.observer import Observer
from autoq.search.reporting import is_finite, report
from autoq.search.setup import Problem, pose
from autoq.search.stages import run_job
from autoq.spec import Bound, StudySpec
from autoq.store import Store, StudyRecord, TrialRecord
from autoq.targets import CostTable


def refine_study(
    store: Store,
    study_id: int,
    bounds: Mapping[str, Bound],
    n: int,
    observer: Observer | None = None,
    make: Callable[[StudySpec], Executor] = make_executor,
) -> list[TrialRecord]:
    """Measure up to `n` offers for `bounds` on the search part, then on the report part; the new trials.

    Ends early where the offer is a trial of the study already, or fails. Raises `BadInput` for a study that
    is not finished: what runs it, or will, numbers its trials. The study is left as it was but for the
    trials, whatever happens.
    """
    observer = observer or Observer()
    study = store.study(study_id)
    if study.state != "finished":
        hint = "wait for its end" if study.state == "running" else f"first: autoq resume {study.name}"
        raise BadInput(f"study {study.name!r} is {study.state} and cannot be refined; {hint}")
    store.set_state(study_id, "running")
    try:
        spec = study.study_spec()
        observer.stage("load", 1)
        problem = pose(spec)
        with make(spec) as executor:
            run_job(executor, Job("describe", "describe"))
            observer.advance()
            refinement = _Refinement(store, study, problem, executor, observer)
            numbers = refinement.run(bounds, n)
            report(problem, store, study_id, executor, observer, also=numbers)
    finally:
        store.set_state(study_id, "finished")
    return [store.trial(study_id, number) for number in numbers]


class _Refinement:
    """Measures offers of one study, one at a time."""

    def __init__(
        self, store: Store, study: StudyRecord, problem: Problem, executor: Executor, observer: Observer
    ) -> None:
        self.store, self.study, self.problem = store, study, problem
        self.executor, self.observer = executor, observer
        costs = store.table(study.id, "costs")
        self.costs = None if costs is None else CostTable(**costs)

    def run(self, bounds: Mapping[str, Bound], n: int) -> list[int]:
        """Up to `n` offers; the numbers of the trials that are complete."""
        # The model behind an offer imports more than a study that is only picked from needs.
        from autoq.search.offers import offer

        self.observer.stage("search", n)
        measured: list[int] = []
        for count in range(1, n + 1):
            assignment = offer(self.store, self.study, bounds).assignment
            if (known := self.store.find(self.study.id, assignment.hash)) is not None:
                self.observer.note(f"the offer for these bounds is trial {known.number}, which has been tried")
                break
            trial = self._measure(assignment)
            self.observer.trial(trial, count, n)
            if trial.state != "complete":
                break
            measured.append(trial.number)
        return measured

    def _measure(self, assignment: Assignment) -> TrialRecord:
        number = 1 + max(trial.number for trial in self.store.trials(self.study.id))
        trial = self.store.start_trial(self.study.id, number, assignment, "refine")
        try:
            self._finish(trial, assignment)
        except BaseException as problem:
            # A study that is finished has no trial that runs.
            self._fail(trial, Failure.of(problem), 0.0, "")
            raise
        return self.store.trial(self.study.id, number)

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
