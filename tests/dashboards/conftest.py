"""Studies of every shape that a figure may be asked of, in real databases."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from autoq.assignment import Assignment
from autoq.dashboards.study_view import View
from autoq.measurement import Measurement
from autoq.search.sampler_view import PREDICTED
from autoq.spec import build_spec
from autoq.store import Store

KL = ("kl_nats_per_token", "nats/token", "minimize")
SIZE = ("size_bytes", "bytes", "minimize")
DECODE = ("latency_decode_ms", "ms", "minimize")
ACCURACY = ("accuracy", "share", "maximize")
PEAK = ("peak_memory_bytes", "bytes", "minimize")
ENERGY = ("energy_joule_per_token", "J", "minimize")
EVIL = "<img src=x onerror=alert(1)></script><script>alert(2)</script>&amp; %{x} " + "long " * 40

BLOCKS, MODULES = 3, ("self_attn.q_proj", "mlp.down_proj")
LAYERS = [f"model.layers.{block}.{module}" for block in range(BLOCKS) for module in MODULES]
SCHEMES = ("rtn-int4-g64", "rtn-int8-channel-sym", "keep")
LOSSES = {
    name: {"rtn-int4-g64": 0.01 * (place + 1), "rtn-int8-channel-sym": 0.0001 * (place + 1)}
    for place, name in enumerate(LAYERS)
}


def layer_table() -> dict[str, Any]:
    def facts(name: str, block: int | None, kind: str, tied: Sequence[str] = ()) -> dict[str, Any]:
        return {
            "name": name, "kind": kind, "out_features": 128, "in_features": 64, "dtype_bytes": 2, "has_bias": False,
            "tied": list(tied), "fusion_group": None, "block": block, "stack": None, "reach": 1.0,
        }  # fmt: skip

    table = {name: facts(name, place // len(MODULES), "linear") for place, name in enumerate(LAYERS)}
    return table | {"lm_head": facts("lm_head", None, "head", ["model.embed_tokens"])}


def assignment(seed: int) -> Assignment:
    """One of 3^6 assignments; the head stays."""
    texts = {name: SCHEMES[seed // 3**place % 3] for place, name in enumerate(LAYERS)}
    return Assignment.from_dict(texts | {"lm_head": "keep"})


class Maker:
    """Writes studies as a controller would."""

    def __init__(self, store: Store) -> None:
        self.store = store

    def study(self, objectives: Sequence[tuple[str, str, str]] = (KL, SIZE), name: str = "study", **spec: Any) -> int:
        wanted = build_spec({"name": name, "model": {"id": "demo:smollm2"}, **spec})
        made = self.store.create_study(wanted, objectives)
        self.store.set_state(made.id, "running")
        return made.id

    def trial(
        self,
        study: int,
        number: int,
        values: Sequence[float],
        *,
        baseline: str | None = None,
        feasible: bool = True,
        end: str = "complete",
        report: bool = False,
        predicted: float | None = None,
        stderr: float | None = 0.01,
    ) -> int:
        """One trial with search values of the study's objectives; latencies are predicted, sizes computed."""
        objectives = self.store.study(study).objectives
        origin = "baseline" if baseline else "sampler"
        attrs = None if predicted is None else {PREDICTED: predicted}
        trial = self.store.start_trial(study, number, assignment(number), origin, baseline, attrs)
        if end == "running":
            return trial.id
        if end == "failed":
            self.store.fail_trial(trial.id, 1, "ValueError", EVIL, f"Traceback\n{EVIL}", 1.5, "w1")
            return trial.id
        found = [
            self._measured(o.name, o.unit, value, stderr, "search") for o, value in zip(objectives, values, strict=True)
        ]
        violations = {"size_bytes": -1.0 if feasible else 2.0}
        if end == "stopped":
            self.store.stop_trial(trial.id, 1, found, violations, 0.5, "w1")
            return trial.id
        self.store.finish_trial(trial.id, 1, found, violations, 2.0, "w1")
        if report:
            told = [
                self._measured(o.name, o.unit, value * 1.05, stderr, "report")
                for o, value in zip(objectives, values, strict=True)
                if o.unit != "bytes"
            ]
            self.store.add_measurements(trial.id, told)
        return trial.id

    @staticmethod
    def _measured(name: str, unit: str, value: float, stderr: float | None, part: str) -> Measurement:
        exact = unit in ("bytes", "J")
        kind = "computed" if exact else "predicted" if unit == "ms" and part == "search" else "measured"
        error = None if stderr is None or kind != "measured" else stderr * abs(value)
        detail = {"predicted_ms": value / 1.05} if unit == "ms" and part == "report" else {}
        return Measurement(name, value, unit, kind, part, error, 100, "cpu", detail)  # type: ignore[arg-type]

    def tables(self, study: int) -> None:
        self.store.put_table(study, "layers", layer_table())
        self.store.put_table(study, "sensitivity", LOSSES)


