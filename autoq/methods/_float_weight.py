"""Weights in floating-point codes, exactly as they ship: FP8 and FP4, microscaling formats, NVFP4."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.methods import QuantizedWeight
from autoq.methods._packing import unpack_rows
from autoq.scheme import Float, PerBlock

# Elements of 8 bits are dtypes of their own; narrower ones are packed.
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_SCALE_DTYPES = {"bfloat16": torch.bfloat16, "e8m0": torch.uint8, "e4m3": torch.float8_e4m3fn}
_MANTISSA_BITS = 23  # of float32


@functools.cache
def magnitudes(element: str) -> Tensor:
    """The numbers of a narrow element's codes without their signs, by code, which is ascending; float32.

    `eXmY` has X exponent bits of bias 2^(X-1) - 1 and Y mantissa bits, exponent 0 being subnormal (OCP
    Microscaling v1.0, section 5.3). None of the codes is infinite or NaN.
    """
    exponent_bits, mantissa_bits = int(element[1]), int(element[3])
    bias = 2 ** (exponent_bits - 1) - 1
    numbers = []
    for code in range(2 ** (exponent_bits + mantissa_bits)):
        exponent, mantissa = divmod(code, 2**mantissa_bits)
        numbers.append((mantissa / 2**mantissa_bits + (exponent > 0)) * 2.0 ** (max(exponent, 1) - bias))
    return torch.tensor(numbers)


def float_tensors(scheme: Float, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of the tensors that ship for a weight of `shape` (out, in)."""
    rows, columns = shape
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "codes": ((rows, (columns * scheme.bits + 7) // 8), DTYPES.get(scheme.form.element, torch.uint8)),
        "scales": (scheme.scale_grid(rows, columns), _SCALE_DTYPES[scheme.form.scale]),
    }
    return tensors | ({"global_scale": ((1,), torch.float32)} if scheme.format == "nvfp4" else {})


def power_of_two(exponents: Tensor) -> Tensor:
    """E8M0 codes as float32: 2^(code - 127). By bits, for the least of them is subnormal."""
    codes = exponents.to(torch.int32)
    return torch.where(codes > 0, codes << _MANTISSA_BITS, 1 << (_MANTISSA_BITS - 1)).view(torch.float32)


def multipliers(scheme: Float, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> Tensor:
    """What the codes are multiplied by, (out, groups) float32, each for in/groups consecutive inputs.

    `tensors` holds `scales` and, for nvfp4, `global_scale`. Where blocks do not divide a row, groups are
    as wide as what both have in common.
    """
    rows, columns = shape
    stored = tensors["scales"]
    scales = power_of_two(stored) if scheme.form.scale == "e8m0" else stored.float()
    if "global_scale" in tensors:
        scales = scales * tensors["global_scale"]
    if isinstance(scheme.granularity, PerBlock):
        high, wide = scheme.granularity.rows, scheme.granularity.columns
        common = math.gcd(columns, wide)
        scales = scales.repeat_interleave(wide // common, dim=1)[:, : columns // common]
        return scales.repeat_interleave(high, dim=0)[:rows]
    return scales.expand(rows, scales.shape[1])


@dataclass(frozen=True)
class FloatWeight(QuantizedWeight):
    """Floating-point levels: weight = scale * code.

    `tensors`: `codes` (out, in) float8_e4m3fn or float8_e5m2, or (out, ceil(in*bits/8)) uint8, a bit stream
    per row of codes whose highest bit is the sign; `scales` (rows, groups), as `Float.scale_grid` says:
    bfloat16, E8M0 exponents as uint8, or float8_e4m3fn for nvfp4, whose `global_scale` (1,) float32
    multiplies them.
    """

    def values(self) -> Tensor:
        """The codes as numbers, (out, in) float32, before any scale."""
        codes = self.tensors["codes"]
        if self._float.form.element in DTYPES:
            return codes.float()
        positive = magnitudes(self._float.form.element)
        index = unpack_rows(codes, self._float.bits, self.shape[1]).to(torch.int32)
        return torch.cat([positive, -positive]).index_select(0, index.view(-1)).view(self.shape)

    def scales(self) -> Tensor:
        """What each group's codes are multiplied by, (out, groups) float32."""
        return multipliers(self._float, self.shape, self.tensors)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        from autoq.methods._weights import to_dtype

        scales = self.scales()
        grouped = self.values().view(self.shape[0], scales.shape[1], -1)
        return to_dtype((grouped * scales[..., None]).view(self.shape), dtype)

    @property
    def _float(self) -> Float:
        assert isinstance(self.scheme, Float)
        return self.scheme
