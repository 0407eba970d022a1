"""ONNX Runtime on this machine's CPU: 4-bit blocks and 8-bit integers, for encoders on servers and at the edge.

Models run in float32 where they are not quantized, and read a whole text at once: encoders, masked models,
and decoders without a cache, so speed is prefill latency. What is timed is the very model that `export`
writes. Which kernel runs which shape, and what is refused as slow: `_onnx_rules`.

A file holds float32 weights, 8-bit codes or packed blocks, and scales in bfloat16, as AutoQ counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autoq.layer import Layer, ModelInfo
from autoq.measurement import Measurement
from autoq.scheme import Integer, Keep, PerChannel, PerGroup, Scheme
from autoq.spec import ModelSpec, TargetSpec
from autoq.targets import CostTable, Exported, Runtime, Target, missing_packages
from autoq.targets._onnx_rules import kernel_for

if TYPE_CHECKING:
    from autoq.methods import Grid, QuantizedWeight, Statistics
    from autoq.models import LoadedModel

_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
# Nodes and the shapes they are given, per layer: 900 bytes kept, up to 1900 quantized (BERT, GPT-2, Llama, MiniLM).
_GRAPH_BYTES = 1500
_RUN = """\
import onnxruntime, transformers
session = onnxruntime.InferenceSession("{folder}/model.onnx", providers=["CPUExecutionProvider"])
tokenizer = transformers.AutoTokenizer.from_pretrained("{folder}")
inputs = tokenizer(["A sentence."], return_tensors="np")
print(session.run(None, {name.name: inputs[name.name] for name in session.get_inputs()})[0].shape)"""


class OnnxRuntimeCpu(Target):
    """ONNX Runtime's CPU kernels.

    Weight-only exports of MiniLM are 1e-12 (cosine distance) from the searched model. Where inputs are in
    8 bits too, a difference in the last place decides between two codes now and then, and six blocks make of
    that up to 6e-3 with ranges per tensor and 3e-4 per block, which is what the searched model itself moves
    by when its embeddings are disturbed by 1e-6.
    """

    latencies = frozenset({"latency_prefill_ms"})
    logits_tolerance = 1e-5

    def grid(self) -> Grid:
        """What the kernels run well. `refuses` lets more through for who names it: 2 bits, calibrated
        inputs, other groups."""
        from autoq.methods import Grid

        return Grid(
            methods=("keep", "rtn"),
            bits=(4, 8),
            granularities=(PerGroup(32), PerGroup(64), PerGroup(128), PerChannel()),
            zero_points=("integer", "none"),
            activations=(None, "a8dyn"),
            folds=True,
        )

    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        """See `Target.refuses`."""
        kernel = kernel_for(layer, scheme)
        return kernel if isinstance(kernel, str) else None

    def refuses_model(self, info: ModelInfo) -> str | None:
        """See `Target.refuses_model`."""
        if info.task == "seq2seq":
            return f"it runs encoders and decoders, and {info.architecture} is both; choose torch-cpu"
        if any(layer.stack for layer in info.layers):
            return f"its graph is fixed, and {info.architecture} has experts that run as tokens need them"
        if info.dtype != "float32":
            return f"its CPU kernels compute in float32, not in {info.dtype}; set model.dtype: float32"
        return None

    def baselines(self) -> Mapping[str, Sequence[Scheme]]:
        """See `Target.baselines`."""
        groups = (32, 64, 128, 16)
        return {
            "unquantized": [Keep()],
            "uniform-int8": [Integer("rtn", 8, PerChannel(), "none")],
            "uniform-int8-a8dyn": [Integer("rtn", 8, PerChannel(), "none", "a8dyn")],
            "uniform-int4": [Integer("rtn", 4, PerGroup(size)) for size in groups],
            "uniform-int4-a8dyn": [Integer("rtn", 4, PerGroup(size), activation="a8dyn") for size in groups],
        }

    def other_bytes(self, info: ModelInfo, model: ModelSpec) -> int:
        """See `Target.other_bytes`: the graph itself ships too."""
        return info.other_bytes + _GRAPH_BYTES * len(info.layers)

    def unavailable(self) -> str | None:
        """See `Target.unavailable`."""
        return missing_packages(_PACKAGES, "onnx")

    def runtime(self) -> str:
        """See `Target.runtime`."""
        from importlib import metadata

        try:
            return f"onnxruntime {metadata.version('onnxruntime')}"
        except metadata.PackageNotFoundError:
            return ""

    def activation(self, scheme: Scheme, statistics: Statistics | None = None) -> Any:
        """See `Target.activation`."""
        if not isinstance(scheme, Integer) or scheme.activation is None:
            return None
        from autoq.targets import _onnx_activations

        return _onnx_activations.activation(scheme, statistics)

    def cost_table(
        self, model: LoadedModel, choices: Mapping[str, Sequence[QuantizedWeight]], workload: TargetSpec
    ) -> CostTable:
        """See `Target.cost_table`. Whatever was swapped into `model` is taken out first.

        Raises `ModelRefused` for a model that torch cannot export, `SchemeRefused` for a scheme without a
        kernel, `SpecError` for a prompt longer than the model's positions.
        """
        from autoq.targets import _onnx_costs

        return _onnx_costs.cost_table(model, choices, workload)

    def time(
        self, model: LoadedModel, weights: Mapping[str, QuantizedWeight], workload: TargetSpec
    ) -> list[Measurement]:
        """See `Target.time`. Raises as `cost_table` does, and `KernelMismatch`."""
        from autoq.targets import _onnx_session

        return _onnx_session.measure(model, weights, workload)

    def exports(self) -> str | None:
        """See `Target.exports`."""
        return "ONNX model with tokenizer and config"

    def export(
        self,
        model: LoadedModel,
        weights: Mapping[str, QuantizedWeight],
        folder: Path,
        statistics: Callable[[str], Statistics],
    ) -> Exported:
        """See `Target.export`. Raises as `cost_table` does."""
        from autoq.targets import _onnx_session

        files = _onnx_session.write(model, weights, folder, statistics)
        return Exported("ONNX, opset 21 with com.microsoft operators", tuple(files), _RUN)

    def reload(self, folder: Path, threads: int | None = None) -> Runtime:
        """See `Target.reload`. Raises `ExportBroken`."""
        from autoq.targets import _onnx_session

        return _onnx_session.OnnxRuntime(folder, threads)
