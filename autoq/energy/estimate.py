"""Joules of one token, from counted work and published constants: an estimate, never a measurement.

    E = Σ_layers (operations · e_op[format] + bytes · e_byte) + attention and the rest likewise

per pass, divided by the pass's tokens. The constants of a machine that nothing is known of are those of
its process class. Multiplication and addition are priced apart in the sources; an operation here is half
of a multiplication and an accumulation (int8 in int32, floats in float32):

    45 nm   M. Horowitz, "Computing's energy problem (and what we can do about it)", ISSCC 2014, Fig. 1.1.9:
            int8 mult 0.2, int32 add 0.1, fp16 mult 1.1, fp32 mult 3.7, fp32 add 0.9 pJ; DRAM 1.3 to 2.6 nJ
            per 64 bits
    7 nm    N. Jouppi et al., "Ten lessons from three generations shaped Google's TPUv4i", ISCA 2021,
            Table 2, the same figures brought forward: int8 mult 0.07, int32 add 0.03, bf16 mult 0.21,
            fp16 mult 0.34, fp32 mult 1.31, fp32 add 0.38 pJ; per 64 bits DDR 1300, HBM2 250 to 450 pJ

The 7 nm figures are used. Neither table has fp8: it is priced as bfloat16, which multiplies more bits,
so from above. What a processor spends on fetching and decoding instructions, on its caches and on being
switched on is not in these constants, so the sum is a lower bound. It ranks assignments by the traffic
and arithmetic they cause; it does not predict a wall socket.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from autoq.assignment import Assignment
from autoq.energy import work
from autoq.energy.work import ComputeFormat
from autoq.layer import Layer, ModelInfo
from autoq.scheme import Keep, Scheme
from autoq.spec import TargetSpec

PICO = 1e-12
Computes = Callable[[Layer, Scheme], ComputeFormat]


@dataclass(frozen=True)
class Constants:
    """Picojoule per operation, by the format that is computed in, and per byte to or from memory."""

    name: str
    operation: Mapping[ComputeFormat, float]
    byte: float


def _half(multiply: float, accumulate: float) -> float:
    return (multiply + accumulate) / 2


_LOGIC_7NM: dict[ComputeFormat, float] = {
    "int8": _half(0.07, 0.03),
    "fp8": _half(0.21, 0.38),
    "bf16": _half(0.21, 0.38),
    "fp16": _half(0.34, 0.38),
    "fp32": _half(1.31, 0.38),
}
HOST = Constants("7 nm logic, DDR memory", _LOGIC_7NM, 1300 / 8)
GPU = Constants("7 nm logic, HBM2 memory", _LOGIC_7NM, (250 + 450) / 2 / 8)


@dataclass(frozen=True)
class Estimate:
    """Joules per token, what they were estimated for, and their parts (`detail`, in joules per token)."""

    joules: float
    device: str
    detail: Mapping[str, Any] = field(default_factory=dict)


def per_token(
    constants: Constants,
    info: ModelInfo,
    assignment: Assignment,
    workload: TargetSpec,
    computes: Computes | None = None,
    idle_joules: float = 0.0,
) -> Estimate:
    """Joules per decoded token at the workload's batch and prompt; per input token for a model that decodes
    nothing.

    `computes` says what a layer's products are computed in under a scheme, by default
    `work.compute_format`; `idle_joules` is what the device draws anyway while the pass lasts. Layers that
    `assignment` does not name keep their weights. `work.refuses(info)` must be None.
    """
    phase = work.phases(info)[-1]
    kept = Keep()
    operations = moved = 0.0
    for layer in info.layers:
        scheme = assignment.get(layer.name, kept)
        share = work.layer_work(info, layer, scheme, phase, workload)
        if share.operations:
            computed = computes(layer, scheme) if computes else work.compute_format(scheme, info.dtype)
            operations += share.operations * constants.operation[computed]
        moved += share.moved
    others = work.other_work(info, phase, workload, assignment.caches)
    operations += others.operations * constants.operation[work.DTYPE_FORMATS[info.dtype]]
    count = work.tokens(info, workload)
    parts = {
        "operations": operations * PICO / count,
        "memory": (moved + others.moved) * constants.byte * PICO / count,
        "idle": idle_joules / count,
    }
    detail = {f"{name}_joule": value for name, value in parts.items()}
    return Estimate(sum(parts.values()), constants.name, detail | {"tokens": count})
