"""Assembling a model from packed kernels, without changing the model.

A module keeps its place, its weight and its hooks; only its `forward` is another function for as long
as the assembly is installed. So code that looks at `module.weight.dtype` still finds it, and taking
the assembly away is deleting an attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autoq.errors import KernelMismatch, ModelRefused, SchemeRefused
from autoq.layer import Layer
from autoq.methods import QuantizedWeight
from autoq.models.loaded import LoadedModel
from autoq.scheme import Integer
from autoq.targets._torch_cpu_kernels import (
    Int8Embedding,
    Int8Linear,
    ScaledInput,
    UniformWeight,
    dynamic_activation,
    pack,
)
from autoq.targets._torch_cpu_rules import Kernel, kernel_for

Forward = Callable[..., Any]
Chooser = Callable[[Layer], str]

# A result in bfloat16 is off by up to 2^-9 of itself, and so is each offset of an int4 group. Both are
# random; four times that is far above what they add up to and far below any wrong code, scale or order.
TOLERANCE = 4 * 2**-9
_CHECK_ROWS = 5  # a whole block of four rows of the kernels and a rest


def check_model(model: LoadedModel) -> None:
    """Refuse a model that is not on the CPU in a dtype that the kernels take (`ModelRefused`)."""
    if model.info.dtype not in ("bfloat16", "float32"):
        raise ModelRefused(
            f"torch-cpu runs models in bfloat16 or float32, not {model.info.dtype}, which it has no fast kernels for; "
            "set model.dtype"
        )
    if model.device.type != "cpu":
        raise ModelRefused(
            f"torch-cpu times models on the CPU, and this one is on {model.device}; set workers.gpus to 0"
        )


def kernel_of(layer: Layer, weight: QuantizedWeight) -> Kernel:
    """The kernel for a layer's quantized weight. Raises `SchemeRefused` where there is none."""
    kernel = kernel_for(layer, weight.scheme)
    if isinstance(kernel, str):
        raise SchemeRefused(f"torch-cpu cannot run {weight.scheme} on layer {layer.name}: {kernel}")
    return kernel


def _map_of(module: nn.Module, layer: Layer) -> str:
    """Whether a module is a plain linear map or a plain lookup, which is all that kernels replace."""
    forward = type(module).forward
    if forward in (nn.Linear.forward, Conv1D.forward):
        return "linear"
    # With `max_norm`, a lookup changes the weight that it reads.
    if forward == nn.Embedding.forward and getattr(module, "max_norm", None) is None:
        return "lookup"
    raise ModelRefused(
        f"torch-cpu has no kernel for layer {layer.name}: a {type(module).__name__} does more than a plain "
        "linear map or lookup; keep it"
    )


def packed_modules(
    model: LoadedModel, layer: Layer, weight: QuantizedWeight, kernel: Kernel, engine: Chooser
) -> list[tuple[nn.Module, nn.Module]]:
    """(module of the model, packed module that runs in its place) for a layer and all tied to it.

    A tied head and embedding share the packed codes.
    """
    assert isinstance(weight, UniformWeight), type(weight)
    # Only where it matters: finding the fastest engine for a shape takes time.
    name = engine(layer) if kernel.name == "int8-dynamic" else None
    found: list[tuple[nn.Module, nn.Module]] = []
    head: Int8Linear | None = None
    for module in model.modules_of(layer):
        packed: nn.Module
        if _map_of(module, layer) == "lookup":
            packed = Int8Embedding(head.codes, head.scales) if head else Int8Embedding.from_weight(weight)
        else:
            bias = getattr(module, "bias", None)
            packed = pack(kernel, weight, None if bias is None else bias.detach(), name)
            head = packed if isinstance(packed, Int8Linear) else None
            if kernel.scaled:
                packed = ScaledInput(packed, weight.tensors["input_scales"].float())
        found.append((module, packed))
    return found


@contextmanager
def installed(forwards: Sequence[tuple[nn.Module, Forward]]) -> Iterator[None]:
    """Let each module run another function as its `forward`, then its own again, whatever happens."""
    before = [(module, vars(module).get("forward")) for module, _ in forwards]
    try:
        for module, forward in forwards:
            module.forward = forward
        yield
    finally:
        for module, own in before:
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own


def assemble(
    model: LoadedModel, weights: Mapping[str, QuantizedWeight], engine: Chooser
) -> tuple[list[tuple[nn.Module, Forward]], dict[str, Kernel]]:
    """The packed forwards of all quantized layers, checked, and the kernel of each layer.

    One layer of each distinct shape and scheme is checked against its dequantized weights. Raises
    `KernelMismatch`, `SchemeRefused` or `ModelRefused`, naming the layer.
    """
    forwards: list[tuple[nn.Module, Forward]] = []
    kernels: dict[str, Kernel] = {}
    checked = set()
    for name, weight in weights.items():
        layer = model.info.layer(name)
        kernel = kernels[name] = kernel_of(layer, weight)
        if kernel.name == "as-is":
            continue
        pairs = packed_modules(model, layer, weight, kernel, engine)
        key = (layer.kind, layer.out_features, layer.in_features, layer.has_bias, weight.scheme)
        if key not in checked:
            checked.add(key)
            check(layer, weight, kernel, pairs)
        forwards += [(module, packed.forward) for module, packed in pairs]
    return forwards, kernels


@torch.no_grad()
def check(layer: Layer, weight: QuantizedWeight, kernel: Kernel, pairs: Sequence[tuple[nn.Module, nn.Module]]) -> None:
    """Compare packed modules with the dequantized weight in float32, on random input of the model's dtype.

    The error is ‖y - y'‖ / ‖y'‖ over all outputs. Raises `KernelMismatch` naming layer, scheme and error.
    """
    generator = torch.Generator().manual_seed(0)
    scales = weight.tensors["input_scales"].float() if kernel.scaled else torch.ones(1)
    dequantized = weight.dequantize(torch.float32)
    dynamic = isinstance(weight.scheme, Integer) and weight.scheme.activation is not None
    for module, packed in pairs:
        if isinstance(packed, Int8Embedding):
            ids = torch.randint(layer.out_features, (2, _CHECK_ROWS), generator=generator)
            found, expected = packed(ids), F.embedding(ids, dequantized)
        else:
            x = torch.randn(_CHECK_ROWS, layer.in_features, generator=generator)
            assert isinstance(module.weight, Tensor)
            x = x.to(module.weight.dtype)
            bias: Tensor | None = getattr(module, "bias", None)
            seen = dynamic_activation(x.float() / scales) * scales if dynamic else x.float()
            found = packed(x)
            expected = F.linear(seen, dequantized, None if bias is None else bias.float())
        error = _relative_error(found.float(), expected)
        if not error <= TOLERANCE:
            raise KernelMismatch(
                f"layer {layer.name} under {weight.scheme}: the {kernel} kernel is off by {error:.1e} from the "
                f"dequantized weights; at most {TOLERANCE:.1e} can be rounding"
            )


def _relative_error(found: Tensor, expected: Tensor) -> float:
    difference = float((found - expected).norm())
    size = float(expected.norm())
    return difference / size if size > 0 else difference
