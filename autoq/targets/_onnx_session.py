"""ONNX Runtime sessions: opening, feeding and timing them, and writing and reading checkpoints.

Sessions run on `CPUExecutionProvider` alone. Their threads stop spinning when a run ends: two sessions
that are timed in turns would else take each other's cores. x86 processors without VNNI add products of 8 bits
by twos in 16 bits, which saturates; `session.x64quantprecision` makes them exact, and everything else slower,
so it is set there only.
"""

from __future__ import annotations

import contextlib
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor

from autoq import device
from autoq.assignment import Assignment
from autoq.errors import AutoQError, ExportBroken, KernelMismatch, SpecError
from autoq.layer import Layer
from autoq.measurement import Measurement
from autoq.methods import QuantizedWeight, Statistics
from autoq.models.loaded import LoadedModel
from autoq.spec import TargetSpec
from autoq.targets import Runtime
from autoq.targets import _onnx_graph as graphs
from autoq.targets._onnx_activations import rounding
from autoq.targets._onnx_forms import differences
from autoq.targets._onnx_skeleton import input_names
from autoq.targets._torch_cpu_timing import PREFILL, Samples, Turns

MODEL, DATA = "model.onnx", "model.onnx.data"
# A protobuf message ends at 2 GiB.
EXTERNAL_BYTES = 1_500_000_000
MIN_RUNS, MAX_RUNS = 5, 60
RUNS_SECONDS = 1.5  # runs go on beyond the least until they have taken this long
_EMBEDDED_BYTES = 1024  # smaller constants stay in the graph
_VNNI = {"avx_vnni", "avx512_vnni"}
_VOCABULARY, _POSITIONS = "vocabulary", "max_positions"

# ‖y - y'‖ / ‖y'‖. Sums in float32 differ by 1e-7, and by 1e-5 where they cancel; where inputs are quantized on
# the fly, one that lies between two levels may fall to either, measured at up to 4e-5. A wrong scale, zero point
# or order is above 1e-2, inputs in float32 where 8 bits are meant above 2e-3.
FLOAT_TOLERANCE, DYNAMIC_TOLERANCE = 1e-4, 1e-3
_CHECK_ROWS = 5

Feed = dict[str, "np.ndarray[Any, Any]"]


def thread_count(asked: int | None) -> int:
    """Threads of a session: as asked, or as many as this machine has cores."""
    return asked or device.threads()


def _options(threads: int, profile: Path | None) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what goes wrong is raised
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if platform.machine() in ("x86_64", "AMD64") and not _VNNI & set(device.instruction_sets()):
        options.add_session_config_entry("session.x64quantprecision", "1")
    if profile is not None:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    return options


def open_session(source: onnx.ModelProto | Path, threads: int, profile: Path | None = None) -> Any:
    """A session on a model in memory or in a file; `profile` is where its profile goes.

    Raises `AutoQError` with the runtime's reason for what it does not load.
    """
    with contextlib.ExitStack() as stack:
        model: str | bytes
        if isinstance(source, Path):
            model = str(source)
        elif _nbytes(source) > EXTERNAL_BYTES:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="autoq-onnx-")))
            model = str(folder / save(source, folder)[0])
        else:
            model = source.SerializeToString()
        try:
            return onnxruntime.InferenceSession(model, _options(threads, profile), providers=["CPUExecutionProvider"])
        except Exception as problem:  # the runtime's errors have no common class but this
            raise AutoQError(f"ONNX Runtime does not load the model: {' '.join(str(problem).split())[:500]}") from None


def _nbytes(proto: onnx.ModelProto) -> int:
    return sum(len(constant.raw_data) for constant in proto.graph.initializer)


# -- checkpoints --------------------------------------------------------------------------------------


def save(proto: onnx.ModelProto, folder: Path) -> list[str]:
    """Write a model into `folder`; the names of its files. Large constants go to a file beside the graph
    where one file cannot hold them, and then out of `proto`."""
    if _nbytes(proto) > EXTERNAL_BYTES:
        onnx.save_model(
            proto,
            folder / MODEL,
            save_as_external_data=True,
            all_tensors_to_one_file=True,
            location=DATA,
            size_threshold=_EMBEDDED_BYTES,
        )
        return [MODEL, DATA]
    (folder / MODEL).write_bytes(proto.SerializeToString(deterministic=True))
    return [MODEL]


