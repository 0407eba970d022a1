"""Fixed tables of levels: the weight that ships, and the rounding that all such methods share.

    weight = scale * level[code]        s = max|w| of the group, rounded to bfloat16

The levels are the method's own, by width, ascending, from -1 to 1; no codebook ships. Every weight takes
the nearest level, of two the lower one. A group of zeros takes the least scale, so that no scale is zero.
For weights that are bfloat16 already max|w| is exact.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from autoq import plugins
from autoq.methods import Grid, Method, QuantizedWeight, Statistics
from autoq.methods._packing import pack_rows, unpack_rows
from autoq.methods._ruled import RuledMethod
from autoq.methods._uniform import MIN_SCALE, stored
from autoq.scheme import Levels, PerTensor, Scheme


class FixedLevels(RuledMethod):
    """A method whose levels are known before the weight is."""

    @abc.abstractmethod
    def levels(self, bits: int) -> Tensor:
        """The 2**bits levels, ascending, from -1 to 1 with 0 among them; float32."""

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        return None if isinstance(scheme, Levels) else f"{self.name} makes fixed levels only"

    def schemes(self, name: str, grid: Grid) -> Iterable[Scheme]:
        for bits in grid.bits:
            for granularity in grid.granularities:
                yield Levels(name, bits, granularity)

    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        from autoq.methods._weights import grid_shape, row_blocks

        assert isinstance(scheme, Levels)
        shape = rows, columns = weight.shape[0], weight.shape[1]
        grid_rows, groups = grid_shape(scheme.granularity, shape)
        per_tensor = isinstance(scheme.granularity, PerTensor)
        levels = self.levels(scheme.bits)
        borders = (levels[1:] + levels[:-1]) / 2
        scales, codes = torch.empty(grid_rows, groups), torch.empty(shape, dtype=torch.uint8)
        if per_tensor:
            scales.fill_(_scale(torch.stack(torch.aminmax(weight)).float().abs().amax()))
        for block in row_blocks(rows, columns):
            grouped = weight[block].float().view(-1, groups, columns // groups)
            if not per_tensor:
                scales[block] = _scale(grouped.abs().amax(-1))
            own = scales if per_tensor else scales[block]
            codes[block] = torch.bucketize(grouped / own[..., None], borders).view(-1, columns).to(torch.uint8)
        packed = {"codes": pack_rows(codes, scheme.bits), "scales": scales.to(torch.bfloat16)}
        return LevelsWeight(scheme, shape, packed)


def _scale(largest: Tensor) -> Tensor:
    return stored(largest).clamp_min_(MIN_SCALE)


@dataclass(frozen=True)
class LevelsWeight(QuantizedWeight):
    """Fixed levels: weight = scale * level[code].

    `tensors`: `codes` (out, ceil(in*bits/8)) uint8, a bit stream per row; `scales` (rows, groups) bfloat16.
    One scale for the whole tensor has rows = groups = 1.
    """

    def codes(self) -> Tensor:
        """The codes, (out, in) uint8, in 0 … 2**bits - 1."""
        return unpack_rows(self.tensors["codes"], self._levels.bits, self.shape[1])

    def scales(self) -> Tensor:
        """What each group's levels are multiplied by, (out, groups) float32."""
        scales = self.tensors["scales"].float()
        return scales.expand(self.shape[0], scales.shape[1])

    def codebook(self) -> Tensor:
        """What each group's codes stand for, (out, groups, 2**bits) float32, in units of the weight."""
        return self.scales()[..., None] * self._table()

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        from autoq.methods._weights import row_blocks, to_dtype

        (rows, columns), scales, table, codes = self.shape, self.scales(), self._table(), self.codes()
        result = torch.empty(self.shape, dtype=dtype)
        for block in row_blocks(rows, columns):
            levels = table.index_select(0, codes[block].to(torch.int32).view(-1))
            values = levels.view(-1, scales.shape[1], columns // scales.shape[1]).mul_(scales[block, :, None])
            result[block] = to_dtype(values.view(-1, columns), dtype)
        return result

    def _table(self) -> Tensor:
        method = plugins.load("methods", self._levels.method, Method)
        assert isinstance(method, FixedLevels), method
        return method.levels(self._levels.bits)

    @property
    def _levels(self) -> Levels:
        assert isinstance(self.scheme, Levels)
        return self.scheme
