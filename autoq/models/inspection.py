"""A model's skeleton, found by structure: no weights are read and no architecture is known by name.

The architecture is built from its config without storage. Layers are modules of the kinds that hold
one weight matrix, of which experts get their own first (`autoq.models.experts`), and routers: modules that
give back the product of their input and their weight. Which of them run together is seen, not guessed: a
short forward pass records which tensor object each linear reads, and linears of one parent module that read
the very same object are a fusion group (q/k/v, gate/up, but never a decoder's q with the k and v that read
the encoder). Layers that this pass does not reach (a vision tower) are left alone and counted with everything
else. The experts of a block are reached together. A second pass sees the keys and values of a decoder's attention.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.models.auto import modeling_auto
from transformers.pytorch_utils import Conv1D

from autoq.errors import ModelRefused
from autoq.kv_cache import Cache
from autoq.layer import Images, Layer, LayerKind, ModelInfo, Task
from autoq.models import caches, conversion, experts, folding, pixels
from autoq.models.quiet import quiet
from autoq.spec import ModelSpec

_PROBE_TOKENS = 8

# A class may stand in several tables (BART's in masked and seq2seq): the first one counts.
_TASKS: tuple[tuple[Task, str], ...] = (
    ("seq2seq", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    ("causal", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    ("masked", "MODEL_FOR_MASKED_LM_MAPPING_NAMES"),
    ("classification", "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES"),
    ("classification", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES"),
    ("encoder", "MODEL_FOR_TEXT_ENCODING_MAPPING_NAMES"),
    ("encoder", "MODEL_MAPPING_NAMES"),
)


def inspect(spec: ModelSpec) -> ModelInfo:
    """The model's layers, fusion groups and bytes.

    Reads the config and the names of the stored tensors. A model on the hub is downloaded first, a
    GGUF file or a demo model converted, once. Raises `ModelRefused` with one line for what cannot be
    used.
    """
    with quiet():
        folder = conversion.safetensors_folder(spec)
        return skeleton(spec, folder, read_config(spec, folder))


def read_config(spec: ModelSpec, folder: Path) -> Any:
    """The transformers config in a checked folder. Raises `ModelRefused`."""
    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as problem:
        # transformers raises whatever its own parsing runs into; for the user it is one thing.
        raise ModelRefused(f"model {spec.id!r}: config.json is not usable: {first_line(problem)}") from problem


def architecture(spec: ModelSpec, config: Any) -> tuple[Any, Task]:
    """The transformers class that the config names, and what it does. Raises `ModelRefused`."""
    named = (config.architectures or [None])[0]
    for task, table in _TASKS:
        known = getattr(modeling_auto, table).get(config.model_type, ())
        if named in ((known,) if isinstance(known, str) else known):
            if task in ("encoder", "classification") and getattr(config, "is_encoder_decoder", False):
                break
            return getattr(transformers, named), task
    raise ModelRefused(
        f"model {spec.id!r}: architecture {named!r} of model type {config.model_type!r} is not one of "
        "causal, masked or seq2seq language model, text encoder, or classifier of texts or images"
    )


def attention(model_class: Any) -> str:
    """The attention implementation to run: PyTorch's fused one where the architecture allows it."""
    return "sdpa" if model_class._supports_sdpa else "eager"


def build(spec: ModelSpec, folder: Path, config: Any) -> tuple[nn.Module, Task]:
    """The architecture on the meta device (shapes without storage) in the spec's dtype, tied as loaded."""
    model_class, task = architecture(spec, config)
    try:
        with torch.device("meta"):
            model = model_class._from_config(
                copy.deepcopy(config),
                dtype=getattr(torch, spec.dtype),
                attn_implementation=attention(model_class),
                experts_implementation=experts.NAME,
            )
        model.tie_weights()
    except Exception as problem:
        raise ModelRefused(
            f"model {spec.id!r}: {model_class.__name__} cannot be built: {first_line(problem)}"
        ) from problem
    if task == "seq2seq" and getattr(config, "decoder_start_token_id", None) is None:
        raise ModelRefused(f"model {spec.id!r}: config.json has no decoder_start_token_id")
    if task == "classification":
        _refuse_no_classes(spec, config)
    _untie(spec, model, folder)
    experts.split(model)
    return model.eval(), task


def _refuse_no_classes(spec: ModelSpec, config: Any) -> None:
    """Refuse a head whose outputs are not one distribution over classes."""
    kind = getattr(config, "problem_type", None)
    if config.num_labels < 2 or kind in ("regression", "multi_label_classification"):
        raise ModelRefused(
            f"model {spec.id!r}: a classifier needs two classes or more, one of which is right; config.json "
            f"has {config.num_labels} with problem_type {kind}"
        )
    if not isinstance(config.id2label, dict) or set(config.id2label) != set(range(config.num_labels)):
        raise ModelRefused(
            f"model {spec.id!r}: config.json must name classes 0 to {config.num_labels - 1} under id2label, all of them"
        )