def ordinary(
    make: Maker, objectives: Sequence[tuple[str, str, str]] = (KL, SIZE, DECODE), name: str = "ordinary"
) -> int:
    """24 trials of all kinds, reported, with tables."""
    study = make.study(objectives, name)
    make.tables(study)
    width = len(objectives)
    make.trial(study, 0, (1e-6, 269e6, 40.0, 2.0)[:width], baseline="unquantized", report=True)
    make.trial(study, 1, (0.005, 163e6, 26.0, 1.2)[:width], baseline="uniform-int8", report=True)
    make.trial(study, 2, (0.3, 114e6, 19.0, 0.9)[:width], baseline="uniform-int4", report=True)
    for number in range(3, 18):
        share = (number - 3) / 14
        loss = 0.2 * math.exp(-4 * share) * (1 + 0.3 * (number % 3 == 0))
        values = (loss, 112e6 + 40e6 * share, 19 + 6 * share, 1 + share)[:width]
        make.trial(study, number, values, predicted=loss * (0.9 + 0.02 * (number % 7)), report=number % 3 == 1)
    make.trial(study, 18, (0.05, 90e6, 15.0, 0.5)[:width], feasible=False)
    make.trial(study, 19, (0.4, 130e6, 22.0, 1.1)[:width], end="stopped", predicted=0.2)
    make.trial(study, 20, (), end="failed")
    make.store.record_duplicate(study, 21, assignment(5), 5)
    make.trial(study, 22, (), end="running")
    return study


def maximized(make: Maker) -> int:
    study = make.study((ACCURACY, SIZE), "maximized")
    make.trial(study, 0, (0.8, 100e6), baseline="unquantized")
    make.trial(study, 1, (0.4, 30e6), baseline="uniform-int4")
    for number in range(2, 9):
        make.trial(study, number, (0.45 + 0.04 * number, 30e6 + 6e6 * number), predicted=0.5 + 0.03 * number)
    return study


def single(make: Maker) -> int:
    study = make.study((KL,), "single")
    for number in range(6):
        make.trial(study, number, (0.5 / (number + 1),), baseline="uniform-int4" if number == 0 else None)
    return study


def evil(make: Maker) -> int:
    """Names that would be markup."""
    study = make.study((("<b>loss</b>", "<i>u</i>", "minimize"), SIZE), "evil")
    table = {
        f"model.layers.{block}.{EVIL}": {**layer_table()["lm_head"], "block": block, "tied": [EVIL]}
        for block in range(2)
    }
    make.store.put_table(study, "layers", {name: {**facts, "name": name} for name, facts in table.items()})
    for number in range(6):
        found = [
            Measurement("<b>loss</b>", 0.5 / (number + 1), "<i>u</i>", "measured", "search", 0.01),
            Measurement("size_bytes", 1e6 + number, "bytes", "computed", "search"),
        ]
        chosen = Assignment.from_dict({name: SCHEMES[(number + place) % 2] for place, name in enumerate(table)})
        origin = "baseline" if number < 2 else "sampler"
        trial = make.store.start_trial(study, number, chosen, origin, f"{EVIL}{number}" if number < 2 else None)
        make.store.finish_trial(trial.id, 1, found, {}, 1.0, EVIL)
    make.store.put_table(study, "sensitivity", {name: dict.fromkeys(SCHEMES[:2], 0.1) for name in table})
    return study


