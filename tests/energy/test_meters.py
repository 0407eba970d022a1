"""Counters as machines show them: a powercap tree with recorded values, and a driver that answers as NVML does."""

from __future__ import annotations

import itertools
import os
import sys
import time
from types import ModuleType

import pytest

from autoq.energy import meters
from autoq.energy.meters import joules_per_token, measuring, probe_nvml, probe_rapl

TURN = 262143328850  # of a server's package


def zone(root, folder, name, energy, turn=TURN):
    path = root / folder
    path.mkdir(parents=True)
    (path / "name").write_text(f"{name}\n")
    (path / "max_energy_range_uj").write_text(f"{turn}\n")
    (path / "energy_uj").write_text(f"{energy}\n")
    return path / "energy_uj"


@pytest.fixture
def server(tmp_path):
    """Two packages with their parts, the memory of one, and what shows the same counters twice."""
    counters = {
        "package-0": zone(tmp_path, "intel-rapl:0", "package-0", 61_213_944_117),
        "core": zone(tmp_path, "intel-rapl:0:0", "core", 40_000_000_000),
        "dram": zone(tmp_path, "intel-rapl:0:1", "dram", 65_712_998_613, turn=65_712_999_613),
        "package-1": zone(tmp_path, "intel-rapl:1", "package-1", 262_143_328_000),
        "psys": zone(tmp_path, "intel-rapl:2", "psys", 9_000_000_000),
        "mmio": zone(tmp_path, "intel-rapl-mmio:0", "package-0", 61_213_944_117),
    }
    (tmp_path / "dtpm").mkdir()
    return tmp_path, counters


class TestRapl:
    def test_packages_and_memory_are_counted_once(self, server):
        root, _ = server
        assert probe_rapl(root).meter.name == "RAPL (package-0, dram, package-1)"

    def test_counters_are_microjoules_and_start_again_at_their_range(self, server):
        root, counters = server
        meter = probe_rapl(root).meter
        assert meter.read() == 0
        counters["package-0"].write_text("61214944117\n")  # 1 J
        assert meter.read() == pytest.approx(1.0)
        counters["package-1"].write_text("1999150\n")  # 850 µJ to the end and 1,999,150 µJ after it
        assert meter.read() == pytest.approx(3.0)
        counters["dram"].write_text("499000\n")  # its range is another: 1,000 µJ to the end
        counters["package-1"].write_text("2999150\n")
        assert meter.read() == pytest.approx(4.5)

    def test_parts_of_a_package_and_whole_platforms_are_left_out(self, server):
        root, counters = server
        meter = probe_rapl(root).meter
        for name in ("core", "psys", "mmio"):
            counters[name].write_text("99000000000\n")
        assert meter.read() == 0

    def test_a_stretch_of_time_is_metered(self, server):
        root, counters = server
        meter = probe_rapl(root).meter
        with measuring(meter) as reading:
            counters["package-0"].write_text("61223944117\n")
            time.sleep(0.01)
        assert reading.joules == pytest.approx(10.0)
        assert reading.seconds > 0.01
        assert reading.watts == pytest.approx(10.0 / reading.seconds)

    def test_a_machine_without_counters_says_so(self, tmp_path):
        for root in (tmp_path / "absent", tmp_path):
            probe = probe_rapl(root)
            assert probe.meter is None
            assert probe.problem.startswith(f"no counters under {root}")

    def test_counters_that_only_root_may_read_are_named(self, server, monkeypatch):
        root, counters = server
        counters["dram"].chmod(0)
        if os.geteuid() == 0:  # whom nothing is forbidden

            def forbidden(self):
                raise PermissionError(13, "Permission denied")

            monkeypatch.setattr(meters._Zone, "count", forbidden)
        problem = probe_rapl(root).problem
        assert "root only" in problem
        assert "energy_uj" in problem
        assert "\n" not in problem

    def test_a_damaged_counter_is_no_meter(self, server):
        root, counters = server
        counters["package-0"].write_text("not a number\n")
        assert "intel-rapl:0 cannot be read" in probe_rapl(root).problem


class Driver(ModuleType):
    """The functions of `pynvml` that are used, with recorded answers."""

    class NVMLError(Exception):
        pass

    def __init__(self, gpus=1, energy=None, power=None, starts=True):
        super().__init__("pynvml")
        self.gpus, self.energy, self.power, self.starts = gpus, energy, power, starts

    def nvmlInit(self):
        if not self.starts:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetCount(self):
        return self.gpus

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, handle):
        return "NVIDIA L4"

    def nvmlDeviceGetUUID(self, handle):
        return f"GPU-0000-{handle}"

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        if self.energy is None:
            raise self.NVMLError("Not Supported")
        return next(self.energy)

    def nvmlDeviceGetPowerUsage(self, handle):
        if self.power is None:
            raise self.NVMLError("Not Supported")
        return self.power


