"""Packed layers on PyTorch's CUDA kernels, each from the exact tensors that ship.

Every module computes y = x Wᵀ + bias for x (…, in) bfloat16. What each kernel demands: `_cuda_rules`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from autoq.errors import KernelMismatch, ModelRefused, SchemeRefused
from autoq.layer import Layer
from autoq.methods import QuantizedWeight
from autoq.methods._float_weight import FloatWeight
from autoq.models.loaded import LoadedModel
from autoq.targets._cuda_rules import CAPABILITY, Kernel, k_tiles, kernel_for
from autoq.targets._symmetric_activation import activation, encode
from autoq.targets._torch_cpu_assembly import TOLERANCE
from autoq.targets._torch_cpu_kernels import UniformWeight, signed_codes

_LEAST_ROWS = 17  # of `_int_mm`
_PADDED_ROWS = 32
_CHECK_ROWS = 5


class Int4Linear(nn.Module):
    """`_weight_int4pack_mm`: value = (code - 8) * scale + offset per group of `group` inputs.

    `packed` (out/8, in/(tiles·16), 32, tiles/2) int32 in the order of the tensor cores; `scales_offsets`
    (in/group, out, 2) bfloat16 with offset = (8 - zero) * scale.
    """

    def __init__(self, weight: UniformWeight, bias: Tensor | None, group: int, device: torch.device) -> None:
        super().__init__()
        tiles = k_tiles(weight.shape[1])
        assert tiles is not None
        codes = weight.codes().to(device)
        # Two codes a byte, the first in the high half.
        pairs = (codes[:, ::2] << 4 | codes[:, 1::2]).contiguous()
        self.packed = torch._convert_weight_to_int4pack(pairs, tiles)
        scales = weight.scales()
        both = torch.stack((scales, (8 - weight.zeros()) * scales), -1)
        repeats, rest = divmod(weight.shape[1], scales.shape[1] * group)
        assert rest == 0 and repeats > 0, (weight.shape, scales.shape, group)
        spread = both.repeat_interleave(repeats, 1).transpose(0, 1)
        self.scales_offsets = spread.to(torch.bfloat16).contiguous().to(device)
        self.group, self.bias = group, bias

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1]).contiguous()
        y = torch._weight_int4pack_mm(flat, self.packed, self.group, self.scales_offsets)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


class Int8Linear(nn.Module):
    """`_int_mm`: int8 codes (out, in) with a scale per row, inputs in int8 with a scale per token."""

    def __init__(self, weight: UniformWeight, bias: Tensor | None, device: torch.device) -> None:
        super().__init__()
        self.codes = signed_codes(weight).contiguous().to(device)
        self.scales = weight.scales()[:, 0].float().to(device)
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        codes, scales = encode(x.reshape(-1, x.shape[-1]), fp8=False)
        rows = codes.shape[0]
        if rows < _LEAST_ROWS:
            codes = F.pad(codes, (0, 0, 0, _PADDED_ROWS - rows))
        # The second operand is the transposed view: column-major, which cuBLAS is fast on.
        y = torch._int_mm(codes, self.codes.t())[:rows].float() * scales * self.scales
        y = y if self.bias is None else y + self.bias
        return y.to(x.dtype).view(*x.shape[:-1], -1)


class Fp8Linear(nn.Module):
    """`_scaled_mm`: E4M3 codes (out, in) with a scale per row, inputs in E4M3 with a scale per token."""

    def __init__(self, weight: FloatWeight, bias: Tensor | None, device: torch.device) -> None:
        super().__init__()
        self.codes = weight.tensors["codes"].contiguous().to(device)
        self.scales = weight.scales()[:, 0].float().contiguous().to(device)[None]
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        codes, scales = encode(x.reshape(-1, x.shape[-1]), fp8=True)
        y = torch._scaled_mm(
            codes, self.codes.t(), scale_a=scales, scale_b=self.scales, bias=self.bias, out_dtype=torch.bfloat16
        )
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def pack(kernel: Kernel, weight: QuantizedWeight, bias: Tensor | None, device: torch.device) -> nn.Module:
    """The module that runs `weight` on `kernel` and `device`."""
    if kernel.name == "fp8":
        assert isinstance(weight, FloatWeight), type(weight)
        return Fp8Linear(weight, bias, device)
    assert isinstance(weight, UniformWeight), type(weight)
    if kernel.name == "int8":
        return Int8Linear(weight, bias, device)
    assert kernel.name == "int4" and kernel.group is not None, kernel
    return Int4Linear(weight, bias, kernel.group, device)


def check_model(model: LoadedModel) -> None:
    """Refuse a model that is not on a CUDA device in bfloat16 (`ModelRefused`)."""
    if model.device.type != "cuda":
        raise ModelRefused(f"cuda times models on a GPU, and this one is on {model.device}; set workers.gpus to 1")
    if model.info.dtype != "bfloat16":
        raise ModelRefused(f"cuda runs models in bfloat16, not {model.info.dtype}; set model.dtype")


def packed_module(model: LoadedModel, layer: Layer, weight: QuantizedWeight) -> tuple[nn.Module, nn.Module, Kernel]:
    """The layer's module, the packed one that runs in its place, and the kernel.

    Raises `SchemeRefused` where there is no kernel for this layer or this GPU, `ModelRefused` for a module
    that is no plain linear map.
    """
    kernel = kernel_for(layer, weight.scheme)
    if isinstance(kernel, str):
        raise SchemeRefused(f"cuda cannot run {weight.scheme} on layer {layer.name}: {kernel}")
    (module,) = model.modules_of(layer)
    if type(module).forward not in (nn.Linear.forward, Conv1D.forward):
        raise ModelRefused(
            f"cuda has no kernel for layer {layer.name}: a {type(module).__name__} is no plain linear map"
        )
    needed = CAPABILITY.get(kernel.name, (0, 0))
    found = torch.cuda.get_device_capability(model.device)
    if found < needed:
        raise SchemeRefused(
            f"cuda cannot run {weight.scheme} here: the {kernel.name} kernel needs compute capability "
            f"{needed[0]}.{needed[1]}, and this GPU has {found[0]}.{found[1]}"
        )
    if kernel.name == "as-is":
        return module, module, kernel
    bias = getattr(module, "bias", None)
    return module, pack(kernel, weight, None if bias is None else bias.detach(), model.device), kernel


def assemble(
    model: LoadedModel, weights: Mapping[str, QuantizedWeight]
) -> tuple[list[tuple[nn.Module, Callable[..., Any]]], dict[str, Kernel]]:
    """The packed forwards of all quantized layers, checked, and the kernel of each layer.

    One layer of each distinct shape and scheme is checked. Raises `KernelMismatch` and as `packed_module`.
    """
    forwards: list[tuple[nn.Module, Callable[..., Any]]] = []
    kernels: dict[str, Kernel] = {}
    checked = set()
    for name, weight in weights.items():
        layer = model.info.layer(name)
        if kernel_for(layer, weight.scheme) == Kernel("as-is"):
            kernels[name] = Kernel("as-is")
            continue
        module, packed, kernels[name] = packed_module(model, layer, weight)
        key = (layer.out_features, layer.in_features, layer.has_bias, weight.scheme)
        if key not in checked:
            checked.add(key)
            check(layer, weight, packed, getattr(module, "bias", None), model.device)
        forwards.append((module, packed.forward))
    return forwards, kernels


@torch.no_grad()
def check(layer: Layer, weight: QuantizedWeight, packed: nn.Module, bias: Tensor | None, device: torch.device) -> None:
    """Compare a packed module with the dequantized weight in float32, on random input.

    The error is ‖y - y'‖ / ‖y'‖ over all outputs. Raises `KernelMismatch` naming layer, scheme and error.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(_CHECK_ROWS, layer.in_features, generator=generator).bfloat16()
    seen = x.float()
    scheme: Any = weight.scheme
    if scheme.activation is not None:
        seen = activation(scheme, None)(seen)
    expected = F.linear(seen, weight.dequantize(torch.float32), None if bias is None else bias.float().cpu())
    found = packed(x.to(device)).float().cpu()
    error = float((found - expected).norm()) / max(float(expected.norm()), 1e-30)
    if not error <= TOLERANCE:
        raise KernelMismatch(
            f"layer {layer.name} under {scheme}: the CUDA kernel is off by {error:.1e} from the dequantized weights; "
            f"at most {TOLERANCE:.1e} can be rounding"
        )
