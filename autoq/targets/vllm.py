"""vLLM: compressed-tensors checkpoints, a scheme per layer; judged by size and quality, timed elsewhere.

Weights are evaluated exactly as they ship. Inputs of layers with 8-bit activations are rounded as
compressed-tensors does it when transformers runs the checkpoint, in bfloat16: per token
s = max|x|/127.5 (int8) or max|x|/448 (fp8), q = round(x/s). vLLM's kernels compute the same with
s = max|x|/127 and in float32: other codes for some inputs, no better and no worse. On a mix of W4A16 and
W8A8 of SmolLM2-135M, log probabilities differ from vLLM 0.32's by 0.11 to 0.17 on average with either
arithmetic, by 0.07 for W4A16 alone, and by 0.06 for the unquantized model: bfloat16 kernels.
Which kernel runs which shape: `_vllm_rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoq.kv_cache import Cache, KeyValue
from autoq.layer import Layer, ModelInfo
from autoq.scheme import Float, Integer, Keep, PerChannel, PerGroup, Scheme
from autoq.targets import Exported, Runtime, Target, missing_packages
from autoq.targets import _vllm_rules as rules

if TYPE_CHECKING:
    from torch import Tensor

    from autoq.methods import Grid, QuantizedWeight, Statistics
    from autoq.models import LoadedModel


class Vllm(Target):
    """vLLM's kernels for compressed-tensors."""

    fuses = True
    rounds_per_token = True

    def grid(self) -> Grid:
        """Everything that the kernels run, short of one scale per tensor, which never beats one per row."""
        from autoq.methods import Grid

        return Grid(
            methods=("hqq", "keep", "rtn"),
            bits=(4, 8),
            granularities=(PerGroup(16), *(PerGroup(size) for size in rules.GROUP_SIZES), PerChannel()),
            zero_points=("none", "integer"),
            activations=(None, "a8dyn", "a8static"),
            formats=("fp8", "mxfp4", "nvfp4"),
            blocks=(rules.BLOCK,),
            folds=True,
        )

    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        """See `Target.refuses`."""
        return rules.refusal(layer, scheme)

    def refuses_model(self, info: ModelInfo) -> str | None:
        """See `Target.refuses_model`."""
        if info.task != "causal":
            return f"vLLM generates with causal models, and {info.architecture} is {info.task}"
        if any(layer.stack for layer in info.layers):
            return (
                f"transformers, which reads exports back, takes all experts for quantized alike ({info.architecture})"
            )
        if info.dtype != "bfloat16":
            return f"scales ship in bfloat16, which a {info.dtype} model cannot take; set model.dtype to bfloat16"
        return None

    def refuses_cache(self, cache: Cache, scheme: KeyValue) -> str | None:
        """See `Target.refuses_cache`."""
        return "vLLM quantizes the caches of a model together, to 8-bit floats (--kv-cache-dtype fp8)"

    def baselines(self) -> Mapping[str, Sequence[Scheme]]:
        """See `Target.baselines`. Named as vLLM's users name them: W for weights, A for activations."""
        grouped = [Integer("rtn", 4, PerGroup(size), "none") for size in (128, 64, 32)]
        return {
            "unquantized": [Keep()],
            "w8a16": [Integer("rtn", 8, PerChannel(), "none")],
            "w8a8": [Integer("rtn", 8, PerChannel(), "none", "a8dyn")],
            "fp8": [Float("rtn", "fp8", PerChannel(), "a8dyn")],
            "w4a16": grouped,
        }

    def unavailable(self) -> str | None:
        """What measuring and exporting need; vLLM itself is asked only by who serves the checkpoint."""
        return missing_packages(("compressed_tensors",), "vllm")

    def runtime(self) -> str:
        """See `Target.runtime`: what reloads the export here."""
        from importlib.metadata import version

        return f"transformers {version('transformers')}, compressed-tensors {version('compressed-tensors')}"

    def activation(self, scheme: Scheme, statistics: Statistics | None = None) -> Callable[[Tensor], Tensor] | None:
        """See `Target.activation`."""
        if not isinstance(scheme, Integer | Float) or scheme.activation is None:
            return None
        from autoq.targets import _compressed_tensors as tensors

        return tensors.activation(scheme, statistics)

    def exports(self) -> str | None:
        """See `Target.exports`."""
        return "a compressed-tensors checkpoint (safetensors) for vLLM and transformers"

    def export(
        self,
        model: LoadedModel,
        weights: Mapping[str, QuantizedWeight],
        folder: Path,
        statistics: Callable[[str], Statistics],
    ) -> Exported:
        """See `Target.export`. Raises `SchemeRefused` and `ModelRefused` for what vLLM would not load."""
        from autoq.targets._compressed_tensors_export import write

        return write(self, model, weights, folder, statistics)

    def reload(self, folder: Path, threads: int | None = None) -> Runtime:
        """See `Target.reload`: by transformers' own support of compressed-tensors."""
        from autoq.targets._compressed_tensors_runtime import CompressedTensorsRuntime

        return CompressedTensorsRuntime(folder, threads)