@pytest.fixture
def driver(monkeypatch):
    def install(**answers):
        made = Driver(**answers)
        monkeypatch.setitem(sys.modules, "pynvml", made)
        return made

    return install


class TestNvml:
    def test_energy_counts_in_millijoules(self, driver):
        driver(energy=iter([81_000_000, 81_002_500, 81_005_000]))
        (probe,) = probe_nvml()
        assert probe.name == "NVML 0 (NVIDIA L4)"
        assert probe.meter.uuid == "GPU-0000-0"
        with measuring(probe.meter) as reading:
            pass
        assert reading.joules == pytest.approx(2.5)

    def test_power_is_integrated_where_energy_is_not_counted(self, driver, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(meters.time, "perf_counter", lambda: now[0])
        answers = driver(power=40_000)
        (probe,) = probe_nvml()
        try:
            assert probe.meter.name.endswith("sampled power")
            with measuring(probe.meter) as reading:
                now[0] = 3.0
                until = time.monotonic() + 60
                while probe.meter._joules < 120 and time.monotonic() < until:  # its thread looks too
                    time.sleep(0.01)
                assert probe.meter._joules == pytest.approx(120)
                now[0] = 4.0
            assert (reading.seconds, reading.joules) == (4.0, pytest.approx(160))
            answers.power = None
            with pytest.raises(OSError, match="Not Supported"):
                probe.meter.read()
        finally:
            probe.meter.close()

    @pytest.mark.parametrize(
        ("answers", "problem"),
        [
            ({"starts": False}, "no NVIDIA driver answers: Driver Not Loaded"),
            ({"gpus": 0}, "the driver shows no GPU"),
            ({}, "tells neither energy nor power: Not Supported"),
        ],
    )
    def test_what_is_missing_is_said(self, driver, answers, problem):
        driver(**answers)
        (probe,) = probe_nvml()
        assert probe.meter is None
        assert probe.problem == problem

    def test_without_the_package_it_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "pynvml", None)
        (probe,) = probe_nvml()
        assert "pip install nvidia-ml-py" in probe.problem


class Ideal(meters.Meter):
    """A machine of 5 W that spends 2 J more on every step; time passes as it is told."""

    name = "ideal"

    def __init__(self, resolution_seconds=0.001):
        self.resolution_seconds = resolution_seconds
        self.now = self.spent = 0.0

    def read(self):
        return self.spent

    def wait(self, seconds):
        self.now += seconds
        self.spent += 5 * seconds


@pytest.fixture
def ideal(monkeypatch):
    def make(**options):
        meter = Ideal(**options)
        monkeypatch.setattr(meters.time, "perf_counter", lambda: meter.now)
        monkeypatch.setattr(meters.time, "sleep", meter.wait)
        return meter

    return make


def metered(meter, tokens=4, steps=16, most=100):
    counted = itertools.count()

    def prepare():
        meter.wait(3.0)
        meter.spent += 1e6  # a prompt, which nobody asked about
        return 0

    def step(state):
        next(counted)
        meter.wait(0.02)
        meter.spent += 2
        return state + 1

    return joules_per_token(meter, prepare, step, steps, most, tokens), next(counted)


def test_joules_per_token_are_those_of_the_steps_alone(ideal):
    found, steps = metered(ideal())
    assert found.joules == pytest.approx((2 + 5 * 0.02) / 4)
    assert found.stderr == pytest.approx(0, abs=1e-9)
    assert found.n == meters.REPEATS
    assert found.detail["meter"] == "ideal"
    assert found.detail["idle_watt"] == pytest.approx(5)
    assert found.detail["watt"] == pytest.approx(2.1 / 0.02)
    assert found.detail["tokens"] == 4 * (steps - 1)  # the first step warms up


def test_a_slow_counter_gets_longer_runs_within_the_limit(ideal):
    slow, _ = metered(ideal(resolution_seconds=0.1))
    assert slow.detail["seconds"] == pytest.approx(5 * 1.0, rel=0.03)  # ten times the resolution each
    short, steps = metered(ideal(resolution_seconds=0.1), most=16)
    assert short.detail["seconds"] == pytest.approx((steps - 1) * 0.02)
    assert (steps - 1) % 16 == 0


def test_what_was_only_queued_is_waited_for(ideal):
    meter = ideal()
    queue = []

    def step(state):
        queue.append(0.02)
        meter.wait(0.001)
        return state

    def finish():
        while queue:
            meter.wait(queue.pop())

    found = joules_per_token(meter, lambda: 0, step, 16, 16, 1, finish)
    assert found.joules == pytest.approx(5 * 0.021)
