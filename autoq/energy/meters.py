"""Meters of this machine: RAPL counters of processors, NVML of NVIDIA GPUs.

RAPL is read through the kernel's powercap tree (Documentation/power/powercap/powercap.rst): a zone's
`energy_uj` counts microjoules up to `max_energy_range_uj` and then starts again. Counted are the zones
named `package-N` and, beside them, `dram`, which is no part of a package; `core` and `uncore` are parts
of one, `psys` holds everything once more, and `intel-rapl-mmio` shows the same counters a second time.
Since 2020 (CVE-2020-8694) only root may read them unless an administrator allows it.

NVML counts millijoules since the driver was loaded (`nvmlDeviceGetTotalEnergyConsumption`, Volta and
later); older GPUs tell only their power, which is sampled and integrated (trapezoid rule).

Everything that the processor or the GPU does is counted, whoever asked for it. So what a meter says is
worth something on an idle machine only, and the idle power is measured and kept beside the result.
"""

from __future__ import annotations

import abc
import importlib
import math
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

POWERCAP = Path("/sys/class/powercap")
SAMPLE_SECONDS = 0.02
IDLE_SECONDS = 0.5
METERED_SECONDS = 2.0
REPEATS = 5

Part = Literal["cpu", "gpu"]


class Meter(abc.ABC):
    """Reads joules. `resolution_seconds` is how often its counter moves at least."""

    name: str
    resolution_seconds: float
    uuid: str = ""  # of a GPU

    @abc.abstractmethod
    def read(self) -> float:
        """Joules since some fixed moment; never less than before. Raises `OSError` when it cannot be read.

        Must be called at least once per turn of the counter, which for RAPL is minutes at full power.
        """

    def close(self) -> None:  # noqa: B027 - most meters hold nothing
        """Free what the meter holds."""


@dataclass(frozen=True)
class Probe:
    """What looking for a meter found: the meter, or in one line why there is none."""

    name: str
    meter: Meter | None = None
    problem: str = ""


@dataclass
class Reading:
    """What a meter said over a stretch of time; filled in when the stretch ends."""

    joules: float = 0.0
    seconds: float = 0.0

    @property
    def watts(self) -> float:
        """Mean power."""
        return self.joules / self.seconds if self.seconds > 0 else 0.0


@contextmanager
def measuring(meter: Meter) -> Iterator[Reading]:
    """Meter the body: `with measuring(meter) as reading: …; reading.joules`."""
    reading = Reading()
    start, begin = time.perf_counter(), meter.read()
    yield reading
    end = meter.read()
    reading.seconds, reading.joules = time.perf_counter() - start, end - begin


# -- processors -----------------------------------------------------------------------------------


@dataclass
class _Zone:
    """One counter of the powercap tree, in microjoules."""

    name: str
    path: Path
    turn: int  # the count at which it starts again
    last: int = 0
    total: int = 0

    def count(self) -> int:
        return int(self.path.read_text(encoding="ascii"))

    def advance(self) -> int:
        """Microjoules since the zone was opened."""
        now = self.count()
        step = now - self.last
        self.total += step if step >= 0 else step + self.turn
        self.last = now
        return self.total


class RaplMeter(Meter):
    """All packages of this machine and their memory, where it has a counter."""

    resolution_seconds = 0.001

    def __init__(self, zones: list[_Zone]) -> None:
        assert zones
        self._zones = zones
        for zone in zones:
            zone.last = zone.count()
        self.name = f"RAPL ({', '.join(zone.name for zone in zones)})"

    def read(self) -> float:
        """Joules since the meter was opened, over all zones."""
        return sum(zone.advance() for zone in self._zones) / 1e6


def probe_rapl(root: Path = POWERCAP) -> Probe:
    """The processor's meter, or why there is none."""
    name = "RAPL"
    folders = sorted(root.glob("intel-rapl:*")) if root.is_dir() else []
    zones = []
    for folder in folders:
        try:
            label = (folder / "name").read_text(encoding="ascii").strip()
            if not (label.startswith("package") or label == "dram"):
                continue
            zone = _Zone(label, folder / "energy_uj", int((folder / "max_energy_range_uj").read_text(encoding="ascii")))
            zone.count()
        except PermissionError:
            return Probe(name, problem=f"{folder}/energy_uj may be read by root only; run as root or allow reading it")
        except (OSError, ValueError) as problem:
            return Probe(name, problem=f"{folder} cannot be read: {' '.join(str(problem).split())}")
        zones.append(zone)
    if not zones:
        return Probe(name, problem=f"no counters under {root}; the processor or this virtual machine shows none")
    return Probe(name, RaplMeter(zones))


# -- NVIDIA GPUs ----------------------------------------------------------------------------------


