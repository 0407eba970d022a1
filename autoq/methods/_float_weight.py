"""Weights in floating-point codes, exactly as they ship: FP8, MXFP4, NVFP4."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.methods import QuantizedWeight
from autoq.scheme import Float, PerTensor

# E2M1 has one sign, two exponent and one mantissa bit: code & 7 is the magnitude, code & 8 the sign.
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
_MANTISSA_BITS = 23  # of float32


def float_tensors(scheme: Float, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of the tensors that ship for a weight of `shape` (out, in)."""
    rows, columns = shape
    if scheme.format == "fp8":
        scales = 1 if isinstance(scheme.granularity, PerTensor) else rows
        return {"codes": (shape, torch.float8_e4m3fn), "scales": ((scales, 1), torch.bfloat16)}
    codes = ((rows, (columns + 1) // 2), torch.uint8)
    if scheme.format == "mxfp4":
        return {"codes": codes, "scales": ((rows, columns // 32), torch.uint8)}
    return {
        "codes": codes,
        "scales": ((rows, columns // 16), torch.float8_e4m3fn),
        "global_scale": ((1,), torch.float32),
    }


def power_of_two(exponents: Tensor) -> Tensor:
    """E8M0 codes as float32: 2^(code - 127). By bits, for the least of them is subnormal."""
    codes = exponents.to(torch.int32)
    return torch.where(codes > 0, codes << _MANTISSA_BITS, 1 << (_MANTISSA_BITS - 1)).view(torch.float32)


@dataclass(frozen=True)
class FloatWeight(QuantizedWeight):
    """Floating-point levels: weight = scale * code.

    `tensors`: `codes` (out, in) float8_e4m3fn, or E2M1 codes two a byte, the first in the low half;
    `scales` (rows, groups): bfloat16 for fp8, E8M0 exponents for mxfp4, float8_e4m3fn for nvfp4, whose
    `global_scale` (1,) float32 multiplies them.
    """

    def values(self) -> Tensor:
        """The codes as numbers, (out, in) float32, before any scale."""
        codes = self.tensors["codes"]
        if self._float.format == "fp8":
            return codes.float()
        pairs = torch.stack([codes & 15, codes >> 4], dim=-1).view(codes.shape[0], -1)[:, : self.shape[1]]
        magnitude = E2M1[(pairs & 7).long()]
        return torch.where(pairs & 8 > 0, -magnitude, magnitude)

    def scales(self) -> Tensor:
        """What each group's codes are multiplied by, (out, groups) float32."""
        stored = self.tensors["scales"]
        scales = power_of_two(stored) if self._float.format == "mxfp4" else stored.float()
        if "global_scale" in self.tensors:
            scales = scales * self.tensors["global_scale"]
        return scales.expand(self.shape[0], scales.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        from autoq.methods._weights import to_dtype

        scales = self.scales()
        grouped = self.values().view(self.shape[0], scales.shape[1], -1)
        return to_dtype((grouped * scales[..., None]).view(self.shape), dtype)

    @property
    def _float(self) -> Float:
        assert isinstance(self.scheme, Float)
        return self.scheme
