"""Timing a model's GGUF files in llama.cpp: a candidate in turns with the unquantized model.

A round is one prefill of the prompt into an empty cache, then some decode steps of one token for each
sequence, all timed inside the helper process around llama.cpp's own decode call. The unquantized model
stays loaded as long as the process keeps the model: it is timed beside every candidate.
"""

from __future__ import annotations

import tempfile
import time
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np

from autoq import device
from autoq.errors import SpecError
from autoq.methods import QuantizedWeight
from autoq.models.loaded import LoadedModel
from autoq.spec import TargetSpec
from autoq.targets._llama_cpp_engine import Engine, Round
from autoq.targets._llama_cpp_files import TimingFiles
from autoq.targets._torch_cpu_timing import (
    BASE_STEPS,
    DECODE,
    MAX_ROUNDS,
    MIN_ROUNDS,
    PREFILL,
    QUIET,
    ROUNDS_SECONDS,
    STEPS,
    Samples,
    Turns,
)

PHASES = (PREFILL, DECODE)
_WARM_TOKENS = 32  # enough to touch every weight


class Bench:
    """One model on one workload: its unquantized file in llama.cpp, and quick files of candidates.

    Raises `SpecError` for a prompt longer than the model's positions, `ModelRefused` for a model that GGUF
    cannot hold and `AutoQError` for what llama.cpp cannot load.
    """

    def __init__(self, model: LoadedModel, workload: TargetSpec) -> None:
        info = model.info
        check_positions(info.max_positions, workload)
        self.threads = workload.threads or device.threads()
        self.prompt = prompt(info.vocab_size, workload)
        self._folder = tempfile.TemporaryDirectory(prefix="autoq-llama-cpp-")
        self._made = 0
        try:
            self._files = TimingFiles(model, Path(self._folder.name, "unquantized.gguf"))
            self.unquantized = self._engine(self._files.path)
            _delete(self._files.path)
        except BaseException:
            self._folder.cleanup()
            raise

    def _engine(self, path: Path) -> Engine:
        batch, tokens = self.prompt.shape
        engine = Engine(path, self.threads, tokens + STEPS + 1, batch)
        # Pages are mapped and buffers made at the first run.
        engine.round(self.prompt[:, :_WARM_TOKENS], 2)
        return engine

    @contextmanager
    def candidate(self, weights: Mapping[str, QuantizedWeight]) -> Iterator[Engine]:
        """The model with `weights` in llama.cpp, warm."""
        self._made += 1
        path = Path(self._folder.name, f"{self._made}.gguf")
        self._files.write(weights, path)
        try:
            with self._engine(path) as engine:
                _delete(path)
                yield engine
        finally:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """End the unquantized model's process and delete its file. Can be called again."""
        self.unquantized.close()
        self._files.close()
        self._folder.cleanup()


def _delete(path: Path) -> None:
    """Delete a file that is open, where the system can: a process that is killed then leaves none behind."""
    with suppress(OSError):
        path.unlink()


_benches: weakref.WeakKeyDictionary[LoadedModel, tuple[tuple[int | None, ...], Bench]] = weakref.WeakKeyDictionary()


def bench_for(model: LoadedModel, workload: TargetSpec) -> Bench:
    """The model's bench, made when first asked for and kept until the model goes or the workload changes.

    Whatever was swapped into `model` is taken out first. Raises as `Bench` does.
    """
    key = (workload.batch_size, workload.prompt_tokens, workload.threads)
    known, bench = _benches.get(model, (None, None))
    if bench is not None and known == key and not bench.unquantized.closed:
        return bench
    if bench is not None:
        bench.close()
    model.restore()
    bench = Bench(model, workload)
    _benches[model] = key, bench
    weakref.finalize(model, bench.close)
    return bench


def check_positions(most: int | None, workload: TargetSpec) -> None:
    """Raise `SpecError` where the workload needs more than the `most` positions that a model has."""
    if most is not None and workload.prompt_tokens + STEPS + 1 > most:
        raise SpecError(
            f"target.prompt_tokens: {workload.prompt_tokens} is too long for a model of {most} positions; "
            f"at most {max(1, most - STEPS - 1)}"
        )


def prompt(vocabulary: int, workload: TargetSpec) -> np.ndarray:
    """Token ids (batch, prompt) int32, the same ones whenever asked."""
    shape = (workload.batch_size, workload.prompt_tokens)
    return np.random.default_rng(0).integers(0, vocabulary, shape, dtype=np.int32)


def add(samples: Mapping[str, Samples], taken: Round) -> dict[str, float]:
    """Add a round to phase -> samples; gives back the round's own lower quartiles in milliseconds."""
    for phase, runs in ((PREFILL, (taken.prefill,)), (DECODE, taken.steps)):
        samples[phase].wall_ms += [wall / 1e6 for wall, _ in runs]
        samples[phase].cpu_ms += [cpu / 1e6 for _, cpu in runs]
    return {
        PREFILL: taken.prefill[0] / 1e6,
        DECODE: float(np.percentile([wall for wall, _ in taken.steps], QUIET)) / 1e6,
    }


def no_samples() -> dict[str, Samples]:
    """Phase -> no samples yet."""
    return {phase: Samples() for phase in PHASES}


def time_in_turns(bench: Bench, engine: Engine, patience: int = 1) -> Turns:
    """Time a warm candidate and the unquantized model round by round in turns. `patience` multiplies the time."""
    turns = Turns(no_samples(), no_samples(), {phase: [] for phase in PHASES})
    start = time.perf_counter()
    for number in range(MAX_ROUNDS * patience):
        if number >= MIN_ROUNDS * patience and time.perf_counter() - start > ROUNDS_SECONDS * patience:
            break
        own = add(turns.candidate, engine.round(bench.prompt, STEPS))
        base = add(turns.unquantized, bench.unquantized.round(bench.prompt, BASE_STEPS))
        for phase in PHASES:
            turns.ratios[phase].append(own[phase] / base[phase])
    return turns
