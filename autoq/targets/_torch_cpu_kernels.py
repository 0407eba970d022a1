"""Packed layers on PyTorch's CPU kernels, each from the exact tensors that ship.

Every module computes y = x Wᵀ + bias for x (…, in) of the model's dtype, W = (code - zero) * scale.
Shapes: codes (out, in), scales and zeros (out, groups). `ScaledInput` gives another module x over a scale (in,).
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from autoq.targets._torch_cpu_rules import Kernel

ENGINES = ("fbgemm", "onednn")  # `x86` is no third one: it hands over to one of these
_ALIGNMENT = 32  # bytes: the int8 kernel loads 16 bfloat16 activations at a time, aligned


@runtime_checkable
class UniformWeight(Protocol):
    """What the kernels need of a quantized weight: uniform levels, per group or row."""

    shape: tuple[int, int]

    def codes(self) -> Tensor:
        """(out, in) uint8."""

    def scales(self) -> Tensor:
        """(out, groups) float32."""

    def zeros(self) -> Tensor:
        """(out, groups) float32, in units of codes."""


def _rows(x: Tensor) -> Tensor:
    """`x` (…, in) as a contiguous, aligned matrix (m, in)."""
    flat = x.reshape(-1, x.shape[-1]).contiguous()
    # A slice of a larger tensor may start anywhere; the kernel would fault on it.
    return flat.clone() if flat.data_ptr() % _ALIGNMENT else flat


def signed_codes(weight: UniformWeight) -> Tensor:
    """Codes of a symmetric 8-bit weight as int8 (out, in), zero at 0."""
    zeros = weight.zeros()
    assert bool((zeros == 128).all()), "a symmetric 8-bit weight has its zero at code 128"
    return weight.codes().view(torch.int8) ^ -128  # code - 128, by flipping the top bit


class Int8Linear(nn.Module):
    """`_weight_int8pack_mm`: int8 codes (out, in), one bfloat16 scale per row."""

    codes: Tensor
    scales: Tensor
    bias: Tensor | None

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)
        self.register_buffer("bias", bias)

    @classmethod
    def from_weight(cls, weight: UniformWeight, bias: Tensor | None) -> Int8Linear:
        """Pack a symmetric 8-bit weight with one scale per row (or one for all)."""
        scales = weight.scales()
        assert scales.shape[1] == 1, scales.shape
        return cls(signed_codes(weight), scales[:, 0].to(torch.bfloat16), bias)

    def forward(self, x: Tensor) -> Tensor:
        y = torch._weight_int8pack_mm(_rows(x), self.codes, self.scales)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)


class Int8Embedding(nn.Module):
    """Lookup of int8 rows (tokens, width), each times its scale; may share its tensors with a head."""

    codes: Tensor
    scales: Tensor

    def __init__(self, codes: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("scales", scales)

    @classmethod
    def from_weight(cls, weight: UniformWeight) -> Int8Embedding:
        """Pack a symmetric 8-bit weight with one scale per row (or one for all)."""
        return cls(signed_codes(weight), weight.scales()[:, 0].to(torch.bfloat16))

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        scales = self.scales.index_select(0, flat)
        # int8 is exact in bfloat16, so the product is rounded once.
        rows = self.codes.index_select(0, flat).to(scales.dtype).mul_(scales[:, None])
        return rows.view(*ids.shape, -1)


class Int4Linear(nn.Module):
    """`_weight_int4pack_mm_for_cpu`: value = (code - 8) * scale + offset per group of `group` inputs.

    `packed` (out, in/2) uint8 in the kernel's own order; `scales_offsets` (in/group, out, 2) bfloat16
    with offset = (8 - zero) * scale, so symmetric, integer and real zero points all run.
    """

    packed: Tensor
    scales_offsets: Tensor
    bias: Tensor | None

    def __init__(self, packed: Tensor, scales_offsets: Tensor, group: int, bias: Tensor | None) -> None:
        super().__init__()
        self.group = group
        self.register_buffer("packed", packed)
        self.register_buffer("scales_offsets", scales_offsets)
        self.register_buffer("bias", bias)

    @classmethod
    def from_weight(cls, weight: UniformWeight, bias: Tensor | None, group: int) -> Int4Linear:
        """Pack a 4-bit weight whose scales are each shared by a multiple of `group` inputs."""
        scales = weight.scales()
        offsets = (8 - weight.zeros()) * scales
        repeats, rest = divmod(weight.shape[1], scales.shape[1] * group)
        assert rest == 0 and repeats > 0, (weight.shape, scales.shape, group)
        pairs = torch.stack((scales, offsets), -1).repeat_interleave(repeats, 1)
        packed = torch._convert_weight_to_int4pack_for_cpu(weight.codes().to(torch.int32), 1)
        return cls(packed, pairs.transpose(0, 1).to(torch.bfloat16).contiguous(), group, bias)

    def forward(self, x: Tensor) -> Tensor:
        y = torch._weight_int4pack_mm_for_cpu(_rows(x), self.packed, self.group, self.scales_offsets)
        if self.bias is not None:
            y += self.bias
        return y.view(*x.shape[:-1], -1)


@contextmanager
def _engine(name: str) -> Iterator[None]:
    """`linear_prepack` packs for the engine that is set; the packed weight then remembers it."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = name
    try:
        with warnings.catch_warnings():
            # Packing starts from a quantized tensor, and PyTorch announces their end at every use.
            warnings.filterwarnings("ignore", message=r"torch\.quantize_per_tensor", category=UserWarning)
            yield
    finally:
        torch.backends.quantized.engine = before


