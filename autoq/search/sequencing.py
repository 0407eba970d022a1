"""Sequencing: a trial's layers are quantized once more, each for what it reads in the quantized model.

What `autoq.sequential` makes of them becomes a trial of origin `sequential`, as `autoq.search.deriving` says: the
weights are not those that were measured, so they are measured anew. Worse ones are stored, too, like all that was
measured; whoever picks from the frontier never gets them, and the command says which of the two to take.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

from autoq.errors import BadInput
from autoq.search.deriving import Layers, derive, here
from autoq.search.executors import Executor, Job
from autoq.search.holding import Hold
from autoq.search.lineage import sequenceable, sequenced_before
from autoq.search.observer import Observer
from autoq.search.stages import run_job
from autoq.spec import StudySpec
from autoq.store import Store, TrialRecord


def sequence_trial(
    store: Store,
    study_id: int,
    number: int,
    observer: Observer | None = None,
    make: Callable[[StudySpec], AbstractContextManager[Executor]] = here,
    hold: Hold | None = None,
) -> TrialRecord:
    """Quantize trial `number` in sequence and store the result as a new trial with both parts measured; the new trial.

    Where that was done before, that trial. Raises `NotFound` for a trial that is not there, and `BadInput` for one that
    is not complete or none of whose layers is quantized, and for a study that is not finished. The study is
    left as it was but for the trial, whatever happens. A queue's process has it in `hold`.
    """
    observer = observer or Observer()
    parent = sequenceable(store, study_id, number)
    if hold is None and (before := sequenced_before(store, study_id, number)) is not None:
        same = store.trial(study_id, before)
        if any(part == "report" for _, part in same.measurements):  # else whoever made it ended before its report
            observer.note(f"this is trial {before}, which was made likewise before")
            return same
    return derive(store, parent, "sequential", _make, observer, make, hold)


def sequence_trials(
    store: Store,
    study_id: int,
    numbers: Sequence[int],
    observer: Observer | None = None,
    make: Callable[[StudySpec], Executor] = here,
) -> Iterator[TrialRecord]:
    """`sequence_trial` of several, one after the other, each given once it is stored; the model is loaded once.

    One of several that cannot be done is told of and left out.
    """
    observer = observer or Observer()
    with ExitStack() as stack:
        made: list[Executor] = []

        def shared(spec: StudySpec) -> AbstractContextManager[Executor]:
            if not made:
                made.append(stack.enter_context(make(spec)))
            return nullcontext(made[0])

        for number in numbers:
            try:
                yield sequence_trial(store, study_id, number, observer, shared)
            except BadInput as refused:
                if len(numbers) == 1:
                    raise
                observer.note(f"trial {number} is left out: {refused}")


def _make(executor: Executor, parent: TrialRecord, observer: Observer) -> tuple[Layers, Mapping[str, Any]]:
    def tell(done: int, blocks: int) -> None:
        if done:
            observer.advance()
        else:
            observer.stage("sequence", blocks)

    arguments = {"assignment": parent.assignment, "tell": tell}
    layers, facts = run_job(executor, Job(f"sequence-{parent.number}", "sequence", arguments)).value
    return layers, facts


def is_better(store: Store, found: TrialRecord) -> bool | None:
    """Whether a derived trial is better than its parent on the search part, in the study's first quality objective;
    None where that was not measured of both."""
    assert found.parent is not None
    study = store.study(found.study_id)
    before, after = store.trial(study.id, found.parent).measurements, found.measurements
    for name, direction in ((objective.name, objective.direction) for objective in study.objectives):
        old, new = before.get((name, "search")), after.get((name, "search"))
        if old is not None and new is not None and new.kind == "measured":
            return new.value < old.value if direction == "minimize" else new.value > old.value
    return None
