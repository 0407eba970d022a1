"""Checkpoints for PyTorch's CPU kernels: one safetensors file, and the loader that runs it.

`model.safetensors` holds, for each quantized layer, exactly the tensors that its scheme ships
(`NAME.weight.codes`, `.scales`, `.zeros`, `.input_scales`), and every other tensor of the model under its own name; a
tensor that several names share is stored once. Its metadata say what each layer is. `config.json` and
the files of the tokenizer, or image processor, are the model's own. Codes are packed for the kernels of the
machine that loads them, as packed layouts differ between machines.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoq.assignment import Assignment
from autoq.errors import AutoQError, BadInput, ExportBroken
from autoq.kv_cache import Cache
from autoq.layer import Images, Layer, ModelInfo
from autoq.measurement import Measurement
from autoq.methods import QuantizedWeight
from autoq.methods._weights import restore
from autoq.models import experts
from autoq.models.inspection import architecture, attention, read_config
from autoq.models.loaded import LoadedModel
from autoq.models.loading import read_preparation
from autoq.models.quiet import quiet
from autoq.scheme import Keep, Scheme, parse_scheme
from autoq.spec import ModelSpec, TargetSpec
from autoq.targets import Runtime
from autoq.targets import _torch_cpu_timing as timing
from autoq.targets._torch_cpu_assembly import Chooser, assemble, check_model

WEIGHTS = "model.safetensors"
_KEY = "autoq"


def write(model: LoadedModel, weights: Mapping[str, QuantizedWeight], folder: Path) -> None:
    """Write the checkpoint of `model` under `weights` into `folder`. Whatever is swapped in is taken out."""
    check_model(model)
    model.restore()
    quantized = {name: weight for name, weight in weights.items() if not isinstance(weight.scheme, Keep)}
    tensors = {f"{n}.weight.{key}": t for n, weight in quantized.items() for key, t in weight.tensors.items()}
    own = {f"{name}.weight" for layer in quantized for name in _holders(model.info.layer(layer))}
    shared: dict[tuple[int, tuple[int, ...]], str] = {}
    aliases = {}
    for name, tensor in model.model.state_dict().items():
        if name in own:
            continue
        first = shared.setdefault((tensor.data_ptr(), tuple(tensor.shape)), name)
        if first != name:
            aliases[name] = first
        else:
            tensors[name] = tensor.contiguous()
    told = {
        "info": asdict(model.info),
        "schemes": {name: str(weight.scheme) for name, weight in quantized.items()},
        "aliases": aliases,
    }
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt", _KEY: json.dumps(told, separators=(",", ":"))})
    config: Any = model.model.config
    config.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)


def _holders(layer: Layer) -> tuple[str, ...]:
    return (layer.name, *layer.tied)


class Checkpoint:
    """What `write` wrote, read back: the skeleton, the quantized layers and all other tensors.

    Raises `ExportBroken` where the file is not whole or its tensors are not those of its schemes.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            with safe_open(folder / WEIGHTS, framework="pt") as file:
                told = json.loads((file.metadata() or {})[_KEY])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            layers = tuple(
                Layer(**{**facts, "tied": tuple(facts["tied"]), "source": None}) for facts in told["info"]["layers"]
            )
            labels = tuple(told["info"].get("labels", ()))
            caches = tuple(Cache(**facts) for facts in told["info"].get("caches", ()))
            images = None if told["info"].get("images") is None else Images(**told["info"]["images"])
            own = {"layers": layers, "labels": labels, "caches": caches, "images": images}
            self.info = ModelInfo(**{**told["info"], **own})
            self.aliases: dict[str, str] = dict(told["aliases"])
            self.quantized = {
                name: self._take(tensors, self.info.layer(name), parse_scheme(text))
                for name, text in told["schemes"].items()
            }
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, BadInput) as problem:
            raise ExportBroken(f"{WEIGHTS} is not a whole checkpoint for torch-cpu: {problem}") from problem
        self.tensors = tensors

    @staticmethod
    def _take(tensors: dict[str, Tensor], layer: Layer, scheme: Scheme) -> QuantizedWeight:
        prefix = f"{layer.name}.weight."
        own = {key.removeprefix(prefix): tensors.pop(key) for key in [k for k in tensors if k.startswith(prefix)]}
        return restore(scheme, (layer.out_features, layer.in_features), own)

    def differences(self, assignment: Assignment) -> list[str]:
        """Layers that the file holds otherwise than `assignment` says."""
        lines = []
        for layer in self.info.layers:
            found = str(self.quantized[layer.name].scheme) if layer.name in self.quantized else "keep"
            wanted = str(assignment.get(layer.name, Keep()))
            if found != wanted:
                lines.append(f"{layer.name}: the file holds {found}, the assignment says {wanted}")
        unknown = [name for name in assignment if name not in {layer.name for layer in self.info.layers}]
        return lines + [f"{name}: not a layer of this model" for name in unknown]

    def build(self, engine: Chooser) -> LoadedModel:
        """The model with packed kernels in place of its quantized layers. Raises as `assemble` does."""
        spec = ModelSpec(id=str(self.folder), dtype=self.info.dtype)  # type: ignore[arg-type]
        with quiet():
            config = read_config(spec, self.folder)
            model_class, _ = architecture(spec, config)
            # Parameters come from the file; buffers that no checkpoint stores are computed.
            with init_empty_weights(include_buffers=False):
                model = model_class._from_config(
                    config,
                    dtype=getattr(torch, spec.dtype),
                    attn_implementation=attention(model_class),
                    experts_implementation=experts.NAME,
                )
            experts.split(model)
            self._fill(model)
            prepared_by = read_preparation(spec, self.folder, self.info)
        loaded = LoadedModel(model, prepared_by, self.info)
        forwards, _ = assemble(loaded, self.quantized, engine)
        for module, forward in forwards:
            module.forward = forward
        return loaded

    def _fill(self, model: nn.Module) -> None:
        named = self.tensors | {name: self.tensors[first] for name, first in self.aliases.items()}
        dtype = getattr(torch, self.info.dtype)
        for name in self.quantized:
            layer = self.info.layer(name)
            shape = (layer.out_features, layer.in_features)
            # Code that asks a layer's weight for its dtype, shape or device gets an answer that takes no memory.
            shell = torch.empty(1, 1, dtype=dtype).expand(shape[::-1] if layer.kind == "conv1d" else shape)
            named |= {f"{holder}.weight": shell for holder in _holders(layer)}
        parameters: dict[int, nn.Parameter] = {}
        for name, tensor in named.items():
            owner, _, attribute = name.rpartition(".")
            try:
                module = model.get_submodule(owner)
            except AttributeError:
                raise ExportBroken(f"{WEIGHTS} holds {name}, which the model of config.json does not have") from None
            if attribute in module._buffers:
                module._buffers[attribute] = tensor
            else:
                made = parameters.setdefault(id(tensor), nn.Parameter(tensor, requires_grad=False))
                module._parameters[attribute] = made
        missing = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        if missing:
            raise ExportBroken(f"{WEIGHTS} lacks {len(missing)} of the model's weights, the first being {missing[0]}")