class DynamicLinear(nn.Module):
    """`quantized.linear_dynamic`: int8 codes, activations quantized per call to 8 bits per tensor.

    The kernel takes and gives float32; other dtypes are converted on the way in and out.
    """

    def __init__(self, codes: Tensor, scales: Tensor, bias: Tensor | None, engine: str) -> None:
        super().__init__()
        with _engine(engine):
            zeros = torch.zeros(len(scales), dtype=torch.int64)
            quantized = torch._make_per_channel_quantized_tensor(codes, scales.double(), zeros, 0)
            bias = None if bias is None else bias.float()
            self.packed: Any = torch.ops.quantized.linear_prepack(quantized, bias)
        self.engine = engine
        self.reduced = reduced_range()
        self._kernel: Any = torch.ops.quantized.linear_dynamic.default

    @classmethod
    def from_weight(cls, weight: UniformWeight, bias: Tensor | None, engine: str) -> DynamicLinear:
        """Pack a symmetric 8-bit weight with one scale per row (or one for all) for `engine`."""
        scales = weight.scales()
        assert scales.shape[1] == 1, scales.shape
        return cls(signed_codes(weight), scales[:, 0], bias, engine)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self._kernel(x.float(), self.packed, self.reduced)
        return y.to(x.dtype)


class ScaledInput(nn.Module):
    """y = f(x / s) for a packed module f and scales s (in,), float32.

    f gets a float32 input where it takes one, and otherwise one that was rounded to the dtype of x.
    """

    scales: Tensor

    def __init__(self, packed: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.packed = packed
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        divided = x.float().div_(self.scales) if x.dtype != torch.float32 else x / self.scales
        y: Tensor = self.packed(divided if isinstance(self.packed, DynamicLinear) else divided.to(x.dtype))
        return y.to(x.dtype)


def engines() -> list[str]:
    """The engines of `linear_dynamic` that this build of PyTorch has."""
    return [name for name in ENGINES if name in torch.backends.quantized.supported_engines]


@functools.cache
def reduced_range() -> bool:
    """Whether activations must keep to 7 bits on this machine.

    Without VNNI instructions the kernels add pairs of 8 × 8-bit products in 16 bits, which saturates
    beyond 7 × 8 bits (fbgemm, "reduce_range"). Asked of every engine, with the largest operands there
    are, because environment variables can take instructions away. One answer for all engines: the
    numbers that a model computes must not depend on which of them is faster.
    """
    codes = torch.full((64, 64), 127, dtype=torch.int8)
    x = torch.ones(2, 64)
    for name in engines():
        with _engine(name):
            weight = torch._make_per_channel_quantized_tensor(
                codes, torch.ones(64, dtype=torch.float64), torch.zeros(64, dtype=torch.int64), 0
            )
            packed = torch.ops.quantized.linear_prepack(weight, None)
        y = torch.ops.quantized.linear_dynamic(x, packed, False)
        if not torch.allclose(y, torch.full_like(y, 64 * 127.0), rtol=1e-3):
            return True
    return False


def dynamic_activation(x: Tensor) -> Tensor:
    """What `linear_dynamic` does to its input: 8-bit affine rounding over the range of the whole tensor.

    Same shape and dtype out. The range is widened to hold 0; with `reduced_range` it is cut into 127
    steps instead of 255. A tensor with NaN or infinity comes back as it is: its outcome is not finite
    in any case. Source: quant_utils::ChooseQuantizationParams in
    aten/src/ATen/native/quantized/cpu/QuantUtils.h.
    """
    wide = x.float()
    low, high = (end.item() for end in torch.aminmax(wide.detach()))
    if not (math.isfinite(low) and math.isfinite(high)):
        return x
    scale, zero = torch._choose_qparams_per_tensor(wide, reduced_range())
    return torch.fake_quantize_per_tensor_affine(wide, scale, zero, 0, 255).to(x.dtype)


def pack(kernel: Kernel, weight: UniformWeight, bias: Tensor | None, engine: str | None) -> nn.Module:
    """The module that runs `weight` on `kernel`; `engine` is for int8-dynamic and only for it."""
    match kernel.name:
        case "int8":
            return Int8Linear.from_weight(weight, bias)
        case "int8-dynamic":
            assert engine is not None
            return DynamicLinear.from_weight(weight, bias, engine)
        case "int4":
            assert kernel.group is not None
            return Int4Linear.from_weight(weight, bias, kernel.group)
        case _:
            raise AssertionError(f"{kernel} packs nothing")
