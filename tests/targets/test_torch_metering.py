"""A model metered while it runs, by a meter that draws as much power as it is told."""

from __future__ import annotations

import contextlib

import pytest

from autoq import evaluation, plugins
from autoq.device import fingerprint
from autoq.energy import meters
from autoq.search.controller import create_study, run_study
from autoq.spec import TargetSpec, build_spec
from autoq.store import Store
from autoq.targets import Target
from autoq.targets._torch_cpu_timing import Session

WATTS, STEP = 10.0, 0.002
ENERGY = "energy_joule_per_token"


class Clock:
    """Time that passes while a model runs, by `STEP` seconds each time, and while somebody waits."""

    def __init__(self):
        self.now = 0.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds

    def slowed(self, run):
        def slow(*inputs):
            self.now += STEP
            return run(*inputs)

        return slow


class Steady(meters.Meter):
    """A machine that draws the same power whatever it does."""

    name = "steady"
    resolution_seconds = 0.001

    def read(self):
        return WATTS * meters.time.perf_counter()


@pytest.fixture(autouse=True)
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(meters, "time", clock)
    for name in ("prefill", "step"):
        monkeypatch.setattr(Session, name, clock.slowed(getattr(Session, name)))
    monkeypatch.setattr(meters, "METERED_SECONDS", 0.05)
    return clock


@pytest.fixture
def target():
    return plugins.load("targets", "torch_cpu", Target)


@pytest.mark.parametrize(("family", "batch", "tokens_per_step"), [("llama", 3, 3), ("bert", 2, 2 * 16), ("t5", 2, 2)])
def test_power_times_time_divided_by_tokens(target, tiny, family, batch, tokens_per_step):
    workload = TargetSpec(batch_size=batch, prompt_tokens=16, threads=1)
    (found,) = target.meter(tiny(family), {}, workload, [Steady()])
    assert (found.objective, found.unit, found.kind, found.part) == (ENERGY, "J", "measured", "report")
    assert found.n == meters.REPEATS
    assert found.stderr == pytest.approx(0, abs=1e-9)
    assert found.device == fingerprint()
    assert found.detail["tokens"] % tokens_per_step == 0
    assert found.value == pytest.approx(WATTS * STEP / tokens_per_step)
    assert found.detail["seconds"] == pytest.approx(STEP * found.detail["tokens"] / tokens_per_step)
    assert (found.detail["watt"], found.detail["idle_watt"]) == (pytest.approx(WATTS), pytest.approx(WATTS))
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