def infeasible(make: Maker) -> int:
    study = make.study(name="infeasible")
    make.tables(study)
    for number in range(4):
        make.trial(
            study, number, (0.1 + number, 1e8 + number), feasible=False, baseline="uniform-int4" if not number else None
        )
    return study


def failed(make: Maker) -> int:
    study = make.study(name="failed")
    for number in range(3):
        make.trial(study, number, (), end="failed")
    return study


def one(make: Maker) -> int:
    study = make.study(name="one")
    make.tables(study)
    make.trial(study, 0, (0.3, 1e8))
    return study


def zeros(make: Maker) -> int:
    """All losses are nothing, all sizes the same."""
    study = make.study(name="zeros")
    make.tables(study)
    for number in range(5):
        make.trial(study, number, (0.0, 1e8), baseline="unquantized" if not number else None, stderr=None)
    return study


def negative(make: Maker) -> int:
    study = make.study((("bleu", "points", "maximize"), SIZE), "negative")
    for number in range(5):
        make.trial(study, number, (-3.0 + number, 1e6 * (number + 1)))
    return study


def cached(make: Maker) -> int:
    """Quantized KV caches beside layers."""
    study = make.study((KL, PEAK), "cached")
    make.tables(study)
    caches = [f"model.layers.{block}.self_attn" for block in range(BLOCKS)]
    losses = {name: {"kv4": 0.001, "kv8": 0.00001, "keep": 0.0} for name in caches}
    make.store.put_table(study, "sensitivity", LOSSES | losses)
    for number in range(6):
        found = [
            Measurement(KL[0], 0.5 / (number + 1), KL[1], "measured", "search", 0.01),
            Measurement(PEAK[0], 1e8 * (number + 1), "bytes", "computed", "search"),
        ]
        entries = dict.fromkeys(caches[: number // 2 + 1], f"kv{8 if number % 2 else 4}")
        chosen = Assignment.from_dict(assignment(number).to_dict() | entries)
        trial = make.store.start_trial(study, number, chosen, "sampler")
        make.store.finish_trial(trial.id, 1, found, {}, 1.0, "w1")
    return study


STUDIES: dict[str, Callable[[Maker], int]] = {
    "empty": lambda make: make.study(name="empty"),
    "one": one,
    "infeasible": infeasible,
    "failed": failed,
    "ordinary": ordinary,
    "two objectives": lambda make: ordinary(make, (KL, SIZE), "two"),
    "four objectives": lambda make: ordinary(make, (KL, SIZE, DECODE, ENERGY), "four"),
    "one objective": single,
    "maximized": maximized,
    "negative": negative,
    "zeros": zeros,
    "names that are markup": evil,
    "caches": cached,
}


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Store, dict[str, int]]]:
    """All of `STUDIES` in one database, which nobody changes."""
    with Store.open(str(tmp_path_factory.mktemp("studies") / "autoq.db")) as store:
        yield store, {name: build(Maker(store)) for name, build in STUDIES.items()}


@pytest.fixture(params=list(STUDIES))
def view(request: pytest.FixtureRequest, database: tuple[Store, dict[str, int]]) -> View:
    """A view of each of them in turn."""
    store, ids = database
    return View(store, ids[request.param]).refresh()


@pytest.fixture
def views(database: tuple[Store, dict[str, int]]) -> Callable[[str], View]:
    """A view of the one that is named."""
    store, ids = database
    return lambda name: View(store, ids[name]).refresh()


@pytest.fixture
def maker(tmp_path: Path) -> Iterator[Maker]:
    """A database of its own."""
    with Store.open(str(tmp_path / "autoq.db")) as store:
        yield Maker(store)
