"""What `pick` says beside its trial: what it is no better than, and what the study's model offers in a gap."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from autoq.errors import AutoQError

if TYPE_CHECKING:
    from autoq.spec import Bound
    from autoq.store import Store, StudyRecord, TrialRecord

GAP = 0.02  # how far below a bound on the size a pick must be for an offer to be worth a look


def tie_line(study: StudyRecord, number: int, others: list[TrialRecord]) -> str:
    """One line that names the others, each with its size."""
    from autoq.display.compare import sort_objective
    from autoq.display.numbers import quantity

    key = sort_objective(study.objectives)
    named = [f"{t.number} ({quantity(t.best_measurements()[key.name].value, key.unit)})" for t in others]
    return f"beyond noise trial {number} is no better than {', '.join(named)}"


def picked(
    store: Store, study: StudyRecord, maximum: Mapping[str, str], minimum: Mapping[str, str], best: str | None
) -> dict[str, Any]:
    """The frontier's best trial within limits as JSON, with `no_better_than` and, where there is one, `offer`; says
    on standard error what these are."""
    from autoq.documents import tied
    from autoq.study import pick

    chosen = pick(study, store.frontier(study.id), maximum, minimum, best)
    others = tied(store, study, chosen, maximum, minimum)
    found = store.trial(study.id, chosen.number).to_json() | {"no_better_than": [trial.number for trial in others]}
    if others:
        sys.stderr.write(tie_line(study, chosen.number, others) + "\n")
    if (offer := offered(store, study, chosen, maximum, minimum, best)) is not None:
        found["offer"] = offer
        sys.stderr.write(offer_line(study, chosen, offer) + "\n")
    return found


def offered(
    store: Store,
    study: StudyRecord,
    chosen: TrialRecord,
    maximum: Mapping[str, str],
    minimum: Mapping[str, str],
    best: str | None,
) -> dict[str, Any] | None:
    """`{"predicted": {objective: {"value", "low", "high", "kind"}}, "assignment"}` of what the study's model
    offers between `chosen` and the bound on the size, or as the smallest within a bound on the loss; None where
    that is full, or nothing better is offered."""
    from autoq.study import bounds

    names = {objective.name for objective in study.objectives}
    if "size_bytes" not in names or not names.issuperset({*maximum, *minimum}):
        return None  # no model predicts what the search did not steer by
    limits = bounds(study, maximum, minimum)
    smallest = best == "size_bytes" and "size_bytes" not in limits and bool(limits)
    size = limits["size_bytes"].max if "size_bytes" in limits else None
    if not smallest and (size is None or chosen.values(["size_bytes"])[0] >= (1 - GAP) * size):
        return None
    objective = next(o for o in study.objectives if o.name == (best or study.objectives[0].name))
    sign = 1 if objective.direction == "minimize" else -1
    value = chosen.values([objective.name])[0]
    if all(sign * trial.values([objective.name])[0] >= sign * value for trial in store.frontier(study.id)):
        return None  # the limits keep nothing better out
    if smallest:
        value *= 1 - GAP
    if store.table(study.id, "sensitivity") is None:
        return None  # nothing to predict from
    from autoq.search.offers import offer

    try:
        found = offer(store, study, limits, best)
        assert found is not None, "only a fresh one may be missing"
    except AutoQError as problem:
        sys.stderr.write(f"nothing is offered between trial {chosen.number} and the bounds: {problem}\n")
        return None
    if store.find(study.id, found.assignment.hash) is not None:
        return None
    if objective.name in found.predicted and sign * found.predicted[objective.name][0] >= sign * value:
        return None
    exact = {name for (name, _), m in chosen.measurements.items() if m.kind == "computed"}
    predicted = {
        name: {"value": value, "low": low, "high": high, "kind": "computed" if name in exact else "predicted"}
        for name, (value, low, high) in found.predicted.items()
    }
    return {"predicted": predicted, "assignment": found.assignment.to_dict()}


def offer_line(study: StudyRecord, chosen: TrialRecord, found: Mapping[str, Any]) -> str:
    """The offer as a prediction, and how to have it measured."""
    from autoq.display.numbers import number, quantity

    said = []
    for objective in study.objectives:
        if (predicted := found["predicted"].get(objective.name)) is not None:
            text = f"{objective.name} {quantity(predicted['value'], objective.unit)}"
            if predicted["low"] != predicted["high"]:
                low, high = (number(predicted[side], objective.unit) for side in ("low", "high"))
                text += f" ({low} to {high})"
            said.append(text)
    return (
        f"beyond trial {chosen.number} an assignment is predicted, not measured, to have {', '.join(said)}; "
        "measure it: the same command with --refine 1"
    )


def refine(store: Store, study: StudyRecord, bounds: Mapping[str, Bound], best: str | None, count: int) -> None:
    """Have `count` offers measured that are to be best in `best`, with progress on standard error."""
    gc.enable()
    from autoq.cli.run import terminable
    from autoq.display.progress import default_observer
    from autoq.search.refining import refine_study

    with terminable(), contextlib.ExitStack() as stack:
        observer = stack.enter_context(default_observer(study.objectives))
        refine_study(store, study.id, bounds, count, observer, best=best)