def write(
    model: LoadedModel,
    weights: Mapping[str, QuantizedWeight],
    folder: Path,
    statistics: Callable[[str], Statistics],
) -> list[str]:
    """Write the checkpoint of `model` under `weights`, with its config and tokenizer; the model's files."""
    proto = graphs.assemble(model, weights, statistics)
    told = {_VOCABULARY: model.info.vocab_size, _POSITIONS: model.info.max_positions or 0}
    onnx.helper.set_model_props(proto, {key: str(value) for key, value in told.items()})
    files = save(proto, folder)
    config: Any = model.model.config
    config.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return files


class OnnxRuntime(Runtime):
    """A checkpoint in an ONNX Runtime session.

    Raises `ExportBroken` for a file that is missing or that the runtime refuses.
    """

    def __init__(self, folder: Path, threads: int | None = None) -> None:
        self._path = folder / MODEL
        if not self._path.is_file():
            raise ExportBroken(f"{MODEL} is missing")
        self._threads = thread_count(threads)
        self._session: Any = self._open(self._threads)
        self._names = [entry.name for entry in self._session.get_inputs()]

    def _open(self, threads: int) -> Any:
        try:
            return open_session(self._path, threads)
        except AutoQError as problem:
            raise ExportBroken(f"{MODEL}: {problem}") from None

    def differences(self, assignment: Assignment) -> list[str]:
        return differences(onnx.load(self._path, load_external_data=False), assignment)

    def outputs(self, tokens: Tensor) -> Tensor:
        found, *_ = self._session.run(None, feed_of(self._names, tokens.unsqueeze(0)))
        return torch.from_numpy(found[0])

    def time(self, workload: TargetSpec) -> list[Measurement]:
        threads = thread_count(workload.threads)
        session = self._session if threads == self._threads else self._open(threads)
        told = session.get_modelmeta().custom_metadata_map
        feed = prompt(self._names, workload, int(told[_VOCABULARY]), int(told[_POSITIONS]) or None)
        samples = time_alone(session, feed)
        return [
            Measurement(
                PREFILL,
                samples.quiet_ms,
                "ms",
                "measured",
                "report",
                stderr=samples.stderr_ms,
                n=len(samples.wall_ms),
                device=device.fingerprint(),
                detail={**workload_detail(workload, threads), **samples.spread()},
            )
        ]

    def close(self) -> None:
        self._session = None


# -- timing -------------------------------------------------------------------------------------------


def feed_of(names: list[str], ids: Tensor) -> Feed:
    """Inputs by name for token ids (batch, tokens): no padding, one segment."""
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    return {name: made[name].cpu().numpy() for name in names}


def prompt(names: list[str], workload: TargetSpec, vocabulary: int, max_positions: int | None) -> Feed:
    """The workload's prompt. Raises `SpecError` for one longer than the model's positions."""
    if max_positions is not None and workload.prompt_tokens > max_positions:
        raise SpecError(
            f"target.prompt_tokens: {workload.prompt_tokens} is too long for a model of {max_positions} positions"
        )
    generator = torch.Generator().manual_seed(0)
    return feed_of(names, torch.randint(vocabulary, (workload.batch_size, workload.prompt_tokens), generator=generator))


def workload_detail(workload: TargetSpec, threads: int) -> dict[str, Any]:
    """What a latency was measured on."""
    return {
        "threads": threads,
        "isa": " ".join(device.instruction_sets()),
        "batch_size": workload.batch_size,
        "prompt_tokens": workload.prompt_tokens,
    }


def run_once(session: Any, feed: Feed, samples: Samples | None = None) -> float:
    """One run, added to `samples`; milliseconds of wall time."""
    wall, cpu = time.perf_counter_ns(), time.process_time_ns()
    session.run(None, feed)
    spent = (time.perf_counter_ns() - wall) / 1e6
    if samples is not None:
        samples.wall_ms.append(spent)
        samples.cpu_ms.append((time.process_time_ns() - cpu) / 1e6)
    return spent


