"""Refining: new trials of a finished study, where somebody who picks would want a point and there is none.

What is measured is what the study's model offers for the bounds and has not been tried, one assignment after
the other, each after the model has learned from the last. They are trials like all others, of origin `refine`, with the
numbers that come next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autoq.assignment import Assignment
from autoq.errors import AutoQError, BadInput, UnknownName
from autoq.search.additions import Additions, require_finished
from autoq.search.executors import Executor, Job, make_executor
from autoq.search.observer import Observer
from autoq.search.reporting import report
from autoq.search.setup import Problem, pose
from autoq.search.stages import run_job
from autoq.spec import Bound, StudySpec
from autoq.store import Store, StudyRecord, TrialRecord


def refine_study(
    store: Store,
    study_id: int,
    bounds: Mapping[str, Bound],
    n: int,
    observer: Observer | None = None,
    make: Callable[[StudySpec], Executor] = make_executor,
    best: str | None = None,
) -> list[TrialRecord]:
    """Measure up to `n` offers for `bounds` on the search part, then on the report part; the new trials.

    `best` is the objective that they are to be best in. Ends early where nothing untried is likely to be better
    than what was measured, or a trial fails. Raises `BadInput` for an `n` below 1, for a `best` that is unknown and
    for a study that is not finished: what runs it, or will, numbers its trials. The first offer is made before the
    workers are, so that nothing is loaded where there is none. The study is left as it was but for the trials,
    whatever happens.
    """
    observer = observer or Observer()
    if n < 1:
        raise BadInput(f"n must be at least 1 (got {n})")
    study = store.study(study_id)
    require_finished(study, "refined")
    observer.stage("load", 1)
    names = [objective.name for objective in study.objectives]
    if best is not None and best not in names:
        raise UnknownName("objective of this study", best, names)
    first = _untried(store, study, bounds, best, observer)
    if first is None:
        return []
    store.set_state(study_id, "running")
    try:
        spec = study.study_spec()
        problem = pose(spec)
        with make(spec) as executor:
            run_job(executor, Job("describe", "describe"))
            observer.advance()
            refinement = _Refinement(store, study, problem, executor, observer)
            numbers = refinement.run(first, bounds, best, n)
            if numbers:
                report(problem, store, study_id, executor, observer, also=numbers)
    finally:
        store.set_state(study_id, "finished")
    return [store.trial(study_id, number) for number in numbers]


def _untried(
    store: Store, study: StudyRecord, bounds: Mapping[str, Bound], best: str | None, observer: Observer
) -> Assignment | None:
    """What the model offers now beside what was tried; None, with a note, where it offers nothing."""
    # The model behind an offer imports more than a study that is only picked from needs.
    from autoq.search.offers import offer

    found = offer(store, study, bounds, best, fresh=True)
    if found is None:
        observer.note("the model offers nothing untried that is likely to be better within these bounds")
        return None
    assignment: Assignment = found.assignment
    return assignment


class _Refinement:
    """Measures offers of one study, one at a time."""

    def __init__(
        self, store: Store, study: StudyRecord, problem: Problem, executor: Executor, observer: Observer
    ) -> None:
        self.store, self.study, self.problem = store, study, problem
        self.executor, self.observer = executor, observer
        self.additions = Additions(store, study, problem, executor)

    def run(self, first: Assignment, bounds: Mapping[str, Bound], best: str | None, n: int) -> list[int]:
        """`first` and up to `n` - 1 offers more; the numbers of the trials that are complete."""
        self.observer.stage("search", n)
        measured: list[int] = []
        assignment: Assignment | None = first
        while assignment is not None:
            trial = self.additions.measure(assignment, "refine")
            self.observer.trial(trial, len(measured) + 1, n)
            if trial.state != "complete":
                break
            measured.append(trial.number)
            assignment = self._next(bounds, best) if len(measured) < n else None
        return measured

    def _next(self, bounds: Mapping[str, Bound], best: str | None) -> Assignment | None:
        try:
            return _untried(self.store, self.study, bounds, best, self.observer)
        except AutoQError as problem:
            # What was measured is to be reported all the same.
            self.observer.note(f"nothing more is offered: {problem}")
            return None