def _untie(spec: ModelSpec, model: Any, folder: Path) -> None:
    """Take apart what the config ties although the checkpoint has it twice, with different values.

    transformers does so too when it loads (T5 v1.1 and Flan have a head of their own, and its T5 is
    always tied by config). Equal copies stay tied.
    """
    for target, source in model.all_tied_weights_keys.items():
        if not conversion.are_equal(spec.id, folder, target, source):
            owner, _, attribute = target.rpartition(".")
            tied = model.get_parameter(target)
            setattr(model.get_submodule(owner), attribute, nn.Parameter(torch.empty_like(tied), requires_grad=False))


def skeleton(spec: ModelSpec, folder: Path, config: Any) -> ModelInfo:
    """What `inspect` gives, from a checked folder and its config."""
    model, task = build(spec, folder, config)
    names = _weight_holders(model)
    # Ties, sizes and the head are read off before the probe, which takes the meta tensors away.
    weights = {name: _module(model, name).weight for name in names}
    head = model.get_output_embeddings()  # type: ignore[operator]
    shared: dict[int, list[str]] = collections.defaultdict(list)
    for name in names:
        shared[id(weights[name])].append(name)
    stored = {id(tensor): (name, tensor) for name, tensor in model.state_dict(keep_vars=True).items()}
    text = config.get_text_config()
    frame = pixels.shape(spec, model, folder, config)
    max_positions = _max_positions(model, text) if frame is None else None
    tracer = folding.Tracer(model, {name: _module(model, name) for name in names}, folding.find_norms(model))
    inputs, outputs = _probe(spec, model, names, task, frame, tracer)

    layers = []
    groups = _fusion_groups(model, names, inputs, head)
    blocks = _blocks(model)
    stacks = experts.stacks(model)
    reach = _reach(stacks, inputs)
    for key, holders in shared.items():
        if not any(inputs[name] or reach.get(stacks.get(name)) for name in holders):
            continue
        name = next((name for name in holders if _module(model, name) is head), holders[0])
        module = _module(model, name)
        kind = _kind(module, head)
        shape = tuple(weights[name].shape)
        layers.append(
            Layer(
                name=name,
                kind=kind,
                out_features=shape[1] if kind == "conv1d" else shape[0],
                in_features=shape[0] if kind == "conv1d" else shape[1],
                dtype_bytes=getattr(torch, spec.dtype).itemsize,
                has_bias=getattr(module, "bias", None) is not None,
                tied=tuple(other for other in holders if other != name),
                fusion_group=stacks[name].rpartition(".")[0] if name in stacks else groups.get(name),
                block=_block(name, blocks),
                stack=stacks.get(name),
                reach=reach.get(stacks.get(name), 1.0),
            )
        )
        del stored[key]
    order = {name: index for index, name in enumerate(names)}
    layers.sort(key=lambda layer: order[layer.name])
    _refuse_mixed_dtypes(spec, model, layers)
    sources = tracer.sources(layers, outputs)
    layers = [dataclasses.replace(layer, source=sources.get(layer.name)) for layer in layers]
    images = None if frame is None else Images(*frame, tokens=_most_rows(inputs))
    return ModelInfo(
        architecture=type(model).__name__,
        task=task,
        dtype=spec.dtype,
        vocab_size=text.vocab_size if images is None else 0,
        max_positions=max_positions if images is None else images.tokens,
        layers=tuple(layers),
        other_bytes=sum(_nbytes(spec, model, name, tensor) for name, tensor in stored.values()),
        labels=tuple(str(config.id2label[i]) for i in range(config.num_labels)) if task == "classification" else (),
        caches=_caches(spec, model, blocks) if task == "causal" else (),
        images=images,
    )


def _weight_holders(model: nn.Module) -> list[str]:
    """Names of all modules that hold one weight matrix, in the model's order; those that may be routers too."""
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding) or _may_route(module)
    ]


def _may_route(module: nn.Module) -> bool:
    """Whether the module has a matrix of its own that it is not known to multiply its input with."""
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Linear | Conv1D | nn.Embedding)


def _module(model: nn.Module, name: str) -> Any:
    return model.get_submodule(name)


def _kind(module: nn.Module, head: nn.Module | None) -> LayerKind:
    if module is head:
        return "head"
    if isinstance(module, nn.Embedding):
        return "embedding"
    if _may_route(module):
        return "router"
    return "conv1d" if isinstance(module, Conv1D) else "linear"


