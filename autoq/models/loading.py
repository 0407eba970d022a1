"""Loading: from a spec to a `LoadedModel`.

Weights that are stored in the spec's dtype stay mapped to their file, so all workers of a machine
share one copy of them; other dtypes are converted into the cache first (`autoq.models.conversion`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers

from autoq.errors import ModelRefused
from autoq.layer import ModelInfo
from autoq.models import conversion, experts, pixels
from autoq.models.inspection import architecture, attention, build, first_line, float32_patterns, read_config, skeleton
from autoq.models.loaded import LoadedModel
from autoq.models.quiet import quiet
from autoq.spec import ModelSpec


def load(spec: ModelSpec, device: str = "cpu") -> LoadedModel:
    """The model in eval mode on `device`, without gradients on its parameters, and its tokenizer or image processor.

    Raises `ModelRefused` with one line for what cannot be used: see `autoq.models.sources`; for
    weights that are missing or of another shape than the config says, which transformers would
    replace by random numbers; and for those of blocks that the config leaves out, which it would drop.
    """
    with quiet():
        folder = conversion.safetensors_folder(spec)
        config = read_config(spec, folder)
        info = skeleton(spec, folder, config)
        weights = folder
        if not float32_patterns(build(spec, folder, config)[0], spec.dtype):
            weights = conversion.recast(spec.id, folder, spec.dtype)
        model = _read_weights(spec, weights, config)
        experts.split(model)
        prepared_by = read_preparation(spec, folder, info)
    _check_ties(spec, model, info)
    model.requires_grad_(False)
    return LoadedModel(model.to(device), prepared_by, info)


def _read_weights(spec: ModelSpec, folder: Path, config: Any) -> Any:
    model_class, _ = architecture(spec, config)
    try:
        model, report = model_class.from_pretrained(
            folder,
            config=config,
            dtype=getattr(torch, spec.dtype),
            attn_implementation=attention(model_class),
            experts_implementation=experts.NAME,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            # Both kinds of fault are refused below, by name.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except Exception as problem:
        # The files beside the weights are read too, and transformers raises whatever it meets in them.
        raise ModelRefused(f"model {spec.id!r}: its weights cannot be read: {first_line(problem)}") from problem
    for what in ("missing_keys", "mismatched_keys"):
        if found := sorted(key if isinstance(key, str) else key[0] for key in report[what]):
            fault = "lacks" if what == "missing_keys" else "has another shape than its config says for"
            raise ModelRefused(f"model {spec.id!r} {fault} {len(found)} of its weights, the first being {found[0]}")
    _refuse_left_over(spec, model, report["unexpected_keys"])
    return model


def _refuse_left_over(spec: ModelSpec, model: Any, unexpected: Iterable[str]) -> None:
    """Refuse weights of blocks that the config does not have: without them it is another model.

    What else is left over (a head for another task, buffers of former versions) was never part of it.
    """
    own = {_without_numbers(name) for name in model.state_dict()}
    if found := sorted(name for name in unexpected if _without_numbers(name) in own):
        raise ModelRefused(
            f"model {spec.id!r} has {len(found)} weights of blocks that its config does not have, the first being "
            f"{found[0]}"
        )


def _without_numbers(name: str) -> str:
    return re.sub(r"\.\d+\.", ".*.", name)


def _check_ties(spec: ModelSpec, model: Any, info: ModelInfo) -> None:
    """Refuse a checkpoint in which other layers share a weight than its skeleton says."""
    owners: dict[int, str] = {}
    for layer in info.layers:
        for name in (layer.name, *layer.tied):
            owner = owners.setdefault(model.get_submodule(name).weight.data_ptr(), layer.name)
            if owner != layer.name:
                raise ModelRefused(f"model {spec.id!r} stores {name} and {owner} as one weight, its config as two")
        if len({model.get_submodule(name).weight.data_ptr() for name in (layer.name, *layer.tied)}) > 1:
            raise ModelRefused(f"model {spec.id!r} ties {', '.join(layer.tied)} to {layer.name} but stores two weights")


def read_preparation(spec: ModelSpec, folder: Path, info: ModelInfo) -> Any:
    """What makes the model's inputs: its tokenizer, or its image processor. Raises `ModelRefused`."""
    return read_tokenizer(spec, folder) if info.images is None else pixels.read_processor(spec, folder)


def read_tokenizer(spec: ModelSpec, folder: Path) -> Any:
    """The tokenizer in a checked folder. Raises `ModelRefused`."""
    try:
        return transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as problem:
        # tokenizers raises bare exceptions for a file it cannot parse.
        raise ModelRefused(f"model {spec.id!r} has no usable tokenizer: {first_line(problem)}") from problem
