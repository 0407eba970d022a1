"""Whole studies through the real controller and the real store, whose qualities are a made-up function of the
assignment, and what must hold of one whatever happened to it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from autoq.measurement import Measurement
from autoq.scheme import code_bits
from autoq.search.executors import LocalExecutor
from autoq.search.observer import Observer
from autoq.spec import StudySpec, build_spec
from autoq.store import Store, StudyRecord, TrialRecord

KL, SIZE = "kl_nats_per_token", "size_bytes"


class Evaluator:
    """A sum over layers, so that other assignments have other qualities."""

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec

    def describe(self) -> dict[str, Any]:
        return {"device": "made up", "threads": 1}

    def measure(self, assignment: Any, part: Any, **_: Any) -> list[Measurement]:
        value = sum((1 + sum(name.encode()) % 7) * 4.0 ** -code_bits(s) for name, s in assignment.items())
        return [Measurement(KL, value * (1.01 if part == "report" else 1.0), "nats/token", "measured", part, 0.01, 100)]


def make(spec: StudySpec) -> LocalExecutor:
    """The executor of such a study, in this process."""
    return LocalExecutor(spec, Evaluator)  # type: ignore[arg-type]


def spec(model: Path, trials: int = 20, seed: int = 0, sampler: str = "random", **more: Any) -> StudySpec:
    """A study of a few layers."""
    tree = {
        "name": "made-up",
        "model": {"id": str(model)},
        "target": {"name": "generic"},
        "space": {"schemes": ["rtn-int2-g32", "rtn-int3-g32", "rtn-int4-g32", "rtn-int8-g32"]},
        "objectives": [KL, SIZE],
        "sampler": {"name": sampler, "seeds": 0, "seed": seed},
        "budget": {"trials": trials},
    }
    return build_spec({**tree, **more})


class Witness(Observer):
    """What was acknowledged: number -> the trial as it was told of, and what was noted. `each` is called after."""

    def __init__(self, each: Callable[[TrialRecord], None] = lambda _: None) -> None:
        self.acknowledged: dict[int, TrialRecord] = {}
        self.notes: list[str] = []
        self.told: list[int] = []
        self.each = each

    def trial(self, trial: TrialRecord, done: int, budget: int) -> None:
        self.acknowledged[trial.number] = trial
        self.told.append(trial.number)
        self.each(trial)

    def note(self, text: str) -> None:
        self.notes.append(text)


def outcome(store: Store, study: StudyRecord) -> list[tuple[Any, ...]]:
    """All of a study that depends on its spec alone."""
    return [
        (t.number, t.state, t.origin, t.baseline, t.hash, t.duplicate_of, t.feasible, t.on_frontier,
         sorted((name, part, m.value, m.stderr, m.n) for (name, part), m in t.measurements.items()))
        for t in store.trials(study.id)
    ]  # fmt: skip


def check(store: Store, study: StudyRecord, witness: Witness | None, whole: list[tuple[Any, ...]]) -> None:
    """Finished, as `whole` is; nothing that was acknowledged is lost or another, and no trial was told of twice; the
    frontier is that of the trials."""
    found = store.study(study.id)
    assert (found.state, found.message) == ("finished", None)
    assert outcome(store, study) == whole
    assert [trial.number for trial in store.frontier(study.id)] == store.recompute_frontier(study.id)
    if witness is not None:
        assert len(witness.told) == len(set(witness.told))
        stored = {trial.number: trial for trial in store.trials(study.id)}
        for number, told in witness.acknowledged.items():
            for key, measurement in told.measurements.items():
                assert json.dumps(stored[number].measurements[key].to_json()) == json.dumps(measurement.to_json())