class _ZeroLinear(TorchFunctionMode):
    """Every `F.linear` within gives zeros of the right shape. `routed` has those by one of the `weights`."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__()
        self._weights = {id(weight) for weight in weights}
        self.routed: list[tuple[Tensor, Tensor]] = []  # weight, product

    def product_of(self, weight: Tensor, outputs: Any) -> bool:
        """Whether a module's outputs, or the first of them, are a product by `weight` as it was made."""
        first = outputs[0] if isinstance(outputs, tuple) else outputs
        return any(made is first and by is weight for by, made in self.routed)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            x, weight = args[:2]
            product = x.new_zeros(*x.shape[:-1], weight.shape[0])
            if id(weight) in self._weights:
                self.routed.append((weight, product))
            return product
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _probe(
    spec: ModelSpec,
    model: nn.Module,
    names: Iterable[str],
    task: Task,
    shape: tuple[int, int, int] | None,
    tracer: folding.Tracer,
) -> tuple[dict[str, list[Tensor]], Any]:
    """Run a few tokens, or pixels of a `shape`, through the model and give back what each layer read, call by call, and
    the model's outputs.

    The model is taken over: its tensors become zeros that share one number each, and linear maps give
    zeros without multiplying, so a model of any size takes about a second and next to no memory. Real
    storage, unlike the meta device, answers models that look at values. The tensors are kept, so that
    equal identity means the same tensor.
    """
    model._apply(lambda tensor: torch.zeros((), dtype=tensor.dtype).expand(tensor.shape))  # type: ignore[no-untyped-call]
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}
    zeros = _ZeroLinear(_module(model, name).weight for name in names if _may_route(_module(model, name)))

    def routes(name: str, module: Any, outputs: Any) -> bool:
        # One that is kept in another format than the rest is no layer: it is nobody's to quantize.
        same = module.weight.dtype == getattr(torch, spec.dtype)
        kept = _kept_in_float32(model, spec.dtype, f"{name}.weight")
        return same and not kept and zeros.product_of(module.weight, outputs)

    def see(name: str, module: Any, read: tuple[Tensor, ...], outputs: Any) -> None:
        if not _may_route(module) or routes(name, module, outputs):
            inputs[name].append(read[0])

    for name in names:
        _module(model, name).register_forward_hook(functools.partial(see, name))
    tokens = torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64)
    arguments: dict[str, Any] = {"input_ids": tokens}
    if shape is not None:
        arguments = {"pixel_values": torch.zeros(1, *shape, dtype=getattr(torch, spec.dtype))}
    if task == "seq2seq":
        arguments["decoder_input_ids"] = tokens
    if task in ("causal", "seq2seq"):
        arguments["use_cache"] = False
    try:
        with zeros, tracer.following():
            outputs = model(**arguments)
    except Exception as problem:
        what = "token ids" if shape is None else "images"
        raise ModelRefused(
            f"model {spec.id!r}: {type(model).__name__} does not run on {what} alone: {first_line(problem)}"
        ) from problem
    return inputs, outputs


