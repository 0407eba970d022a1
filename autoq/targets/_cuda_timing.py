"""Timing on a CUDA device: events on the stream, cold caches for single layers, whole models in turns.

A kernel is timed between two events, so what the host does meanwhile counts only where the device waits
for it. A layer timed again and again would find its weights in the L2 cache; so before every run a
buffer of twice its size is overwritten. Whole models read all their weights and need no such thing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoq.layer import Layer
from autoq.methods import QuantizedWeight
from autoq.models.loaded import LoadedModel
from autoq.spec import TargetSpec
from autoq.targets import UNQUANTIZED, CostTable
from autoq.targets._cuda_kernels import packed_module
from autoq.targets._cuda_rules import kernel_for
from autoq.targets._torch_cpu_assembly import Forward, installed
from autoq.targets._torch_cpu_timing import DECODE, PREFILL, STEPS, Samples, Session

ROUNDS = 5
LAYER_RUNS = 30


def device_name(device: torch.device) -> str:
    """The GPU's name, capability and driver-visible memory, as it stands beside what was measured on it."""
    properties = torch.cuda.get_device_properties(device)
    memory = properties.total_memory / 2**30
    return f"{properties.name}, compute capability {properties.major}.{properties.minor}, {memory:.0f} GiB"


def event_ms(run: Callable[[], Any]) -> tuple[float, Any]:
    """Milliseconds between an event before and one after `run` on the current stream, and what it gave."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    result = run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end), result


@torch.no_grad()
def rounds_in_turns(session: Session, forwards: Sequence[tuple[nn.Module, Forward]]) -> list[dict[str, list[float]]]:
    """Milliseconds per phase of the model with `forwards` installed, and without them, round by round in turns
    after one round each that warms up."""
    found: list[dict[str, list[float]]] = [{phase: [] for phase in session.phases} for _ in range(2)]
    for number in range(ROUNDS + 1):
        for samples, packed in zip(found, (forwards, ()), strict=True):
            with installed(packed):
                times = _round(session)
            if number:
                for phase, milliseconds in times.items():
                    samples[phase] += milliseconds
    return found


def _round(session: Session) -> dict[str, list[float]]:
    prefill, state = event_ms(session.prefill)
    times = {PREFILL: [prefill]}
    if DECODE in session.phases:
        times[DECODE] = []
        for _ in range(STEPS):
            step, state = event_ms(functools.partial(session.step, state))
            times[DECODE].append(step)
    return times


@torch.no_grad()
def layer_ms(forward: Forward, x: Tensor, flush: Tensor) -> float:
    """Median milliseconds of one layer on an input (rows, in), its weights not in the cache."""
    forward(x)
    times = []
    for _ in range(LAYER_RUNS):
        flush.zero_()
        times.append(event_ms(functools.partial(forward, x))[0])
    return float(torch.tensor(times).median())


def rows_of(layer: Layer, phase: str, workload: TargetSpec) -> int:
    """Input rows of a layer in a phase. A head computes the last position only."""
    alone = phase == DECODE or layer.kind == "head"
    return workload.batch_size * (1 if alone else workload.prompt_tokens)


def cost_table(model: LoadedModel, choices: Mapping[str, Sequence[QuantizedWeight]], workload: TargetSpec) -> CostTable:
    """Time every layer of `choices` under its schemes and as it is, and the unquantized model.

    Layers of equal shape and kernel are timed once. `base_ms` makes the prediction for the unquantized
    model its measurement.
    """
    session = Session(model, workload)
    cache = int(getattr(torch.cuda.get_device_properties(model.device), "L2_cache_size", 0)) or 2**26
    flush = torch.empty(2 * cache, dtype=torch.int8, device=model.device)
    known: dict[tuple[Any, ...], float] = {}

    def cost(layer: Layer, phase: str, weight: QuantizedWeight | None) -> float:
        if layer.kind == "embedding":
            return 0.0  # a lookup, the same under every assignment: part of the base
        kernel = "keep" if weight is None else str(kernel_for(layer, weight.scheme))
        rows = rows_of(layer, phase, workload)
        key = (layer.kind, layer.out_features, layer.in_features, layer.has_bias, kernel, rows)
        if key not in known:
            x = torch.randn(1, rows, layer.in_features, device=model.device, dtype=torch.bfloat16)
            module = model.modules_of(layer)[0] if weight is None else packed_module(model, layer, weight)[1]
            known[key] = layer_ms(module.forward, x, flush)
        return known[key]

    table: dict[str, dict[str, dict[str, float]]] = {phase: {} for phase in session.phases}
    for phase in session.phases:
        for name, weights in choices.items():
            layer = model.info.layer(name)
            own = {str(w.scheme): cost(layer, phase, None if str(w.scheme) == "keep" else w) for w in weights}
            table[phase][name] = {"keep": cost(layer, phase, None), **own}
    _, unquantized = rounds_in_turns(session, ())
    whole = {phase: Samples(unquantized[phase]).quiet_ms for phase in session.phases}
    base = {phase: whole[phase] - sum(costs["keep"] for costs in table[phase].values()) for phase in session.phases}
    return CostTable(device_name(model.device), base, table, {UNQUANTIZED: whole, "rounds": ROUNDS})
