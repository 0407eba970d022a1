"""PyTorch on this machine's CPU: packed int4, int8 and dynamic int8 kernels, timed end to end.

Weights in 4 bits run 4 to 6 times faster at decode than in float32 and no faster at prefill; dynamic
int8 the other way round. So decode and prefill latency are two objectives with opposite winners, and
the best mix depends on which of them matters. Which kernel runs which shape: `_torch_cpu_rules`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq.energy.meters import Meter
from autoq.layer import Layer
from autoq.measurement import Measurement
from autoq.scheme import Integer, Keep, PerChannel, PerGroup, Scheme, ZeroPoint
from autoq.spec import TargetSpec
from autoq.targets import CostTable, Exported, Runtime, Target
from autoq.targets._torch_cpu_rules import kernel_for

if TYPE_CHECKING:
    from autoq.methods import Grid, QuantizedWeight, Statistics
    from autoq.models import LoadedModel

_OPERATIONS = ("_weight_int8pack_mm", "_weight_int4pack_mm_for_cpu", "_convert_weight_to_int4pack_for_cpu")

_RUN = """import autoq

model, tokenizer = autoq.load({folder!r})
ids = tokenizer("The quick brown fox", return_tensors="pt")
print(tokenizer.decode(model.generate(**ids, max_new_tokens=20)[0]))"""
_RUN_ON_AN_IMAGE = """import autoq
from PIL import Image

