"""PyTorch on an NVIDIA GPU: tinygemm int4, int8 and fp8 kernels. Not measured yet: no GPU has run it.

The rules and the calls are reviewed against the libraries' sources, which `_cuda_rules` names; timings use
CUDA events, cold caches and turns with the unquantized model. Until somebody runs its one opt-in test
(`tests/targets/test_cuda.py`) on a GPU, take what it says of speed as untried.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from autoq.assignment import Assignment
from autoq.energy.estimate import GPU, Estimate, per_token
from autoq.energy.meters import Meter
from autoq.layer import Layer, ModelInfo
from autoq.measurement import Measurement
from autoq.scheme import Float, Integer, Keep, PerChannel, PerGroup, Scheme
from autoq.spec import TargetSpec
from autoq.targets import UNQUANTIZED, CostTable, Target
from autoq.targets._cuda_rules import kernel_for

if TYPE_CHECKING:
    from torch import Tensor

    from autoq.methods import Grid, QuantizedWeight, Statistics
    from autoq.models import LoadedModel

_DRIVER = Path("/proc/driver/nvidia/version")


class Cuda(Target):
    """PyTorch's CUDA kernels."""

    latencies = frozenset({"latency_decode_ms", "latency_prefill_ms"})
    rounds_per_token = True
    runs_on = "gpu"

    def grid(self) -> Grid:
        """What the kernels run."""
        from autoq.methods import Grid

        return Grid(
            methods=("hqq", "keep", "rtn"),
            bits=(4, 8),
            granularities=(PerGroup(64), PerGroup(32), PerGroup(128), PerChannel()),
            zero_points=("integer", "none"),
            activations=(None, "a8dyn"),
            formats=("fp8",),
            folds=True,
        )

    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        """See `Target.refuses`."""
        kernel = kernel_for(layer, scheme)
        return kernel if isinstance(kernel, str) else None

    def refuses_model(self, info: ModelInfo) -> str | None:
        """A model in another dtype than bfloat16, which is what the kernels give, or a mixture of experts."""
        if any(layer.stack for layer in info.layers):
            return f"its times are of layers that every token reaches, and {info.architecture} has experts"
        return None if info.dtype == "bfloat16" else f"its kernels give bfloat16, not {info.dtype}; set model.dtype"

    def baselines(self) -> Mapping[str, Sequence[Scheme]]:
        """See `Target.baselines`."""
        int4 = [Integer("rtn", 4, granularity) for granularity in (PerGroup(64), PerGroup(32), PerChannel())]
        return {
            "unquantized": [Keep()],
            "uniform-int8-a8dyn": [Integer("rtn", 8, PerChannel(), "none", "a8dyn")],
            "uniform-fp8-a8dyn": [Float("rtn", "fp8", PerChannel(), "a8dyn")],
            "uniform-int4": int4,
        }

    def unavailable(self) -> str | None:
        """See `Target.unavailable`. Asks PyTorch where somebody has loaded it, else the driver."""
        try:
            version = metadata.version("torch")
        except metadata.PackageNotFoundError:
            return "PyTorch is not installed"
        torch = sys.modules.get("torch")
        sees = torch.cuda.is_available() if torch is not None else _DRIVER.exists() and "+cpu" not in version
        return None if sees else f"PyTorch {version} sees no CUDA device"

    def runtime(self) -> str:
        """See `Target.runtime`."""
        return f"torch {metadata.version('torch')}"

    def activation(self, scheme: Scheme, statistics: Statistics | None = None) -> Callable[[Tensor], Tensor] | None:
        """See `Target.activation`: what the int8 and fp8 kernels are fed with, rounded per token."""
        if not isinstance(scheme, Integer | Float) or scheme.activation is None:
            return None
        from autoq.targets._symmetric_activation import activation

        return activation(scheme, statistics)

    def cost_table(
        self, model: LoadedModel, choices: Mapping[str, Sequence[QuantizedWeight]], workload: TargetSpec
    ) -> CostTable:
        """See `Target.cost_table`. Raises `ModelRefused`, `SchemeRefused`, and `SpecError` for a prompt longer
        than the model's positions."""
        from autoq.targets import _cuda_kernels as kernels
        from autoq.targets import _cuda_timing as timing

        kernels.check_model(model)
        model.restore()
        return timing.cost_table(model, choices, workload)

    def time(
        self, model: LoadedModel, weights: Mapping[str, QuantizedWeight], workload: TargetSpec
    ) -> list[Measurement]:
        """See `Target.time`. Raises as `cost_table` does, and `KernelMismatch`."""
        from autoq.targets import _cuda_kernels as kernels
        from autoq.targets import _cuda_timing as timing
        from autoq.targets._torch_cpu_timing import Samples, Session

        kernels.check_model(model)
        model.restore()
        forwards, used = kernels.assemble(model, weights)
        candidate, unquantized = timing.rounds_in_turns(Session(model, workload), forwards)
        detail = {
            "kernels": {str(weights[name].scheme): str(kernel) for name, kernel in sorted(used.items())},
            "runtime": self.runtime(),
            "batch_size": workload.batch_size,
            "prompt_tokens": workload.prompt_tokens,
        }
        device = timing.device_name(model.device)
        found = []
        for phase, times in candidate.items():
            samples = Samples(times)
            own = detail | {UNQUANTIZED: Samples(unquantized[phase]).quiet_ms}
            found.append(
                Measurement(
                    phase, samples.quiet_ms, "ms", "measured", "report", samples.stderr_ms, len(times), device, own
                )
            )
        return found

    def estimated_energy(self, info: ModelInfo, assignment: Assignment, workload: TargetSpec) -> Estimate:
        """See `Target.estimated_energy`: a GPU's memory costs less than a host's."""
        return per_token(GPU, info, assignment, workload)

    def meter(
        self,
        model: LoadedModel,
        weights: Mapping[str, QuantizedWeight],
        workload: TargetSpec,
        meters: Sequence[Meter],
    ) -> list[Measurement]:
        """See `Target.meter`: by NVML, of the GPU that the model is on. Raises as `time` does, and `OSError`."""
        import torch

        from autoq.targets import _cuda_kernels as kernels
        from autoq.targets import _cuda_timing as timing
        from autoq.targets._torch_cpu_assembly import installed
        from autoq.targets._torch_cpu_timing import Session
        from autoq.targets._torch_metering import metered

        kernels.check_model(model)
        own = str(torch.cuda.get_device_properties(model.device).uuid)
        mine = [meter for meter in meters if meter.uuid.removeprefix("GPU-") == own.removeprefix("GPU-")]
        model.restore()
        session, device = Session(model, workload), timing.device_name(model.device)
        forwards, _ = kernels.assemble(model, weights)
        detail = {"runtime": self.runtime()}
        with installed(forwards):
            return [
                metered(session, model.info, workload, meter, device, detail, torch.cuda.synchronize) for meter in mine
            ]
