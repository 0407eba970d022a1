"""The latency table of a model on PyTorch's CPU kernels, from one whole model for each kernel.

A layer timed alone in a loop finds its weights in the cache, its threads awake and its input warm, and
comes out up to 40 % too fast; a layer timed in a model that is otherwise in bfloat16 comes out too
slow, as its neighbours leave it no cache. So every layer is timed in place, among layers that run the same
kernel (layers at the same place of repeated blocks are of one kind), in turns with the unquantized model,
in which the kept layers are timed. A search's assignments are nearly all of one or two kernels, and mixed
company matters less than what the layers do to the rest of the model: on SmolLM2 in decode, attention and norms
take two fifths less time beside 4-bit layers than beside bfloat16. That too grows with the layers, so
each has its share of it (`_dealing.around`), and the table's sum over a timed model is what it took as a whole.

Time depends on the kernel, not on the method or on the numbers: schemes that share one are timed once.
"""

from __future__ import annotations

import functools
import math
import re
import time
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import nn

from autoq.device import fingerprint
from autoq.layer import Layer
from autoq.methods import QuantizedWeight
from autoq.models.loaded import LoadedModel
from autoq.spec import TargetSpec
from autoq.targets import UNQUANTIZED, CostTable
from autoq.targets import _dealing as dealing
from autoq.targets._dealing import Kind
from autoq.targets._torch_cpu_assembly import Chooser, Forward, kernel_of, packed_modules
from autoq.targets._torch_cpu_kernels import DynamicLinear, engines
from autoq.targets._torch_cpu_rules import Kernel
from autoq.targets._torch_cpu_timing import QUIET, Session, time_in_turns, time_layers

KEEP = Kernel("as-is")
_LEAST_ROUNDS = 12  # over all models


def _kinds(model: LoadedModel, choices: Mapping[str, Sequence[QuantizedWeight]]) -> list[Kind[Kernel]]:
    """By shape, kernels, and place in repeated blocks: what runs before a layer leaves its caches."""
    return dealing.kinds(model, choices, kernel_of, KEEP, lambda name: re.sub(r"\d+", "*", name))


def _forwards(
    model: LoadedModel, deal: Mapping[str, tuple[Kernel, QuantizedWeight | None]], engine: Chooser
) -> dict[str, list[tuple[nn.Module, Forward]]]:
    forwards: dict[str, list[tuple[nn.Module, Forward]]] = {}
    for name, (kernel, weight) in deal.items():
        layer = model.info.layer(name)
        if weight is None:
            forwards[name] = [(module, module.forward) for module in model.modules_of(layer)]
        else:
            pairs = packed_modules(model, layer, weight, kernel, engine)
            forwards[name] = [(module, packed.forward) for module, packed in pairs]
    return forwards


