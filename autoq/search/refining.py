"""Refining: new trials of a finished study, where somebody who picks would want a point and there is none.

What is measured is what the study's model offers for the bounds and has not been tried, one assignment after
the other, each after the model has learned from the last. They are trials like all others, of origin `refine`, with the
numbers that come next.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from autoq.assignment import Assignment
from autoq.errors import AutoQError, BadInput, LeaseLost, UnknownName
from autoq.search.additions import Additions, require_finished
from autoq.search.executors import Executor, Job, make_executor
from autoq.search.holding import Hold, StopRequested, Watching, holding
from autoq.search.observer import Observer
from autoq.search.reporting import report
from autoq.search.setup import pose
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
    hold: Hold | None = None,
    first_number: int | None = None,
) -> list[TrialRecord]:
    """Measure up to `n` offers for `bounds` on the search part, then on the report part; the new trials.

    `best` is the objective that they are to be best in. Ends early where nothing untried is likely to be better
    than what was measured, or a trial fails, or the study is asked to stop. Raises `BadInput` for an `n` below 1, for a
    `best` that is unknown and for a study that is not finished: what runs it, or will, numbers its trials; and
    `StudyBusy`. The first offer is made before the workers are, so that nothing is loaded where there is none. The
    study is left as it was but for the trials, whatever happens.

    A queue's process has the study in its `hold`, and what was refined from trial `first_number` on, before it was
    interrupted, counts.
    """
    observer = observer or Observer()
    if n < 1:
        raise BadInput(f"n must be at least 1 (got {n})")
    study = store.study(study_id)
    require_finished(study, "refined", hold is not None)
    names = [objective.name for objective in study.objectives]
    if best is not None and best not in names:
        raise UnknownName("objective of this study", best, names)
    with holding(store, study_id, hold) as hold:
        refinement = _Refinement(hold, study, Watching(observer, hold), bounds, best)
        try:
            refinement.run(n, make, first_number)
        except StopRequested as stop:
            hold.store.queue.settle(study_id, hold.state_after(stop, "finished"))
        except LeaseLost:
            raise
        except BaseException as problem:
            hold.store.queue.settle(study_id, hold.state_after(problem, "finished"))
            raise
        else:
            none = "nothing untried is likely to be better within the limits that were asked for"
            hold.store.queue.settle(study_id, "finished", None if refinement.measured else none)
        finally:
            hold.executor = None
        return [hold.store.trial(study_id, number) for number in refinement.measured]


class _Refinement:
    """Measures offers of one study, one at a time. `measured` are the numbers of the trials that are complete."""

    def __init__(
        self, hold: Hold, study: StudyRecord, observer: Observer, bounds: Mapping[str, Bound], best: str | None
    ) -> None:
        self.hold, self.store, self.study, self.observer = hold, hold.store, study, observer
        self.bounds, self.best = bounds, best
        self.measured: list[int] = []

    def run(self, n: int, make: Callable[[StudySpec], Executor], first_number: int | None) -> None:
        """Measure what is missing of `n` offers, and report."""
        left: TrialRecord | None = None
        if first_number is not None:
            mine = self.store.trials(self.study.id, with_assignments=True, after=first_number - 1)
            self.measured = [trial.number for trial in mine if trial.state == "complete"]
            left = next((trial for trial in mine if trial.state == "running"), None)
        self.observer.stage("load", 1)
        first = self._offer() if left is None and len(self.measured) < n else None
        if left is None and first is None and not self.measured:
            return
        self.store.set_state(self.study.id, "running")
        problem = pose(self.study.study_spec())
        with make(problem.spec) as executor:
            self.hold.executor = executor
            facts = run_job(executor, Job("describe", "describe")).value
            self.hold.device = str(facts.get("device", ""))
            self.observer.advance()
            self._measure(n, Additions(self.hold, self.study, problem, executor), left, first)
            if self.measured:
                report(problem, self.store, self.study.id, executor, self.observer, also=self.measured)

    def _measure(self, n: int, additions: Additions, left: TrialRecord | None, first: Assignment | None) -> None:
        self.observer.stage("search", n)
        assignment = first
        while left is not None or assignment is not None:
            if left is not None:
                trial, left = additions.again(left), None
            else:
                assert assignment is not None
                trial = additions.measure(assignment, "refine")
            self.observer.trial(trial, len(self.measured) + 1, n)
            if trial.state != "complete":
                break
            self.measured.append(trial.number)
            self.hold.watch()
            assignment = self._next() if len(self.measured) < n else None

    def _offer(self) -> Assignment | None:
        """What the model offers now beside what was tried; None, with a note, where it offers nothing."""
        # The model behind an offer imports more than a study that is only picked from needs.
        from autoq.search.offers import offer

        found = offer(self.store, self.study, self.bounds, self.best, fresh=True)
        if found is None:
            self.observer.note("the model offers nothing untried that is likely to be better within these bounds")
            return None
        assignment: Assignment = found.assignment
        return assignment

    def _next(self) -> Assignment | None:
        try:
            return self._offer()
        except LeaseLost:
            raise
        except AutoQError as problem:
            # What was measured is to be reported all the same.
            self.observer.note(f"nothing more is offered: {problem}")
            return None
