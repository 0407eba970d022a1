"""What the command line and the HTTP API answer alike: JSON documents, CSV, and how a request names things.

Records have their own `to_json`; here is what is made of several of them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from autoq.errors import BadInput, NotFound

if TYPE_CHECKING:
    from autoq.layer import Layer
    from autoq.plugins import Folder
    from autoq.store import Store, StudyRecord, TrialRecord

# Baselines come first in every study's plan, so they are among its first trials.
PLANNED = 64


def pairs(texts: Sequence[str], option: str) -> Mapping[str, str]:
    """`objective=value` texts as a mapping. Raises `BadInput`."""
    found: dict[str, str] = {}
    for text in texts:
        name, sign, value = text.partition("=")
        if not sign or not name.strip() or not value.strip():
            raise BadInput(f"{option} {text[:200]!r} must look like size_bytes=90MB")
        if name.strip() in found:
            raise BadInput(f"{option} names {name.strip()[:80]} twice")
        found[name.strip()] = value.strip()
    return found


def document(
    study: StudyRecord, trials: Sequence[TrialRecord], ties: Mapping[int, Sequence[int]] | None = None
) -> dict[str, Any]:
    """`{"study", "objectives", "trials"}`: a frontier, or a list of trials.

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


def within(
    study: StudyRecord,
    points: list[TrialRecord],
    uniform: list[TrialRecord],
    maximum: Mapping[str, str],
    minimum: Mapping[str, str],
) -> tuple[list[TrialRecord], list[TrialRecord]]:
    """The points, and the baselines, that keep limits on objectives. Raises as `autoq.study.read_both` does."""
    if not (maximum or minimum):
        return points, uniform
    from autoq.study import excess, measured_objectives, read_both

    upper, lower = read_both(maximum, minimum, tuple(measured_objectives([*points, *uniform], study.objectives)))

    def keeping(trials: list[TrialRecord]) -> list[TrialRecord]:
        return [trial for trial in trials if not excess(trial, upper, lower)]

    return keeping(points), keeping(uniform)


def named_trial(store: Store, study: StudyRecord, text: str) -> TrialRecord:
    """A trial by its number or by its baseline's name; a duplicate gives the trial that has its values."""
    if text.isascii() and text.isdecimal() and len(text) < 20:
        trial = store.trial(study.id, int(text))
    else:
        named = {trial.baseline: trial.number for trial in baselines(store, study) if trial.baseline}
        if text not in named:
            known = ", ".join(sorted(named)) or "(there are none)"
            raise NotFound(f"study {study.name!r} has no trial {text[:80]!r}; give a number, or a baseline: {known}")
        trial = store.trial(study.id, named[text])
    return trial if trial.duplicate_of is None else store.trial(study.id, trial.duplicate_of)


def layers(store: Store, study: StudyRecord) -> dict[str, Layer] | None:
    """The layers' shapes as the study's creation stored them; None for a study without them."""
    from autoq.layer import Layer

    table = store.table(study.id, "layers")
    if table is None:
        return None
    return {name: Layer(name=name, **{k: v for k, v in facts.items() if k != "name"}) for name, facts in table.items()}


def tied(
    store: Store, study: StudyRecord, chosen: TrialRecord, maximum: Mapping[str, str], minimum: Mapping[str, str]
) -> list[TrialRecord]:
    """The frontier's trials within the limits that `chosen` is no better than, beyond noise."""
    from autoq.display.ties import stored_ties

    points, _ = within(study, store.frontier(study.id), [], maximum, minimum)
    numbers = set(stored_ties(store, study, points)[chosen.number])
    return [trial for trial in points if trial.number in numbers]


def to_csv(study: StudyRecord, trials: Sequence[TrialRecord]) -> str:
    """One line a trial: per objective its value, standard error, unit, kind and part."""
    from autoq.study import measured_objectives

    names = list(measured_objectives(trials, study.objectives))
    parts = ("", "_stderr", "_unit", "_kind", "_part")
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["number", "origin", "baseline", "hash", *(name + part for name in names for part in parts)])
    for trial in trials:
        row: list[Any] = [trial.number, trial.origin, trial.baseline or "", trial.hash]
        best = trial.best_measurements()
        for name in names:
            m = best.get(name)
            row += [m.value, "" if m.stderr is None else m.stderr, m.unit, m.kind, m.part] if m else [""] * len(parts)
        writer.writerow(row)
    return out.getvalue()


def choices(folder: Folder) -> list[dict[str, Any]]:
    """`[{"name", "summary"}]` of the plugins of a folder."""
    from autoq import plugins

    return [{"name": name, "summary": plugins.summary(folder, name)} for name in plugins.names(folder)]


def methods() -> list[dict[str, Any]]:
    """The methods, and how KV caches are quantized, which is no method: it knows no weights."""
    from autoq import kv_cache

    caches = [{"name": f"kv{bits}", "summary": kv_cache.summary(bits)} for bits in kv_cache.BITS]
    return [*choices("methods"), *caches]


def offered(what: str) -> list[dict[str, Any]]:
    """What there is to choose from: of `methods`, `targets`, `objectives` or `samplers`."""
    made = {"methods": methods, "targets": targets}.get(what)
    if made is not None:
        return made()
    return choices("search.samplers" if what == "samplers" else "objectives")


def targets() -> list[dict[str, Any]]:
    """`[{"name", "summary", "times", "predicts_only", "exports", "unavailable"}]` of all targets."""
    from autoq import plugins
    from autoq.targets import Target

    found = []
    for file in plugins.names("targets"):
        target = plugins.load("targets", file, Target)
        latencies = sorted(name.removeprefix("latency_").removesuffix("_ms") for name in target.latencies)
        found.append(
            {
                "name": file.replace("_", "-"),
                "summary": plugins.summary("targets", file),
                "times": latencies,
                "predicts_only": target.predicts_only,
                "exports": target.exports(),
                "unavailable": target.unavailable(),
            }
        )
    return found
