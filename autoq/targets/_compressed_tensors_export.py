"""Writes a compressed-tensors checkpoint: safetensors in shards, config.json, tokenizer, generation config."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from autoq.errors import AutoQError, ModelRefused, SchemeRefused
from autoq.methods import QuantizedWeight, Statistics
from autoq.methods._float_weight import FloatWeight
from autoq.models import LoadedModel
from autoq.models.quiet import quiet
from autoq.scheme import Float, Keep
from autoq.targets import Exported, Target
from autoq.targets._compressed_tensors import share_global_scales, shipped
from autoq.targets._compressed_tensors_config import quantization_config
from autoq.targets._vllm_rules import fused_differ

SHARD_BYTES = 5 * 10**9


def write(
    target: Target,
    model: LoadedModel,
    weights: Mapping[str, QuantizedWeight],
    folder: Path,
    statistics: Callable[[str], Statistics],
) -> Exported:
    """The export of `target`, vLLM; see `Target.export`."""
    check(target, model, weights)
    model.restore()
    quantized = _shared(
        {name: weight for name, weight in weights.items() if not isinstance(weight.scheme, Keep)}, model
    )
    tensors = _kept_tensors(model, set(quantized))
    for name, weight in quantized.items():
        own = shipped(weight, functools.partial(statistics, name))
        tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in own.items()}
    try:
        files = _write_shards(tensors, folder)
        _write_configs(model, quantized, folder)
    except (OSError, SafetensorError) as problem:
        raise AutoQError(f"the export cannot be written to {str(folder)!r}: {problem}") from problem
    return Exported("compressed-tensors", files, "vllm serve {folder}")


def check(target: Target, model: LoadedModel, weights: Mapping[str, QuantizedWeight]) -> None:
    """Raise for a model or an assignment that vLLM would not load, naming layer and rule."""
    if (rule := target.refuses_model(model.info)) is not None:
        raise ModelRefused(f"vllm: {rule}")
    layers = {layer.name: layer for layer in model.info.layers}
    for name, weight in weights.items():
        if (rule := target.refuses(layers[name], weight.scheme)) is not None:
            raise SchemeRefused(f"vllm: layer {name} as {weight.scheme}: {rule}")
    if (rule := fused_differ(layers, {name: weight.scheme for name, weight in weights.items()})) is not None:
        raise SchemeRefused(f"vllm: {rule}")


def _shared(weights: Mapping[str, QuantizedWeight], model: LoadedModel) -> dict[str, QuantizedWeight]:
    """The weights, with one global scale for NVFP4 layers that run as one."""
    groups: dict[str, dict[str, FloatWeight]] = {}
    for name, weight in weights.items():
        if isinstance(weight, FloatWeight) and isinstance(weight.scheme, Float) and weight.scheme.format == "nvfp4":
            groups.setdefault(model.info.layer(name).fusion_group or name, {})[name] = weight
    result = dict(weights)
    for group in groups.values():
        result |= share_global_scales(group)
    return result


def _kept_tensors(model: LoadedModel, quantized: set[str]) -> dict[str, Tensor]:
    """Everything but the quantized weights, under the names of the model's own checkpoint.

    Raises `ModelRefused` where transformers loads a quantized layer under another name than it is stored by.
    """
    module: Any = model.model
    state = dict(module.state_dict())
    for repeated in _repeated(module):
        state.pop(repeated, None)
    # Experts are one tensor in memory and many in the checkpoint, and some names differ.
    stored: dict[str, Tensor] = revert_weight_conversion(module, state)
    for name in quantized:
        if f"{name}.weight" not in stored:
            raise ModelRefused(f"vllm: {name} has another name in the checkpoints of {model.info.architecture}")
    return {key: t.contiguous() for key, t in stored.items() if key.removesuffix(".weight") not in quantized}


def _repeated(module: Any) -> set[str]:
    """Names of parameters that are another parameter again: those that transformers ties on loading."""
    tied = getattr(module, "all_tied_weights_keys", {})
    state = module.state_dict()
    return {
        name for name, source in tied.items() if name in state and state[name].data_ptr() == state[source].data_ptr()
    }


def _write_shards(tensors: dict[str, Tensor], folder: Path) -> tuple[str, ...]:
    """Write `tensors` in files of at most `SHARD_BYTES`, with an index where there are several."""
    plan = huggingface_hub.split_torch_state_dict_into_shards(tensors, max_shard_size=SHARD_BYTES)
    for file, names in plan.filename_to_tensors.items():
        save_file({name: tensors[name] for name in names}, folder / file, metadata={"format": "pt"})
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        _write_json(folder / "model.safetensors.index.json", index)
    return tuple(sorted(plan.filename_to_tensors))


def _write_configs(model: LoadedModel, quantized: Mapping[str, QuantizedWeight], folder: Path) -> None:
    module: Any = model.model
    settings = json.loads(module.config.to_json_string(use_diff=True))
    settings["architectures"] = [type(module).__name__]
    settings["dtype"] = model.info.dtype
    if quantized:
        linears = [name for name, each in module.named_modules() if isinstance(each, nn.Linear)]
        schemes = {name: weight.scheme for name, weight in quantized.items()}
        settings["quantization_config"] = quantization_config(schemes, [n for n in linears if n not in schemes])
    _write_json(folder / "config.json", settings)
    with quiet():
        if getattr(module, "generation_config", None) is not None:
            module.generation_config.to_json_file(folder / "generation_config.json")
        if model.tokenizer is not None:
            model.tokenizer.save_pretrained(folder)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