def time_alone(session: Any, feed: Feed, patience: int = 1) -> Samples:
    """Runs of one session after two that warm up. `patience` multiplies the time."""
    samples = Samples()
    for _ in range(2):
        run_once(session, feed)
    while _unfinished(samples, sum(samples.wall_ms), patience):
        run_once(session, feed, samples)
    return samples


def time_in_turns(candidate: Any, unquantized: Any, feed: Feed) -> Turns:
    """Runs of two sessions in turns, after two each that warm up: a machine's drift hits both."""
    turns = Turns({PREFILL: Samples()}, {PREFILL: Samples()}, {PREFILL: []})
    for session in (candidate, unquantized) * 2:
        run_once(session, feed)
    own, base = turns.candidate[PREFILL], turns.unquantized[PREFILL]
    while _unfinished(own, sum(own.wall_ms) + sum(base.wall_ms), 1):
        turns.ratios[PREFILL].append(run_once(candidate, feed, own) / run_once(unquantized, feed, base))
    return turns


def _unfinished(samples: Samples, spent_ms: float, patience: int) -> bool:
    count = len(samples.wall_ms)
    return count < MIN_RUNS or (spent_ms < 1000 * RUNS_SECONDS * patience and count < MAX_RUNS * patience)


def measure(model: LoadedModel, weights: Mapping[str, QuantizedWeight], workload: TargetSpec) -> list[Measurement]:
    """Prefill latency of `model` under `weights`, in turns with the unquantized model.

    One layer of each shape and scheme is checked first. Raises `KernelMismatch`, `SchemeRefused`,
    `ModelRefused` and `SpecError`.
    """
    threads = thread_count(workload.threads)
    feed = prompt(input_names(model), workload, model.info.vocab_size, model.info.max_positions)
    check_kernels(model, weights)
    unquantized = open_session(graphs.assemble(model, {}), threads)
    candidate = open_session(graphs.assemble(model, weights), threads)
    turns = time_in_turns(candidate, unquantized, feed)
    kernels = {
        str(weight.scheme): str(graphs.kernel_of(model.info.layer(name), weight))
        for name, weight in sorted(weights.items())
    }
    return turns.measurements({"kernels": kernels, **workload_detail(workload, threads)})


# -- checks -------------------------------------------------------------------------------------------


def check_kernels(model: LoadedModel, weights: Mapping[str, QuantizedWeight]) -> None:
    """Compare one layer of each shape and scheme with its dequantized weights (`KernelMismatch`)."""
    checked = set()
    for name, weight in weights.items():
        layer = model.info.layer(name)
        key = (layer.kind, layer.out_features, layer.in_features, weight.scheme)
        if key not in checked:
            checked.add(key)
            _check(layer, weight)


@torch.no_grad()
def _check(layer: Layer, weight: QuantizedWeight) -> None:
    generator = torch.Generator().manual_seed(0)
    dequantized = weight.dequantize(torch.float32)
    out = graphs.Writer()
    bounds = (-3.0, 3.0)
    writer = graphs.LayerWriter(out, layer, weight, bounds)
    if layer.kind == "embedding":
        x = torch.randint(layer.out_features, (2, _CHECK_ROWS), generator=generator)
        writer.look_up("x", 2, "y", layer.name)
        expected = F.embedding(x, dequantized)
    else:
        x = torch.randn(_CHECK_ROWS, layer.in_features, generator=generator)
        writer.multiply("x", None, "y", layer.name)
        seen = rounding(weight.scheme, bounds)
        expected = F.linear(x if seen is None else seen(x), dequantized)
    session = open_session(graphs.alone(out, x), 1)
    (found,) = session.run(None, {"x": x.numpy()})
    error = float((torch.from_numpy(found) - expected).norm() / expected.norm().clamp_min(1e-30))
    tolerance = DYNAMIC_TOLERANCE if getattr(weight.scheme, "activation", None) else FLOAT_TOLERANCE
    if not error <= tolerance:
        raise KernelMismatch(
            f"layer {layer.name} under {weight.scheme}: ONNX Runtime's {writer.kernel} is off by {error:.1e} from the "
            f"dequantized weights; at most {tolerance:.0e} can be rounding"
        )
