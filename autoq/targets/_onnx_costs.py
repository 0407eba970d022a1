"""The latency table of a model on ONNX Runtime, from sessions on whole models that mix all kernels.

Kernels are dealt to layers like a Latin square: layers of one shape meet each of their kernels equally
often over the models, in mixed company. The runtime's own profile tells what each node took, in place;
nodes keep their names when the runtime fuses them, and a layer's names start with its module's. Each run
has a run of the unquantized session beside it, by which the machine's drift is taken out.

Time depends on the kernel, not on the method or on the numbers: schemes that share one are timed once.
8-bit weights that are multiplied out when the session starts run as the float kernel does.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoq.device import fingerprint
from autoq.layer import Layer
from autoq.methods import QuantizedWeight
from autoq.models.loaded import LoadedModel
from autoq.spec import TargetSpec
from autoq.targets import CostTable
from autoq.targets import _dealing as dealing
from autoq.targets import _onnx_graph as graphs
from autoq.targets import _onnx_session as sessions
from autoq.targets._onnx_rules import FLOAT, Kernel
from autoq.targets._onnx_skeleton import input_names
from autoq.targets._torch_cpu_timing import PREFILL, QUIET

_LEAST_ROUNDS = 4
_RUNS = 24  # over all models
_WARM = 2  # runs of a fresh session that are not counted
_OTHERS = ""  # no layer's name
_FUSED, _SUFFIX = "fused ", "_kernel_time"  # around a node's name in a profile


def _timed_as(layer: Layer, weight: QuantizedWeight) -> Kernel:
    """The kernel that runs once the session has started."""
    kernel = graphs.kernel_of(layer, weight)
    return FLOAT if kernel.name == "int8-unpacked" and layer.kind != "embedding" else kernel


def cost_table(model: LoadedModel, choices: Mapping[str, Sequence[QuantizedWeight]], workload: TargetSpec) -> CostTable:
    """Time every layer of `choices` under its schemes and as it is, and the unquantized model.

    Milliseconds. `base_ms` makes the prediction for
    the unquantized model its measurement.
    """
    threads = sessions.thread_count(workload.threads)
    feed = sessions.prompt(input_names(model), workload, model.info.vocab_size, model.info.max_positions)
    unquantized = sessions.open_session(graphs.assemble(model, {}), threads)
    steady = sessions.time_alone(unquantized, feed)
    kinds = dealing.kinds(model, choices, _timed_as, FLOAT)
    deals = dealing.deals(kinds)
    rounds = max(_LEAST_ROUNDS, math.ceil(_RUNS / len(deals)))
    kind_of = {layer.name: index for index, kind in enumerate(kinds) for layer in kind.layers}
    samples: dict[tuple[int, Kernel], list[float]] = {}
    others: list[float] = []
    for deal in deals:
        mixed = {name: weight for name, (_, weight) in deal.items() if weight is not None}
        spent, beside = _profiled(model, mixed, unquantized, feed, threads, rounds)
        drift = steady.quiet_ms / float(np.percentile(beside, QUIET))
        for name, (kernel, _) in deal.items():
            samples.setdefault((kind_of[name], kernel), []).extend(drift * ms for ms in spent[name])
        others.extend(drift * ms for ms in spent[_OTHERS])
    # Whatever else the machine does only adds time: to single nodes rarely, to most whole runs a little. So
    # parts are compared by their lower quartiles, and together scaled to what a whole run takes.
    lower = {key: float(np.percentile(values, QUIET)) for key, values in samples.items()}
    parts = sum(lower[index, FLOAT] for index in kind_of.values()) + float(np.percentile(others, QUIET))
    table = {key: ms * steady.quiet_ms / parts for key, ms in lower.items()}
    layer_ms = {
        name: {
            "keep": table[kind_of[name], FLOAT],
            **{str(w.scheme): table[kind_of[name], _timed_as(model.info.layer(name), w)] for w in weights},
        }
        for name, weights in choices.items()
    }
    detail = {
        "threads": threads,
        "models": len(deals),
        "rounds": rounds,
        "unquantized_ms": {PREFILL: steady.quiet_ms},
        "unquantized_stderr_ms": {PREFILL: steady.stderr_ms},
    }
    base_ms = {PREFILL: steady.quiet_ms - sum(table[index, FLOAT] for index in kind_of.values())}
    return CostTable(fingerprint(), base_ms, {PREFILL: layer_ms}, detail)


def _profiled(
    model: LoadedModel,
    weights: Mapping[str, QuantizedWeight],
    unquantized: Any,
    feed: sessions.Feed,
    threads: int,
    rounds: int,
) -> tuple[dict[str, list[float]], list[float]]:
    """Layer -> milliseconds that its nodes took in each run, all nodes of no layer as one; and the unquantized
    session's runs beside them."""
    with tempfile.TemporaryDirectory(prefix="autoq-onnx-") as folder:
        session = sessions.open_session(graphs.assemble(model, weights), threads, Path(folder) / "profile")
        beside = []
        for number in range(_WARM + rounds):
            sessions.run_once(session, feed)
            spent = sessions.run_once(unquantized, feed)
            if number >= _WARM:
                beside.append(spent)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    layer_of = {name: layer.name for layer in model.info.layers for name in (layer.name, *layer.tied)}
    runs: dict[str, list[int]] = {}
    for event in sorted((e for e in events if e.get("cat") == "Node"), key=lambda e: int(e["ts"])):
        if event["name"].endswith(_SUFFIX):
            runs.setdefault(event["name"].removesuffix(_SUFFIX), []).append(int(event["dur"]))
    found = {name: [0.0] * rounds for name in (_OTHERS, *(layer.name for layer in model.info.layers))}
    for node, microseconds in runs.items():
        module = node.removeprefix(_FUSED).partition("/")[0].partition("#")[0]
        assert len(microseconds) == _WARM + rounds, (node, len(microseconds))
        for run, spent_us in enumerate(microseconds[_WARM:]):
            found[layer_of.get(module, _OTHERS)][run] += spent_us / 1000
    return found, beside
