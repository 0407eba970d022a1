"""What commands print: tables, JSON, CSV; and the database that it comes from."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoq.errors import BadInput, NotFound

if TYPE_CHECKING:
    from rich.console import RenderableType

    from autoq.store import Store, StudyRecord, TrialRecord

# Baselines come first in every study's plan, so they are among its first trials.
PLANNED = 64


def open_store(db: str) -> Store:
    """The existing database. Raises `NotFound` where there is none."""
    from autoq.store import Store

    return Store.open(db, create=False)


def print_json(document: Any) -> None:
    """One JSON document on standard output."""
    sys.stdout.write(json.dumps(document, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def show(parts: Sequence[RenderableType]) -> None:
    """Tables and lines on standard output. What is marked as not to be wrapped is never cut either."""
    from autoq.display.tables import console

    out = console()
    for part in parts:
        out.print(part, soft_wrap=bool(getattr(part, "no_wrap", False)))


def pairs(texts: Sequence[str], option: str) -> Mapping[str, str]:
    """`objective=value` texts as a mapping. Raises `BadInput`."""
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.strip() or not value.strip():
            raise BadInput(f"{option} {text!r} must look like size_bytes=90MB")
        if name.strip() in found:
            raise BadInput(f"{option} names {name.strip()} twice")
        found[name.strip()] = value.strip()
    return found


def document(
    study: StudyRecord, trials: Sequence[TrialRecord], ties: Mapping[int, Sequence[int]] | None = None
) -> dict[str, Any]:
    """`{"study", "objectives", "trials"}`: what `frontier` and `trials` print as JSON.

    With `ties`, each trial has `no_better_than`, the numbers of those that it is better than in nothing, beyond noise.
    """
    return {
        "study": study.name,
        "objectives": [objective.to_json() for objective in study.objectives],
        "trials": [
            trial.to_json() | ({} if ties is None else {"no_better_than": list(ties[trial.number])}) for trial in trials
        ],
    }


def baselines(store: Store, study: StudyRecord) -> list[TrialRecord]:
    """The complete uniform baselines of a study."""
    first = store.trials(study.id, states=("complete",), limit=PLANNED)
    return [trial for trial in first if trial.baseline is not None]


def named_trial(store: Store, study: StudyRecord, text: str) -> TrialRecord:
    """A trial by its number or by its baseline's name; a duplicate gives the trial that has its values."""
    if text.isdecimal():
        trial = store.trial(study.id, int(text))
    else:
        named = {trial.baseline: trial.number for trial in baselines(store, study) if trial.baseline}
        if text not in named:
            known = ", ".join(sorted(named)) or "(there are none)"
            raise NotFound(f"study {study.name!r} has no trial {text!r}; give a number, or a baseline: {known}")
        trial = store.trial(study.id, named[text])
    return trial if trial.duplicate_of is None else store.trial(study.id, trial.duplicate_of)


def print_frontier(
    store: Store,
    study: StudyRecord,
    as_json: bool,
    maximum: Mapping[str, str] | None = None,
    minimum: Mapping[str, str] | None = None,
    as_csv: bool = False,
) -> None:
    """The frontier of a study on standard output, within limits on objectives."""
    points = store.frontier(study.id, with_assignments=as_json)
    uniform = baselines(store, study)
    if maximum or minimum:
        from autoq.study import excess, measured_objectives, read_both

        known = tuple(measured_objectives([*points, *uniform], study.objectives))
        upper, lower = read_both(maximum or {}, minimum or {}, known)
        points = [trial for trial in points if not excess(trial, upper, lower)]
        uniform = [trial for trial in uniform if not excess(trial, upper, lower)]
    if as_csv:
        _print_csv(study, points)
        return
    from autoq.display.hindsight import hindsight
    from autoq.display.ties import stored_ties

    ties, seen = stored_ties(store, study, points), hindsight(store, study)
    if as_json:
        print_json(document(study, points, ties) | seen.to_json())
        return
    from autoq.display import tables

    limited = bool(maximum or minimum)
    show(tables.frontier(study, points, uniform, tables.console(), limited, ties, seen.lines()))


def _print_csv(study: StudyRecord, trials: Sequence[TrialRecord]) -> None:
    from autoq.study import measured_objectives

    names = list(measured_objectives(trials, study.objectives))
    parts = ("", "_stderr", "_unit", "_kind", "_part")
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(["number", "origin", "baseline", "hash", *(name + part for name in names for part in parts)])
    for trial in trials:
        row: list[Any] = [trial.number, trial.origin, trial.baseline or "", trial.hash]
        best = trial.best_measurements()
        for name in names:
            m = best.get(name)
            row += [m.value, "" if m.stderr is None else m.stderr, m.unit, m.kind, m.part] if m else [""] * len(parts)
        writer.writerow(row)