class TorchCpuRuntime(Runtime):
    """A checkpoint running on PyTorch's CPU kernels."""

    def __init__(self, folder: Path, threads: int | None, engine: Chooser) -> None:
        self._threads = threads
        self._checkpoint = Checkpoint(folder)
        with timing.threads(threads):
            self.model = self._checkpoint.build(engine)

    def differences(self, assignment: Assignment) -> list[str]:
        return self._checkpoint.differences(assignment)

    @torch.inference_mode()
    def outputs(self, tokens: Tensor) -> Tensor:
        with timing.threads(self._threads):
            return self.model.outputs(tokens.unsqueeze(0))[0].float()

    def time(self, workload: TargetSpec) -> list[Measurement]:
        with timing.threads(workload.threads or self._threads):
            turns = timing.time_in_turns(timing.Session(self.model, workload), ())
            return turns.measurements({"threads": torch.get_num_threads()})


def load(folder: Path, engine: Chooser) -> tuple[Any, Any]:
    """The transformers model on packed kernels and its tokenizer or image processor. Raises `AutoQError`."""
    if not (folder / WEIGHTS).is_file():
        raise AutoQError(f"{str(folder)!r} holds no {WEIGHTS}")
    loaded = Checkpoint(folder).build(engine)
    return loaded.model, loaded.tokenizer
