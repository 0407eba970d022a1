"""Workers that exist in virtual time only: a discrete-event executor, and an evaluator that makes believable results.

The controller, the sampler and the store are the real ones; what is simulated is what costs machines. Time is a
number: a job that a worker begins at t ends at t + its duration, and nothing waits. What the controller does between
two calls of the executor takes as long as it took by `clock`, times `charge`: so a controller that cannot keep up
leaves workers idle in virtual time as it would in a cluster. With `charge=0` it costs nothing, and a run depends on its
seeds alone.

Durations come from a study that really ran (`Recording`): a trial takes

    seconds = (per_pass · passes + per_slopes · [slopes]) · ratio

passes being the share of the search tokens that it evaluates (less where it is given up) and `ratio` drawn from what
that leaves over. Losses are the study's own table of sensitivities, times factors per layer that the sampler
does not know, to a power, and values per token are spread around their mean as losses of language models are.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
import json
import math
import random
import statistics
import struct
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from autoq.assignment import Assignment
from autoq.measurement import Measurement
from autoq.scheme import Keep
from autoq.search.executors import Executor, Failure, Job, Result, TimeLimit, WorkerView
from autoq.spec import StudySpec
from autoq.statistics import Rival, mean_and_stderr, shards
from autoq.store import Store
from autoq.targets import CostTable

QUALITY = "kl_nats_per_token"
DEVICE = "simulated"


@dataclass(frozen=True)
class Recording:
    """What a study that ran tells of durations in seconds: see the module."""

    per_pass: float
    per_slopes: float
    ratios: tuple[float, ...]

    @classmethod
    def of(cls, store: Store, study: str | int) -> Recording:
        """From the trials of a study. Raises `ValueError` where it has too few."""
        record = store.study(study)
        rows = []
        for trial in store.trials(record.id, states=["complete", "stopped"]):
            measured = trial.measurements.get((QUALITY, "search"))
            proposed = trial.origin in ("baseline", "seed", "sampler")
            if proposed and measured and trial.seconds and "forward_passes" in measured.detail:
                slopes = "slopes" in trial.sampler_attrs
                rows.append((float(measured.detail["forward_passes"]), slopes, trial.seconds))
        return cls.fit(rows)

    @classmethod
    def fit(cls, rows: Sequence[tuple[float, bool, float]]) -> Recording:
        """Of (passes, slopes or not, seconds); medians, as a machine that others use has outliers.

        Raises `ValueError` for fewer than eight rows without slopes.
        """
        plain = [seconds / passes for passes, slopes, seconds in rows if not slopes]
        if len(plain) < 8:
            raise ValueError(f"{len(plain)} trials without slopes have durations; 8 are needed")
        per_pass = statistics.median(plain)
        extra = [seconds - per_pass * passes for passes, slopes, seconds in rows if slopes]
        per_slopes = max(0.0, statistics.median(extra)) if extra else 2 * per_pass
        ratios = sorted(s / (per_pass * passes + per_slopes * slopes) for passes, slopes, s in rows)
        return cls(per_pass, per_slopes, tuple(ratios))

    def scaled(self, factor: float) -> Recording:
        """The same for a model of `factor` times the work."""
        return dataclasses.replace(self, per_pass=self.per_pass * factor, per_slopes=self.per_slopes * factor)

    def seconds(self, passes: float, slopes: bool, draw: random.Random) -> float:
        """How long a trial takes."""
        return (self.per_pass * passes + self.per_slopes * slopes) * draw.choice(self.ratios)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recording:
        return cls(**{**data, "ratios": tuple(data["ratios"])})


@dataclass(frozen=True)
class Faults:
    """Shares of trials whose worker dies on the way, or hangs until its limit; what a new worker takes to load."""

    crashes: float = 0.0
    hangs: float = 0.0
    load_seconds: float = 0.0


class SimulatedEvaluator:
    """Answers an evaluator's jobs at once. `seed` decides the losses."""

    def __init__(self, spec: StudySpec, recording: Recording, seed: int = 0) -> None:
        self.spec, self.recording, self.seed = spec, recording, seed
        self.window = min(spec.data.window_tokens, spec.data.search_tokens)
        self.windows = spec.data.search_tokens // self.window
        self.passes = 0.0
        self._weights: dict[str, float] = {}
        self._bits: dict[str, float] = {}
        self._losses: dict[tuple[str, str], float] = {}
        self._hardness = np.random.default_rng(seed).lognormal(0.0, 1.5, (self.windows, self.window))
        self._hardness /= self._hardness.mean()

    def describe(self) -> dict[str, Any]:
        return {
            "device": DEVICE, "threads": 1, "search_tokens": self.windows * self.window, "window_tokens": self.window,
            "report_tokens": self.spec.data.report_tokens, "calibration_tokens": self.spec.data.calibration_tokens,
        }  # fmt: skip

    def calibrate(self) -> str:
        return f"/simulated-{self.seed}.safetensors"

    def sensitivities(self, choices: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
        return {name: {text: self.predicted(name, text) for text in texts} for name, texts in choices.items()}

    def cost_table(self, choices: Mapping[str, Sequence[str]]) -> CostTable:
        times = {n: {t: 0.002 * (2 + self.bits(t)) for t in texts} for n, texts in choices.items()}
        phases = [name for name in self.spec.measured if name.startswith("latency")]
        return CostTable(DEVICE, dict.fromkeys(phases, 4.0), dict.fromkeys(phases, times))

    def bits(self, text: str) -> float:
        """Bits that a scheme's text tells, 16 of what is kept."""
        if text not in self._bits:
            digits = "".join(itertools.takewhile(str.isdigit, text.partition("int")[2]))
            self._bits[text] = 16.0 if text == "keep" else float(digits or 4)
        return self._bits[text]

    def predicted(self, name: str, text: str) -> float:
        """What the sampler is told that a layer loses."""
        if text == "keep":
            return 0.0
        spread = 0.8 + 0.4 * _unit(f"{self.seed}-{text}")
        return self._weight(name) * 4.0 ** (4.0 - self.bits(text)) * spread

    def _weight(self, name: str) -> float:
        if name not in self._weights:
            draw = random.Random(f"{self.seed}-{name}")
            self._weights[name] = draw.lognormvariate(-6.6, 0.9) * (3 if "v_proj" in name or "down" in name else 1)
        return self._weights[name]

    def loss(self, assignment: Assignment) -> float:
        """What all layers lose together: each a factor off its prediction, and a little more than their sum."""
        total = 0.0
        for name, scheme in assignment.items():
            if not isinstance(scheme, Keep):
                total += self._own(name, assignment.text(name))
        return float(total**1.1 + 1e-6)

    def _own(self, name: str, text: str) -> float:
        if (name, text) not in self._losses:
            factor = 0.6 + 0.8 * _unit(f"{self.seed}-own-{name}")
            self._losses[name, text] = self.predicted(name, text) * factor
        return self._losses[name, text]

    def measure(self, assignment: Assignment, part: Any, rival: Rival | None = None) -> list[Measurement]:
        digest = int(assignment.hash[:12], 16)
        noise = np.random.default_rng(digest).lognormal(-0.045, 0.3, self._hardness.shape)
        whole = self.loss(assignment) * self._hardness * noise
        values, steps = np.full(whole.shape, np.nan), shards(*whole.shape)
        detail: dict[str, Any] = {}
        for shard in steps:
            values[shard.start : shard.stop] = whole[shard.start : shard.stop]
            looked = rival is not None and shard.stop < len(whole)
            if looked and rival is not None and rival.beats(QUALITY, values, 1.0, len(steps) - 1):
                detail = {"of": whole.size, "rival": rival.number, "estimate": rival.expected(QUALITY, values)}
                break
        self.passes = float(np.isfinite(values).mean())
        mean, stderr, n = mean_and_stderr(values)
        said = {"threads": 1, "dtype": self.spec.model.dtype, "forward_passes": self.passes, **detail}
        found = Measurement(QUALITY, mean, "nats/token", "measured", part, stderr, n, DEVICE, said)
        return [dataclasses.replace(found, per_token=values.astype(np.float32))]

    def measure_with_slopes(
        self, assignment: Assignment, part: Any, choices: Mapping[str, Sequence[str]], turn: int = 0
    ) -> tuple[list[Measurement], dict[str, Any]]:
        measured = self.measure(assignment, part)
        table = {}
        for name, texts in choices.items():
            here = self.predicted(name, assignment.text(name))
            table[name] = [2 * math.sqrt(here * self.predicted(name, text)) for text in texts]
        return measured, {"loss": measured[0].value, "table": table}

    def time(self, assignment: Assignment) -> list[Measurement]:
        return []


def _unit(text: str) -> float:
    """A number from 0 to 1 that the text decides."""
    return zlib.crc32(text.encode()) / 2**32


@dataclass(frozen=True)
class Stay:
    """One job on one worker, in virtual seconds; `waited` is how long the worker had been idle before, and `counts`
    whether it came to a result: neither did its worker die nor was it ended at its limit."""

    key: str
    attempt: int
    worker: int
    start: float
    end: float
    waited: float
    counts: bool


@dataclass
class Tally:
    """What the executor saw. `controller` are the real seconds that its caller took between calls, by the executor's
    clock, and `processor` the CPU time of its thread."""

    stays: list[Stay] = field(default_factory=list)
    loads: list[tuple[float, float]] = field(default_factory=list)  # of workers that take the place of lost ones
    results: int = 0
    crashes: int = 0
    hangs: int = 0
    controller: float = 0.0
    processor: float = 0.0

    def busy(self, workers: int, start: float, end: float) -> float:
        """The share of `workers` that ran a job between two moments, whatever came of it."""
        return _share(((stay.start, stay.end) for stay in self.stays), workers, start, end)

    def useful(self, workers: int, start: float, end: float) -> float:
        """The share that ran a job whose result counts."""
        return _share(((stay.start, stay.end) for stay in self.stays if stay.counts), workers, start, end)

    def loading(self, workers: int, start: float, end: float) -> float:
        """The share that loaded, in the place of one that was lost; the rest of those that are not busy is idle."""
        return _share(self.loads, workers, start, end)


def _share(spans: Iterable[tuple[float, float]], workers: int, start: float, end: float) -> float:
    covered = sum(max(0.0, min(b, end) - max(a, start)) for a, b in spans)
    return covered / (workers * (end - start))


class SimulatedExecutor(Executor):
    """`count` workers in virtual time; see the module. `tally` is what they did."""

    def __init__(
        self,
        spec: StudySpec,
        evaluator: SimulatedEvaluator,
        faults: Faults = Faults(),
        charge: float = 1.0,
        seed: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.real = clock
        self.evaluator, self.faults, self.charge, self.seed = evaluator, faults, charge, seed
        self.count = spec.workers.count
        self.now = 0.0
        self.tally = Tally()
        self._queue: deque[Job] = deque()
        self._idle: list[tuple[float, int]] = [(0.0, worker) for worker in range(self.count)]
        self._events: list[tuple[float, int, int, Result | None]] = []
        self._numbers = itertools.count()
        self._running: dict[int, str] = {}
        self._leave()

    def submit(self, job: Job) -> None:
        self._enter()
        self._queue.append(job)
        self._start()
        self._leave()

    def clock(self) -> float:
        """Virtual seconds."""
        return self.now

    def next(self, timeout: float | None = None) -> Result | None:
        """The result that ends next; time goes on to it, or by `timeout`."""
        self._enter()
        result, until = None, math.inf if timeout is None else self.now + timeout
        while result is None and self._events and (self._queue or self._running):
            if self._events[0][0] > until:
                self.now = max(self.now, until)
                break
            end, _, worker, result = heapq.heappop(self._events)
            self.now = max(self.now, end)
            if result is not None:
                self._running.pop(worker)
            if result is None or result.failure is None or not self._died(result.failure):
                heapq.heappush(self._idle, (end, worker))  # of a worker that died, its successor when it has loaded
            self._start()
        self.tally.results += result is not None
        self._leave()
        return result

    def ready(self) -> Result | None:
        """What `next` has without waiting."""
        return self.next(0)

    def workers(self) -> list[WorkerView]:
        running = dict(self._running)
        return [
            WorkerView(f"simulated:{i}", "busy" if i in running else "idle", running.get(i)) for i in range(self.count)
        ]

    def close(self) -> None:
        self._queue.clear()

    def _enter(self) -> None:
        spent = self.real() - self._left
        self.tally.controller += spent
        self.tally.processor += time.thread_time() - self._left_processor
        self.now += spent * self.charge

    def _leave(self) -> None:
        self._left, self._left_processor = self.real(), time.thread_time()

    @staticmethod
    def _died(failure: Failure) -> bool:
        return failure.crashed or failure.error == "TimeLimit"

    def _start(self) -> None:
        while self._queue and self._idle:
            if self._queue[0].exclusive and self._running:
                return
            free, worker = heapq.heappop(self._idle)
            job = self._queue.popleft()
            draw = random.Random(f"{self.seed}-{job.key}-{job.attempt}")
            result, seconds = self._run(job, draw)
            self._running[worker] = job.key
            end = self.now + seconds
            counts = result.failure is None
            self.tally.stays.append(Stay(job.key, job.attempt, worker, self.now, end, self.now - free, counts))
            heapq.heappush(self._events, (end, next(self._numbers), worker, result))
            if result.failure is not None and self._died(result.failure):
                loaded = end + self.faults.load_seconds
                self.tally.loads.append((end, loaded))
                heapq.heappush(self._events, (loaded, next(self._numbers), worker, None))

    def _run(self, job: Job, draw: random.Random) -> tuple[Result, float]:
        value = getattr(self.evaluator, job.action)(**job.arguments)
        if not job.key.startswith("trial-"):
            return Result(job, value, None, 0.0, "simulated"), 0.0
        slopes = job.action == "measure_with_slopes"
        seconds = self.evaluator.recording.seconds(self.evaluator.passes, slopes, draw)
        name = f"simulated:{draw.randrange(self.count)}"
        chance, failure = draw.random(), None
        if chance < self.faults.crashes:
            self.tally.crashes += 1
            seconds *= draw.random()
            failure = Failure("WorkerLost", "the simulated worker died", crashed=True)
        elif job.limit_seconds is not None and (
            chance < self.faults.crashes + self.faults.hangs or seconds > job.limit_seconds
        ):
            self.tally.hangs += 1
            seconds = job.limit_seconds
            failure = Failure.of(TimeLimit.of(job))
        return Result(job, value if failure is None else None, failure, seconds, name), seconds


def write_skeleton(config: Any, folder: Path) -> Path:
    """A checkpoint of the config's shapes, bfloat16, whose weights are a hole in the file: enough for a search."""
    import torch
    import transformers

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    header: dict[str, Any] = {}
    place = 0
    tied = set(getattr(model, "_tied_weights_keys", None) or ()) if config.tie_word_embeddings else set()
    for name, tensor in model.state_dict().items():
        if name in tied:
            continue
        size = tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
    return folder


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which a share of them lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else math.nan


def median(values: Sequence[float]) -> float:
    """The middle value, NaN of none."""
    return statistics.median(values) if values else math.nan
