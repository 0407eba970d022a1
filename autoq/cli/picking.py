"""What `pick` says beside its trial: what it is no better than, and what the study's model offers in a gap."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoq.errors import AutoQError

if TYPE_CHECKING:
    from autoq.client import Server as Client
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

    def ask() -> Mapping[str, Any] | None:
        if store.table(study.id, "sensitivity") is None:
            return None  # nothing to predict from
        from autoq.search.offers import offer_json
        from autoq.study import bounds

        return offer_json(store, study, bounds(study, maximum, minimum), best)

    if (offer := offered(study, chosen, store.frontier(study.id), maximum, minimum, best, ask)) is not None:
        found["offer"] = offer
    return found


def picked_there(
    client: Client, name: str, maximum: Mapping[str, str], minimum: Mapping[str, str], best: str | None
) -> dict[str, Any]:
    """As `picked`, by a server."""
    found = client.pick(name, maximum, minimum, best)
    whole = client.frontier(name, {}, {}, with_assignments=False)
    by_number = {trial.number: trial for trial in whole.points}
    if others := [by_number[number] for number in found["no_better_than"] if number in by_number]:
        sys.stderr.write(tie_line(whole.study, found["number"], others) + "\n")

    def ask() -> Mapping[str, Any] | None:
        return client.offer(name, maximum, minimum, best) if client.has_sensitivities(name) else None

    chosen = by_number.get(found["number"])
    if chosen is None:
        return found  # the frontier went on since
    offer = offered(whole.study, chosen, whole.points, maximum, minimum, best, ask)
    return found if offer is None else found | {"offer": offer}


def offered(
    study: StudyRecord,
    chosen: TrialRecord,
    frontier: Sequence[TrialRecord],
    maximum: Mapping[str, str],
    minimum: Mapping[str, str],
    best: str | None,
    ask: Callable[[], Mapping[str, Any] | None],
) -> dict[str, Any] | None:
    """`{"predicted": {objective: {"value", "low", "high", "kind"}}, "assignment"}` of what the study's model
    offers between `chosen` and the bound on the size, or as the smallest within a bound on the loss; None where
    that is full, or nothing better is offered. Says on standard error what it offers, or why it cannot.

    `ask` gives the model's offer as `search.offers.offer_json` does, None where there is no model.
    """
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
    if all(sign * trial.values([objective.name])[0] >= sign * value for trial in frontier):
        return None  # the limits keep nothing better out
    if smallest:
        value *= 1 - GAP
    try:
        found = ask()
    except AutoQError as problem:
        sys.stderr.write(f"nothing is offered between trial {chosen.number} and the bounds: {problem}\n")
        return None
    if found is None or found["trial"] is not None:
        return None  # no model, or an assignment that was measured
    predicted = found["predicted"]
    if objective.name in predicted and sign * predicted[objective.name]["value"] >= sign * value:
        return None
    offer = {"predicted": predicted, "assignment": found["assignment"]}
    sys.stderr.write(offer_line(study, chosen, offer) + "\n")
    return offer


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
