"""Targets: the deployment runtimes, one file each.

A target says which schemes it runs on which layers, so that the search space holds only what can
run; it times layers and whole assembled models with the kernels that will run. To add one, write
`autoq/targets/NAME.py` with one subclass of `Target`. Target files import torch inside functions only:
`refuses` and `grid` are asked before any model is loaded.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from autoq.assignment import Assignment
from autoq.errors import AutoQError
from autoq.layer import Layer
from autoq.measurement import Measurement
from autoq.scheme import Scheme
from autoq.spec import TargetSpec

if TYPE_CHECKING:
    from autoq.methods import Grid, QuantizedWeight
    from autoq.models import LoadedModel


@dataclass(frozen=True)
class CostTable:
    """Additive latency predictions: per phase, a base and one cost per layer shape and scheme.

    `base_ms[phase]` is what the unquantized model costs beside its layers, measured end to end minus
    the table's own entries. `layer_ms[phase][layer][scheme text]` was timed on the target's kernel
    for that shape. Phases are objective names: `latency_decode_ms`, `latency_prefill_ms`.
    """

    device: str
    base_ms: Mapping[str, float]
    layer_ms: Mapping[str, Mapping[str, Mapping[str, float]]]
    detail: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, phase: str, assignment: Assignment) -> float:
        """Predicted milliseconds of the whole model in `phase` under `assignment`."""
        table = self.layer_ms[phase]
        return self.base_ms[phase] + sum(
            table[name][str(scheme)] for name, scheme in assignment.items() if name in table
        )


class Target(abc.ABC):
    """One deployment runtime.

    `fuses` says whether it merges fusion groups, whose layers then must share a scheme.
    `latencies` are the latency objectives that it can time.
    """

    fuses: ClassVar[bool] = False
    latencies: ClassVar[frozenset[str]] = frozenset()

    @abc.abstractmethod
    def grid(self) -> Grid:
        """The axes of everything this target runs: the default search space."""

    @abc.abstractmethod
    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        """Why this target cannot run `scheme` on `layer` (one clause, naming the rule), or None."""

    def baselines(self) -> Mapping[str, Sequence[Scheme]]:
        """Uniform baselines: name -> schemes in order of preference; each layer takes the first that
        its choices hold, else keeps its weights. Always includes the unquantized model."""
        return {}

    def unavailable(self) -> str | None:
        """What is missing on this machine for this target to measure, or None. Imports nothing heavy."""
        return None

    def cost_table(
        self, model: LoadedModel, choices: Mapping[str, Sequence[QuantizedWeight]], workload: TargetSpec
    ) -> CostTable:
        """Time every layer under each of its choices. Layers of equal shape are timed once."""
        raise AutoQError("this target times nothing")

    def time(
        self, model: LoadedModel, weights: Mapping[str, QuantizedWeight], workload: TargetSpec
    ) -> list[Measurement]:
        """Assemble the model from packed-kernel modules, check that they compute what the dequantized
        weights compute (`KernelMismatch` if not), then time it end to end, one measurement (part
        `report`, kind `measured`) per latency objective."""
        raise AutoQError("this target times nothing")

    def activation(self, scheme: Scheme) -> Any:
        """A function Tensor -> Tensor that does to a layer's input what the kernel does to it under
        `scheme` (activation quantization), or None."""
        return None
