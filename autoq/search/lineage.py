"""Lineage: which trials can be made into others, told from what is stored alone, before anything is loaded."""

from __future__ import annotations

from autoq import trained
from autoq.assignment import Assignment
from autoq.errors import BadInput
from autoq.scheme import Keep
from autoq.store import Store, TrialRecord


def derivable(store: Store, study_id: int, number: int, done: str) -> TrialRecord:
    """The trial, with its assignment. Raises `NotFound`, and `BadInput` for one that is not complete; `done` is what
    it cannot be then."""
    trial = store.trial(study_id, number)
    if trial.state != "complete" or trial.assignment is None:
        name = store.study(study_id).name
        raise BadInput(f"trial {number} of {name!r} is {trial.state}; only a complete one can be {done}")
    return trial


def sequenceable(store: Store, study_id: int, number: int) -> TrialRecord:
    """The trial, if its layers can be quantized in sequence. Raises `BadInput` as well where that was done already, and
    where all that is quantized was trained, which stays as it is."""
    trial = derivable(store, study_id, number, "quantized in sequence")
    assert trial.assignment is not None
    if trial.origin == "sequential":
        raise BadInput(
            f"trial {number} of {trial.study!r} was quantized in sequence already, from trial {trial.parent}"
        )
    if not _quantized_by_method(trial.assignment):
        raise BadInput(
            f"no layer of the assignment is quantized, trained ones aside (trial {number} of {trial.study!r})"
        )
    return trial


def recoverable(store: Store, study_id: int, number: int) -> TrialRecord:
    """The trial, if it holds what can be trained. Raises `BadInput` where it does not."""
    trial = derivable(store, study_id, number, "trained")
    assert trial.assignment is not None
    if not any(map(trained.trainable, trial.assignment.values())):
        raise BadInput(
            f"trial {number} of {trial.study!r} has nothing to train: integer schemes and codebooks can be, awq, "
            "smooth and others not"
        )
    return trial


def sequenced_before(store: Store, study_id: int, number: int) -> int | None:
    """The number of the complete trial that this one became in sequence, None where that was not done yet."""
    made = store.trials(study_id, states=("complete",), parent=number)
    return next((trial.number for trial in made if trial.origin == "sequential"), None)


def unsequenced(store: Store, study_id: int) -> list[int]:
    """The numbers of the frontier's trials that can be quantized in sequence, were not before, and were not made of
    others. Raises `BadInput` where there is none."""
    found = [
        trial.number
        for trial in store.frontier(study_id, with_assignments=True)
        if trial.parent is None and trial.assignment is not None and _quantized_by_method(trial.assignment)
        if sequenced_before(store, study_id, trial.number) is None
    ]
    if not found:
        name = store.study(study_id).name
        raise BadInput(f"no point of the frontier of {name!r} is left to be quantized in sequence; name a trial")
    return found


def _quantized_by_method(assignment: Assignment) -> bool:
    """Whether any layer is what its method made of it: quantized, and not trained."""
    return any(not isinstance(scheme, Keep) and name not in assignment.trained for name, scheme in assignment.items())
