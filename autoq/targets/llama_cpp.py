"""llama.cpp on this machine's CPU: every layer in a GGUF type of its own, one file that any llama.cpp loads.

What is searched is what runs: quality is taken on the numbers that the very bytes of the file stand for,
with inputs rounded as llama.cpp's kernels round them (`_llama_cpp_activations`), and latency is measured by
llama.cpp itself, through the library inside the package `xllamacpp`.

Search with `model.dtype: float32`. llama.cpp keeps what lies between its products in float32; a model in
bfloat16 rounds there, by as much as an 8-bit type does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from autoq.errors import AutoQError
from autoq.kv_cache import Cache, KeyValue
from autoq.layer import Layer, ModelInfo
from autoq.measurement import Measurement
from autoq.scheme import Gguf, Keep, PerGroup, Scheme
from autoq.spec import ModelSpec, TargetSpec
from autoq.targets import CostTable, Exported, Runtime, Target, missing_packages

if TYPE_CHECKING:
    from torch import Tensor

    from autoq.methods import Grid, QuantizedWeight, Statistics
    from autoq.models import LoadedModel

_PACKAGES = ("xllamacpp", "gguf", "libgguf")


class LlamaCpp(Target):
    """llama.cpp's CPU kernels.

    Weights in blocks meet inputs in 8 bits, and a difference in the last place of an input decides now and
    then between two codes. Layer by layer such differences grow until the noise of the 8 bits is another
    one: two correct runs of a model with 30 blocks are as far apart (4e-3 to 2e-2 nats per token, most for
    types of 2 bits) as 8-bit inputs move the model, while their quality is the same. Where no type has
    blocks, they agree to 3e-6.
    """

    latencies = frozenset({"latency_decode_ms", "latency_prefill_ms"})
    logits_tolerance = 3e-2

    def grid(self) -> Grid:
        """Every type, with and without an importance matrix where it takes one."""
        from autoq.methods import Grid

        return Grid(
            methods=("gguf", "keep"),
            bits=(2, 3, 4, 5, 6, 8, 16),
            granularities=(PerGroup(32), PerGroup(256)),
            zero_points=("none", "integer"),
        )

    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        """See `Target.refuses`. Every type that AutoQ makes can be looked up too, so embeddings are no exception."""
        if isinstance(scheme, Keep):
            return None
        if not isinstance(scheme, Gguf):
            return f"llama.cpp runs GGUF types (gguf-q4_0, gguf-q8_0, …), not {scheme}"
        if layer.in_features % scheme.block:
            return (
                f"blocks of {scheme.block} do not divide the {layer.in_features} inputs of shape "
                f"({layer.out_features}, {layer.in_features})"
            )
        return None

    def refuses_model(self, info: ModelInfo) -> str | None:
        """See `Target.refuses_model`."""
        from autoq.targets._gguf_names import supported

        return supported(info.architecture)

    def refuses_cache(self, cache: Cache, scheme: KeyValue) -> str | None:
        """See `Target.refuses_cache`."""
        return "llama.cpp has one type for all caches of a model (--cache-type-k, --cache-type-v) and its own blocks"

    def baselines(self) -> Mapping[str, Sequence[Scheme]]:
        """See `Target.baselines`. llama.cpp's own mixes are `presets`."""
        return {"unquantized": [Keep()], "f16": [Gguf("f16")]}

    def presets(self, info: ModelInfo) -> Mapping[str, Mapping[str, Scheme]]:
        """See `Target.presets`: Q4_K_M and its like."""
        from autoq.targets._llama_cpp_presets import presets

        return presets(info)

    def other_bytes(self, info: ModelInfo, model: ModelSpec) -> int:
        """See `Target.other_bytes`: keys, tokenizer, tensor table, padding, and norms in float32."""
        if (missing := self.unavailable()) is not None:
            raise AutoQError(f"target llama-cpp: {missing}")
        from autoq.models.conversion import safetensors_folder
        from autoq.targets._gguf_file import other_bytes

        return other_bytes(info, safetensors_folder(model))

    def unavailable(self) -> str | None:
        """See `Target.unavailable`."""
        return missing_packages(_PACKAGES, "llama-cpp")

    def runtime(self) -> str:
        """See `Target.runtime`."""
        from importlib.metadata import PackageNotFoundError, version

        try:
            return f"llama.cpp (xllamacpp {version('xllamacpp')})"
        except PackageNotFoundError:
            return ""

    def activation(self, scheme: Scheme, statistics: Statistics | None = None) -> Callable[[Tensor], Tensor] | None:
        """See `Target.activation`."""
        if not isinstance(scheme, Gguf):
            return None
        from autoq.targets import _llama_cpp_activations as activations

        if scheme.type in activations.ROUNDED:
            return activations.ROUNDED[scheme.type]
        return activations.blocks_of_256 if scheme.block == 256 else activations.blocks_of_32

    def cost_table(
        self, model: LoadedModel, choices: Mapping[str, Sequence[QuantizedWeight]], workload: TargetSpec
    ) -> CostTable:
        """See `Target.cost_table`. Whatever was swapped into `model` is taken out first.

        Raises `SpecError` for a prompt longer than the model's positions, `ModelRefused` for a model that
        GGUF cannot hold, `AutoQError` where llama.cpp refuses it.
        """
        from autoq.targets._llama_cpp_costs import cost_table
        from autoq.targets._llama_cpp_timing import bench_for

        return cost_table(model, choices, workload, bench_for(model, workload))

    def time(
        self, model: LoadedModel, weights: Mapping[str, QuantizedWeight], workload: TargetSpec
    ) -> list[Measurement]:
        """See `Target.time`. Raises as `cost_table` does."""
        from autoq.targets._llama_cpp_timing import bench_for, time_in_turns

        bench = bench_for(model, workload)
        with bench.candidate(weights) as engine:
            turns = time_in_turns(bench, engine)
            system = str(engine.facts["system"]).strip(" |")
        detail = {
            "kernels": {str(w.scheme): w.scheme.type for w in weights.values() if isinstance(w.scheme, Gguf)},
            "threads": bench.threads,
            "isa": system,
            "runtime": self.runtime(),
            "batch_size": workload.batch_size,
            "prompt_tokens": workload.prompt_tokens,
        }
        return turns.measurements(detail)

    def exports(self) -> str:
        """See `Target.exports`."""
        return "one GGUF file for llama.cpp"

    def export(
        self,
        model: LoadedModel,
        weights: Mapping[str, QuantizedWeight],
        folder: Path,
        statistics: Callable[[str], Statistics],
    ) -> Exported:
        """See `Target.export`. Raises `ModelRefused` for a model or tokenizer that GGUF cannot hold."""
        from autoq.targets._gguf_file import write
        from autoq.targets._llama_cpp_runtime import FILE

        write(model, weights, folder / FILE)
        run = f"llama-cli -m {{folder}}/{FILE} -p 'The quick brown fox'\nllama-server -m {{folder}}/{FILE}"
        return Exported("GGUF", (FILE,), run)

    def reload(self, folder: Path, threads: int | None = None) -> Runtime:
        """See `Target.reload`."""
        from autoq.targets._llama_cpp_runtime import LlamaCppRuntime

        return LlamaCppRuntime(folder, threads, self.runtime())