def _most_rows(inputs: dict[str, list[Tensor]]) -> int:
    """The length of an image as a sequence: the most rows that a layer read of it."""
    return max((read.numel() // read.shape[-1] for reads in inputs.values() for read in reads), default=1)


@torch.no_grad()
def _caches(spec: ModelSpec, model: nn.Module, blocks: dict[str, int]) -> tuple[Cache, ...]:
    """The KV caches of a model that the probe has taken over, by the keys and values that attention is given.

    None where an attention module has a way of its own (none is seen), sees others' keys, or runs more than once.
    """
    seen: dict[str, list[tuple[Tensor, Tensor, int | None]]] = collections.defaultdict(list)

    def see(name: str, keys: Tensor, values: Tensor, window: int | None) -> None:
        seen[name].append((keys, values, window))

    # A model is no module of its own: what it hands down must stay its own config.
    named = {n: m for n, m in model.named_modules() if caches.can_read(m) and not hasattr(m, "base_model_prefix")}
    for name, module in named.items():
        caches.install(module, None, functools.partial(see, name))
    try:
        with _ZeroLinear(()):
            model(input_ids=torch.zeros(1, _PROBE_TOKENS, dtype=torch.int64), use_cache=False)
    except Exception:  # whatever an architecture says to attention that is not its own
        return ()
    finally:
        for module in named.values():
            caches.remove(module)
    stored = [keys for calls in seen.values() for keys, _, _ in calls]
    if any(len(calls) > 1 for calls in seen.values()) or len({id(keys) for keys in stored}) < len(stored):
        return ()
    if any(keys.shape[2] != _PROBE_TOKENS for keys in stored):
        return ()
    return tuple(
        Cache(
            name=name,
            heads=keys.shape[1],
            key_width=keys.shape[3],
            value_width=values.shape[3],
            dtype_bytes=getattr(torch, spec.dtype).itemsize,
            window=window,
            block=_block(name, blocks),
        )
        for name, [(keys, values, window)] in seen.items()
    )


def _reach(stacks: dict[str, str], inputs: dict[str, list[Tensor]]) -> dict[str | None, float]:
    """Name of a 3-D parameter -> the share of tokens that one of its slices sees; 0 where it is not used at all."""
    rows: collections.Counter[str | None] = collections.Counter()
    experts_of: collections.Counter[str | None] = collections.Counter(stacks.values())
    for name, stack in stacks.items():
        rows[stack] += sum(len(read) for read in inputs[name])
    return {stack: rows[stack] / (count * _PROBE_TOKENS) for stack, count in experts_of.items()}


def _fusion_groups(
    model: nn.Module, names: Iterable[str], inputs: dict[str, list[Tensor]], head: nn.Module | None
) -> dict[str, str]:
    """Layer name -> group name, for linears that share parent module and inputs with another."""
    members: dict[tuple[str, tuple[int, ...]], list[str]] = collections.defaultdict(list)
    for name in names:
        module = _module(model, name)
        if inputs[name] and module is not head and isinstance(module, nn.Linear | Conv1D):
            members[name.rpartition(".")[0], tuple(map(id, inputs[name]))].append(name)
    groups = {}
    for (parent, _), together in members.items():
        if len(together) > 1:
            group = f"{parent}.{'+'.join(name.rpartition('.')[2] for name in together)}"
            groups.update(dict.fromkeys(together, group.removeprefix(".")))
    return groups


def _blocks(model: nn.Module) -> dict[str, int]:
    """Each outermost module list's name and the number of its first block; encoder before decoder."""
    first: dict[str, int] = {}
    count = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in first):
            first[name] = count
            count += len(module)
    return first


def _block(name: str, blocks: dict[str, int]) -> int | None:
    for outer, first in blocks.items():
        if name.startswith(f"{outer}."):
            return first + int(name.removeprefix(f"{outer}.").partition(".")[0])
    return None


def _max_positions(model: nn.Module, text: Any) -> int | None:
    """The longest input in tokens, or None for a model without a limit (T5).

    A learned table whose rows up to the padding row are not positions (RoBERTa's) is that much shorter.
    """
    limit = getattr(text, "max_position_embeddings", None)
    if not isinstance(limit, int) or limit < 1:
        return None
    inputs = model.get_input_embeddings()  # type: ignore[operator]
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not inputs and module.num_embeddings == limit:
            return limit if module.padding_idx is None else limit - module.padding_idx - 1
    return limit


def float32_patterns(model: Any, dtype: str) -> set[str]:
    """Name patterns of the parameters that transformers keeps in float32 under `dtype`."""
    kept = set(model._keep_in_fp32_modules_strict or ()) if dtype != "float32" else set()
    return kept | set(model._keep_in_fp32_modules or ()) if dtype == "float16" else kept


def _kept_in_float32(model: Any, dtype: str, name: str) -> bool:
    patterns = (re.escape(pattern).replace(r"\*", ".*") for pattern in float32_patterns(model, dtype))
    return any(re.search(pattern, name) for pattern in patterns)


def _refuse_mixed_dtypes(spec: ModelSpec, model: nn.Module, layers: Iterable[Layer]) -> None:
    for layer in layers:
        if _kept_in_float32(model, spec.dtype, f"{layer.name}.weight"):
            raise ModelRefused(
                f"model {spec.id!r}: {type(model).__name__} keeps {layer.name} in float32 where the rest is "
                f"{spec.dtype}; choose model.dtype {'bfloat16 or ' if spec.dtype == 'float16' else ''}float32"
            )


def _nbytes(spec: ModelSpec, model: nn.Module, name: str, tensor: Tensor) -> int:
    """Bytes of a stored tensor that is no layer: floats in the spec's dtype, others as they are."""
    if not tensor.is_floating_point():
        return tensor.numel() * tensor.element_size()
    return tensor.numel() * (4 if _kept_in_float32(model, spec.dtype, name) else getattr(torch, spec.dtype).itemsize)


def first_line(problem: BaseException) -> str:
    """The first line of what a library says; where that only announces the next one, both."""
    lines = [" ".join(line.split()) for line in str(problem).splitlines() if line.strip()]
    if not lines:
        return type(problem).__name__
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