class NvmlCounter(Meter):
    """A GPU that counts its energy."""

    resolution_seconds = 0.1

    def __init__(self, nvml: Any, handle: Any, name: str) -> None:
        self._nvml, self._handle, self.name = nvml, handle, name
        self.uuid = str(nvml.nvmlDeviceGetUUID(handle))
        self.read()

    def read(self) -> float:
        """Joules since the driver was loaded."""
        try:
            return float(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._nvml.NVMLError as problem:
            raise OSError(f"{self.name}: {problem}") from problem


class NvmlSampler(Meter):
    """A GPU that tells only its power: a thread samples it and integrates."""

    resolution_seconds = 0.1

    def __init__(self, nvml: Any, handle: Any, name: str) -> None:
        self._nvml, self._handle, self.name = nvml, handle, f"{name}, sampled power"
        self.uuid = str(nvml.nvmlDeviceGetUUID(handle))
        self._joules, self._lock = 0.0, threading.Lock()
        self._problem: str | None = None
        self._then, self._watts = time.perf_counter(), self._power()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autoq-power", daemon=True)
        self._thread.start()

    def _power(self) -> float:
        return float(self._nvml.nvmlDeviceGetPowerUsage(self._handle)) / 1e3

    def _sample(self) -> None:
        with self._lock:
            watts, now = self._power(), time.perf_counter()
            self._joules += (watts + self._watts) / 2 * (now - self._then)
            self._then, self._watts = now, watts

    def _run(self) -> None:
        while not self._stop.wait(SAMPLE_SECONDS):
            try:
                self._sample()
            except self._nvml.NVMLError as problem:
                self._problem = str(problem)
                return

    def read(self) -> float:
        """Joules since the meter was opened."""
        try:
            self._sample()
        except self._nvml.NVMLError as problem:
            self._problem = str(problem)
        if self._problem is not None:
            raise OSError(f"{self.name}: {self._problem}")
        return self._joules

    def close(self) -> None:
        """End the sampling thread."""
        self._stop.set()
        self._thread.join()


def probe_nvml() -> list[Probe]:
    """The meters of the NVIDIA GPUs here, or one probe that says why there are none."""
    try:
        nvml: Any = importlib.import_module("pynvml")
    except ModuleNotFoundError:
        return [Probe("NVML", problem="not installed; for NVIDIA GPUs: pip install nvidia-ml-py")]
    try:
        nvml.nvmlInit()
        return [_probe_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())] or [
            Probe("NVML", problem="the driver shows no GPU")
        ]
    except nvml.NVMLError as problem:
        return [Probe("NVML", problem=f"no NVIDIA driver answers: {problem}")]


def _probe_gpu(nvml: Any, index: int) -> Probe:
    handle = nvml.nvmlDeviceGetHandleByIndex(index)
    name = f"NVML {index} ({nvml.nvmlDeviceGetName(handle)})"
    try:
        return Probe(name, NvmlCounter(nvml, handle, name))
    except OSError:
        pass  # before Volta: power alone
    try:
        return Probe(name, NvmlSampler(nvml, handle, name))
    except nvml.NVMLError as problem:
        return Probe(name, problem=f"tells neither energy nor power: {problem}")


# -- this machine ---------------------------------------------------------------------------------


def probes() -> list[Probe]:
    """Every meter that was looked for, found or not. Close what you do not use."""
    return [probe_rapl(), *probe_nvml()]


@contextmanager
def opened(part: Part) -> Iterator[list[Meter]]:
    """The readable meters of this machine's processors or of its GPUs; closed afterwards."""
    found = [probe_rapl()] if part == "cpu" else probe_nvml()
    meters = [probe.meter for probe in found if probe.meter is not None]
    try:
        yield meters
    finally:
        for meter in meters:
            meter.close()


@dataclass(frozen=True)
class Metered:
    """Joules per token with its standard error over `n` stretches, and what else the meter said."""

    joules: float
    stderr: float
    n: int
    detail: dict[str, Any] = field(default_factory=dict)


def joules_per_token(
    meter: Meter,
    prepare: Callable[[], Any],
    step: Callable[[Any], Any],
    steps: int,
    most: int,
    tokens: int,
    finish: Callable[[], None] = lambda: None,
) -> Metered:
    """Meter `step`, which takes a state one step of `tokens` tokens further, after the idle power.

    `prepare` makes a state (a prompt in its cache) and is not metered. From one state go `steps` steps; more
    where they are over before the meter's counter has moved ten times, but at most `most`. `finish` waits for
    what was only queued. The result is the mean over `REPEATS` stretches of such runs. Idle power is part of
    it, as it is of the bill, and stands in the detail. Raises `OSError` when the meter fails.
    """
    assert 0 < steps <= most, (steps, most)
    step(prepare())  # what is done once only is not metered
    finish()
    with measuring(meter) as idle:
        time.sleep(max(IDLE_SECONDS, 10 * meter.resolution_seconds))
    values = []
    whole, counted = Reading(), 0
    for _ in range(REPEATS):
        stretch, done = Reading(), 0
        while stretch.seconds < METERED_SECONDS / REPEATS:
            state = prepare()
            finish()
            with measuring(meter) as reading:
                done += _go_on(step, state, steps, most, 10 * meter.resolution_seconds)
                finish()
            stretch.joules += reading.joules
            stretch.seconds += reading.seconds
        values.append(stretch.joules / (done * tokens))
        whole.joules += stretch.joules
        whole.seconds += stretch.seconds
        counted += done * tokens
    detail = {
        "meter": meter.name,
        "idle_watt": round(idle.watts, 3),
        "watt": round(whole.watts, 3),
        "seconds": round(whole.seconds, 3),
        "tokens": counted,
    }
    stderr = statistics.stdev(values) / math.sqrt(len(values))
    return Metered(statistics.fmean(values), stderr, len(values), detail)


def _go_on(step: Callable[[Any], Any], state: Any, steps: int, most: int, seconds: float) -> int:
    """Run steps from `state`: `steps` of them, and up to `most` until `seconds` have passed. How many it was."""
    start = time.perf_counter()
    done = 0
    while done < steps or (done < most and time.perf_counter() - start < seconds):
        state = step(state)
        done += 1
    return done
