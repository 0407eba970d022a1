"""a device that is not here, described in a YAML file: latency and energy are predicted, never measured.

`target: {name: described, device: edge-npu}` takes a shipped description, `device: FILE.yaml` your own.
Peak rates, bandwidth, supported formats and energy per operation and byte give a latency by a roofline
and an energy by counting; both are labelled for what they are, and nothing is timed or exported.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, get_args

from autoq.assignment import Assignment
from autoq.energy import work
from autoq.energy.estimate import Constants, Estimate, per_token
from autoq.errors import SpecError
from autoq.layer import Layer, ModelInfo
from autoq.scheme import FLOAT_FORMATS, Float, FloatFormat, Integer, Keep, PerChannel, PerGroup, PerTensor, Scheme
from autoq.spec import TargetSpec
from autoq.targets import CostTable, Target
from autoq.targets import _described_rules as rules
from autoq.targets._described_device import Device, load_device, shipped

if TYPE_CHECKING:
    from torch import Tensor

    from autoq.methods import Grid, Statistics
    from autoq.scheme import Activation, Granularity

_EXAMPLE = "edge-npu"  # what is shown of this target before a spec says which device it is


class Described(Target):
    """A device by its description."""

    latencies = frozenset({"latency_decode_ms", "latency_prefill_ms"})
    rounds_per_token = True
    predicts_only = True
    reads_images = True

    def __init__(self, source: str | None = None) -> None:
        self._source = source

    @functools.cached_property
    def device(self) -> Device:
        """The description."""
        return load_device(self._source or _EXAMPLE)

    @property
    def title(self) -> str:
        """The device's name with the digest of its description, so that numbers of two versions never meet."""
        return f"{self.device.name} as described ({self.device.digest})"

    def configured(self, workload: TargetSpec) -> Target:
        """See `Target.configured`: the device that `target.device` names."""
        if workload.device is None:
            raise SpecError(
                f"target.device: described needs a YAML file or one of the shipped descriptions {', '.join(shipped())}"
            )
        target = Described(workload.device)
        _ = target.device  # read now, so that a bad description is refused with the spec
        return target

    def grid(self) -> Grid:
        """Everything that the description's kernels take, by rounding and HQQ; calibrated activation ranges
        (a8static and the other observers) for who names them."""
        from autoq.methods import Grid

        kernels = self.device.kernels
        formats = tuple(name for name in get_args(FloatFormat) if any(rule.weights == name for rule in kernels))
        forms = [FLOAT_FORMATS[name] for name in formats]
        sizes = dict.fromkeys(size for rule in kernels for size in rule.group_sizes)
        sizes |= dict.fromkeys(form.group for form in forms if form.group is not None)
        widths = {int(rule.weights[3:]) for rule in kernels if rule.weights.startswith("int")}
        widths |= {form.bits for form in forms}
        activations: list[Activation | None] = [None]
        if any("a8dyn" in rule.activations for rule in kernels):
            activations.append("a8dyn")
        return Grid(
            methods=("hqq", "keep", "rtn"),
            bits=tuple(sorted(widths)) or (8,),
            granularities=tuple(_granularity(size) for size in sizes),
            zero_points=tuple(dict.fromkeys(zero for rule in kernels for zero in rule.zero_points)),
            activations=tuple(activations),
            formats=formats,
            folds=True,
        )

    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        """See `Target.refuses`."""
        if isinstance(scheme, Keep):
            return None
        rule = rules.rule_for(self.device, layer, scheme)
        return rule if isinstance(rule, str) else None

    def refuses_model(self, info: ModelInfo) -> str | None:
        """A model that the device cannot compute in, or whose work cannot be counted."""
        if info.dtype in work.DTYPE_FORMATS and work.DTYPE_FORMATS[info.dtype] not in self.device.arithmetic:
            known = [dtype for dtype, name in work.DTYPE_FORMATS.items() if name in self.device.arithmetic]
            return f"{self.device.name} does not compute in {info.dtype}; choose model.dtype from {', '.join(known)}"
        return work.refuses(info)

    def baselines(self) -> Mapping[str, Sequence[Scheme]]:
        """The unquantized model, and each weight format in its first-named forms, as it is and with 8-bit
        activations."""
        found: dict[str, list[Scheme]] = {"unquantized": [Keep()]}
        for rule in self.device.kernels:
            if not rule.weights.startswith("int"):
                continue
            for activation in rule.activations:
                if activation == "a8static":
                    continue
                own: Activation | None = None if activation == "none" else activation
                name = f"uniform-{rule.weights}" + (f"-{own}" if own else "")
                found.setdefault(name, []).extend(
                    Integer("hqq" if zero == "real" else "rtn", int(rule.weights[3:]), _granularity(size), zero, own)
                    for zero in rule.zero_points
                    for size in rule.group_sizes
                )
        return found

    def activation(self, scheme: Scheme, statistics: Statistics | None = None) -> Callable[[Tensor], Tensor] | None:
        """See `Target.activation`: symmetric 8-bit rounding, per token or by the calibrated range."""
        if not isinstance(scheme, Integer | Float) or scheme.activation is None:
            return None
        from autoq.targets._symmetric_activation import activation

        return activation(scheme, statistics)

    def predicted_costs(self, info: ModelInfo, choices: Mapping[str, Sequence[str]], workload: TargetSpec) -> CostTable:
        """See `Target.predicted_costs`. Raises `SpecError` for a model that the device's memory cannot hold, or
        a prompt longer than the model's positions."""
        if info.max_positions is not None and workload.prompt_tokens > info.max_positions:
            raise SpecError(
                f"target.prompt_tokens: {workload.prompt_tokens} is too long for a model of {info.max_positions} "
                "positions"
            )
        return rules.cost_table(self.device, self.title, info, choices, workload)

    def estimated_energy(self, info: ModelInfo, assignment: Assignment, workload: TargetSpec) -> Estimate:
        """By the description's own constants; the idle power for as long as the roofline says."""
        device, phase, kept = self.device, work.phases(info)[-1], Keep()
        lasts = rules.other_seconds(device, info, phase, workload) + sum(
            rules.layer_seconds(device, info, layer, assignment.get(layer.name, kept), phase, workload)
            for layer in info.layers
        )
        operation = {name: own.picojoule_per_operation.value for name, own in device.arithmetic.items()}
        constants = Constants(self.title, operation, device.memory.picojoule_per_byte.value)

        def computes(layer: Layer, scheme: Scheme) -> work.ComputeFormat:
            return rules.computes(device, layer, scheme, info.dtype)

        return per_token(constants, info, assignment, workload, computes, device.idle_watt.value * lasts)


def _granularity(size: int | str) -> Granularity:
    if isinstance(size, int):
        return PerGroup(size)
    return PerChannel() if size == "channel" else PerTensor()