def cost_table(
    model: LoadedModel, choices: Mapping[str, Sequence[QuantizedWeight]], workload: TargetSpec, engine: Chooser
) -> CostTable:
    """Time every layer of `choices` under its schemes and as it is, and the unquantized model.

    Milliseconds, lower quartiles. `base_ms` makes the prediction for the unquantized model its measurement. Threads
    are the caller's to set.
    """
    session = Session(model, workload)
    kinds = _kinds(model, choices)
    dealt = dealing.leaders(kinds)
    rounds = math.ceil(_LEAST_ROUNDS / len(dealt))
    samples: dict[str, dict[tuple[int, Kernel], list[float]]] = {phase: {} for phase in session.phases}
    kind_of = {layer.name: index for index, kind in enumerate(kinds) for layer in kind.layers}
    alone = time_in_turns(session, ())
    unquantized = {phase: alone.candidate[phase].quiet_ms for phase in session.phases}
    speeds: dict[str, list[float]] = {phase: [] for phase in session.phases}
    whole: dict[str, list[float]] = {phase: [] for phase in session.phases}
    kept = _forwards(model, dict.fromkeys(kind_of, (KEEP, None)), engine)
    for deal in dealt:
        timed = time_layers(session, _forwards(model, deal, engine), kept, rounds)
        for phase in session.phases:
            # What the machine is slower now, it is for both.
            speed = unquantized[phase] / float(np.percentile(timed.unquantized.whole[phase], QUIET))
            speeds[phase].append(speed)
            whole[phase].append(float(np.percentile(timed.candidate.whole[phase], QUIET)) * speed)
            for name, index in kind_of.items():
                kernel = deal[name][0]
                if kernel != KEEP:
                    found = samples[phase].setdefault((index, kernel), [])
                    found.extend(value * speed for value in timed.candidate.layers[phase][name])
                found = samples[phase].setdefault((index, KEEP), [])
                found.extend(value * speed for value in timed.unquantized.layers[phase][name])
    base_ms, layer_ms, around = {}, {}, {}
    for phase in session.phases:
        table = {key: _quiet(values) for key, values in samples[phase].items()}
        around[phase] = dealing.around(kinds, dealt, table, whole[phase], unquantized[phase])
        # What all kernels take off the rest of the model is what a kept layer adds to it: nothing gets below 0.
        least = min([0.0, *around[phase].values()])
        kept_ms = {index: table[index, KEEP] for index, kind in enumerate(kinds) if len(kind.kernels) > 1}
        for index, kernel in table:
            if index in kept_ms:
                table[index, kernel] += (around[phase].get(kernel, 0.0) - least) * kept_ms[index]
        base_ms[phase] = unquantized[phase] - sum(table[index, KEEP] for index in kind_of.values())
        layer_ms[phase] = {
            name: {
                "keep": table[kind_of[name], KEEP],
                **{str(w.scheme): table[kind_of[name], kernel_of(model.info.layer(name), w)] for w in weights},
            }
            for name, weights in choices.items()
        }
    detail = {
        "threads": torch.get_num_threads(),
        "models": len(dealt),
        "rounds": rounds,
        UNQUANTIZED: unquantized,
        # How far the machine's own speed moved while the table was timed: its noise.
        "drift": {phase: max(speeds[phase]) / min(speeds[phase]) - 1 for phase in session.phases},
        "around": {phase: {str(kernel): share for kernel, share in found.items()} for phase, found in around.items()},
        "noise": {phase: alone.relative_error(phase) for phase in session.phases},
    }
    return CostTable(fingerprint(), base_ms, layer_ms, detail)


def _quiet(values: Sequence[float]) -> float:
    """What a layer takes per run, on average: the lower quartile of the runs that called it, by their share.

    All or none call a layer, but for an expert, which tokens come to or not.
    """
    called = [value for value in values if value > 0]
    return float(np.percentile(called, QUIET)) * len(called) / len(values) if called else 0.0


def engine_for(workload: TargetSpec) -> Chooser:
    """Which engine of `linear_dynamic` runs a layer fastest on a workload, on PyTorch's present threads."""

    def engine(layer: Layer) -> str:
        # A head computes the last position only, whatever the prompt's length.
        prefill = () if layer.kind == "head" else (workload.batch_size * workload.prompt_tokens,)
        rows = (workload.batch_size, *prefill)
        return fastest_engine(layer.out_features, layer.in_features, rows, torch.get_num_threads())

    return engine


@functools.cache
def fastest_engine(out_features: int, in_features: int, rows: tuple[int, ...], thread_count: int) -> str:
    """The engine of `linear_dynamic` that is faster for a shape, over inputs of so many `rows`.

    One packed weight serves all phases, so the geometric mean over them decides. `thread_count` is
    what PyTorch runs on now; it is part of what the answer is remembered under.
    """
    assert thread_count == torch.get_num_threads()
    codes = torch.ones(out_features, in_features, dtype=torch.int8)
    scores: dict[str, float] = {}
    for engine in engines():
        packed = DynamicLinear(codes, torch.ones(out_features), None, engine)
        scores[engine] = math.prod(_median_seconds(packed, torch.ones(m, in_features)) for m in rows)
    return min(scores, key=lambda engine: scores[engine])


@torch.no_grad()
def _median_seconds(module: nn.Module, x: torch.Tensor) -> float:
    module(x)
    taken: list[float] = []
    while len(taken) < 5 or (sum(taken) < 0.01 and len(taken) < 50):
        start = time.perf_counter()
        module(x)
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))