model, processor = autoq.load({folder!r})
pixels = processor(Image.open("image.png").convert("MODE"), return_tensors="pt").to(model.dtype)
print(model.config.id2label[int(model(**pixels).logits.argmax())])"""


class TorchCpu(Target):
    """PyTorch's CPU kernels."""

    latencies = frozenset({"latency_decode_ms", "latency_prefill_ms"})
    # In bfloat16, SmolLM2 itself is 0.0012 from its float32 evaluation, and int4 kernels 0.0022 from theirs.
    logits_tolerance = 5e-3
    reads_images = True
    runs_on = "cpu"

    def grid(self) -> Grid:
        """What the kernels run well. `refuses` lets more through for who names it: other groups, methods,
        and real zero points."""
        from autoq.methods import Grid

        return Grid(
            methods=("hqq", "keep", "rtn"),
            bits=(4, 8),
            granularities=(PerGroup(32), PerGroup(64), PerGroup(128), PerChannel()),
            zero_points=("integer", "none"),
            activations=(None, "a8dyn"),
        )

    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        """See `Target.refuses`."""
        kernel = kernel_for(layer, scheme)
        return kernel if isinstance(kernel, str) else None

    def baselines(self) -> Mapping[str, Sequence[Scheme]]:
        """See `Target.baselines`."""

        def int4(method: str) -> list[Scheme]:
            zero: ZeroPoint = "real" if method == "hqq" else "integer"
            grouped = [Integer(method, 4, PerGroup(size), zero) for size in (64, 32, 128, 256)]
            return [*grouped, Integer(method, 4, PerChannel(), zero)]

        return {
            "unquantized": [Keep()],
            "uniform-int8": [Integer("rtn", 8, PerChannel(), "none")],
            "uniform-int8-a8dyn": [Integer("rtn", 8, PerChannel(), "none", "a8dyn")],
            "uniform-int4": int4("rtn"),
            "uniform-int4-hqq": int4("hqq"),
        }

    def unavailable(self) -> str | None:
        """See `Target.unavailable`."""
        import sys

        # Importing it takes seconds, so the operations are asked for only where somebody already did.
        torch = sys.modules.get("torch")
        if torch is None:
            return None if importlib.util.find_spec("torch") else "PyTorch is not installed"
        missing = [name for name in _OPERATIONS if not hasattr(torch, name)]
        if missing:
            return f"PyTorch {torch.__version__} lacks {', '.join(missing)}"
        if not {"fbgemm", "onednn"} & set(torch.backends.quantized.supported_engines):
            return f"PyTorch {torch.__version__} has neither fbgemm nor onednn; both need an x86 CPU with AVX2"
        return None

    def activation(self, scheme: Scheme, statistics: Any = None) -> Any:
        """See `Target.activation`: for a8dyn, what `linear_dynamic` does to its input."""
        if not isinstance(scheme, Integer) or scheme.activation is None:
            return None
        from autoq.targets._torch_cpu_kernels import dynamic_activation

        return dynamic_activation

    def cost_table(
        self, model: LoadedModel, choices: Mapping[str, Sequence[QuantizedWeight]], workload: TargetSpec
    ) -> CostTable:
        """See `Target.cost_table`. Whatever was swapped into `model` is taken out first.

        Raises `ModelRefused` for a dtype or module without kernels, `SchemeRefused` for a scheme
        without one, `SpecError` for a prompt longer than the model's positions.
        """
        from autoq.targets import _torch_cpu_assembly as assembly
        from autoq.targets import _torch_cpu_costs as costs
        from autoq.targets import _torch_cpu_timing as timing

        assembly.check_model(model)
        model.restore()
        with timing.threads(workload.threads):
            return costs.cost_table(model, choices, workload, costs.engine_for(workload))

    def time(
        self, model: LoadedModel, weights: Mapping[str, QuantizedWeight], workload: TargetSpec
    ) -> list[Measurement]:
        """See `Target.time`. Whatever was swapped into `model` is taken out first.

        Raises as `cost_table` does, and `KernelMismatch`.
        """
        from autoq.device import instruction_sets
        from autoq.targets import _torch_cpu_assembly as assembly
        from autoq.targets import _torch_cpu_costs as costs
        from autoq.targets import _torch_cpu_timing as timing

        assembly.check_model(model)
        model.restore()
        with timing.threads(workload.threads) as threads:
            session = timing.Session(model, workload)
            forwards, kernels = assembly.assemble(model, weights, costs.engine_for(workload))
            turns = timing.time_in_turns(session, forwards)
        detail = {
            "kernels": {str(weights[name].scheme): str(kernel) for name, kernel in sorted(kernels.items())},
            "threads": threads,
            "isa": " ".join(instruction_sets()),
            "runtime": self.runtime(),
            "batch_size": workload.batch_size,
            "prompt_tokens": workload.prompt_tokens,
        }
        return turns.measurements(detail)

    def meter(
        self,
        model: LoadedModel,
        weights: Mapping[str, QuantizedWeight],
        workload: TargetSpec,
        meters: Sequence[Meter],
    ) -> list[Measurement]:
        """See `Target.meter`. Raises as `time` does, and `OSError`."""
        from autoq.device import fingerprint
        from autoq.targets import _torch_cpu_assembly as assembly
        from autoq.targets import _torch_cpu_costs as costs
        from autoq.targets import _torch_cpu_timing as timing
        from autoq.targets._torch_metering import metered

        assembly.check_model(model)
        model.restore()
        with timing.threads(workload.threads) as threads:
            session = timing.Session(model, workload)
            forwards, _ = assembly.assemble(model, weights, costs.engine_for(workload))
            with assembly.installed(forwards):
                detail = {"threads": threads, "runtime": self.runtime()}
                return [metered(session, model.info, workload, meter, fingerprint(), detail) for meter in meters]

    def runtime(self) -> str:
        """See `Target.runtime`."""
        from importlib.metadata import version

        return f"torch {version('torch')}"

    def exports(self) -> str:
        """See `Target.exports`."""
        return "safetensors that autoq.load runs"

    def export(
        self,
        model: LoadedModel,
        weights: Mapping[str, QuantizedWeight],
        folder: Path,
        statistics: Callable[[str], Statistics],
    ) -> Exported:
        """See `Target.export`: `_torch_cpu_checkpoint` says what is in the file."""
        from autoq.targets import _torch_cpu_checkpoint as checkpoint

        checkpoint.write(model, weights, folder)
        images = model.info.images
        run = _RUN if images is None else _RUN_ON_AN_IMAGE.replace("MODE", "L" if images.channels == 1 else "RGB")
        return Exported("safetensors for PyTorch's CPU kernels", (checkpoint.WEIGHTS,), run)

    def reload(self, folder: Path, threads: int | None = None) -> Runtime:
        """See `Target.reload`."""
        from autoq.targets._torch_cpu_checkpoint import TorchCpuRuntime
        from autoq.targets._torch_cpu_costs import engine_for

        return TorchCpuRuntime(folder, threads, engine_for(TargetSpec()))


def load(folder: Path, threads: int | None = None) -> tuple[Any, Any]:
    """The transformers model and the tokenizer (or image processor) of an export: see `autoq.load`."""
    import torch

    from autoq.targets import _torch_cpu_checkpoint as checkpoint
    from autoq.targets._torch_cpu_costs import engine_for

    if threads is not None:
        torch.set_num_threads(threads)
    return checkpoint.load(folder, engine_for(TargetSpec()))
