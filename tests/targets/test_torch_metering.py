"""A model metered while it runs, by a meter that draws as much power as it is told."""

from __future__ import annotations

import contextlib
import time

import pytest

from autoq import evaluation, plugins
from autoq.device import fingerprint
from autoq.energy import meters
from autoq.search.controller import create_study, run_study
from autoq.spec import TargetSpec, build_spec
from autoq.store import Store
from autoq.targets import Target

WATTS = 10.0
ENERGY = "energy_joule_per_token"


class Steady(meters.Meter):
    """A machine that draws the same power whatever it does."""

    name = "steady"
    resolution_seconds = 0.001

    def read(self):
        return WATTS * time.perf_counter()


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(meters, "METERED_SECONDS", 0.05)
    monkeypatch.setattr(meters, "IDLE_SECONDS", 0.01)


@pytest.fixture
def target():
    return plugins.load("targets", "torch_cpu", Target)


@pytest.mark.parametrize(("family", "batch", "tokens_per_step"), [("llama", 3, 3), ("bert", 2, 2 * 16), ("t5", 2, 2)])
def test_power_times_time_divided_by_tokens(target, tiny, family, batch, tokens_per_step):
    workload = TargetSpec(batch_size=batch, prompt_tokens=16, threads=1)
    (found,) = target.meter(tiny(family), {}, workload, [Steady()])
    assert (found.objective, found.unit, found.kind, found.part) == (ENERGY, "J", "measured", "report")
    assert found.n == meters.REPEATS
    assert found.stderr >= 0
    assert found.device == fingerprint()
    assert found.detail["tokens"] % tokens_per_step == 0
    assert found.value == pytest.approx(WATTS * found.detail["seconds"] / found.detail["tokens"], rel=0.3)
    assert found.detail["watt"] == pytest.approx(WATTS, rel=0.1)
    assert found.detail["idle_watt"] == pytest.approx(WATTS, rel=0.1)
    assert found.detail["threads"] == 1


def test_without_a_meter_nothing_is_measured(target, tiny):
    assert target.meter(tiny("llama"), {}, TargetSpec(prompt_tokens=16, threads=1), []) == []


@pytest.mark.parametrize("metered", [True, False])
def test_a_study_estimates_energy_and_meters_it_for_the_report(metered, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))

    @contextlib.contextmanager
    def opened(part):
        assert part == "cpu"
        yield [Steady()] if metered else []

    monkeypatch.setattr(evaluation, "opened", opened)
    spec = build_spec(
        {
            "model": {"id": str(tiny_model_dir("llama"))},
            "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 64, "window_tokens": 32},
            "target": {"name": "torch-cpu", "prompt_tokens": 16, "threads": 1},
            "space": {"schemes": ["rtn-int4-g32", "keep"]},
            "objectives": ["kl_nats_per_token", ENERGY],
            "budget": {"trials": 5, "report_points": 2},
            "workers": {"cpus": 1},
        }
    )
    with Store.open(f"sqlite:///{tmp_path}/autoq.db") as store:
        study = create_study(store, spec)
        run_study(store, study.id)
        trials = store.trials(study.id, states=["complete"])
    for trial in trials:
        searched = trial.measurements[ENERGY, "search"]
        assert (searched.kind, searched.device) == ("computed", "7 nm logic, DDR memory")
    reported = [t.measurements[ENERGY, "report"] for t in trials if (ENERGY, "report") in t.measurements]
    assert bool(reported) == metered
    assert {m.kind for m in reported} <= {"measured"}
    kept = next(t for t in trials if t.baseline == "unquantized")
    assert ((ENERGY, "report") in kept.measurements) == metered
