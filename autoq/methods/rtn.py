"""Round to nearest: each group's range is cut into equal steps and every weight takes the nearest level.

The baseline of the field, as in Jacob et al., "Quantization and Training of Neural Networks for
Efficient Integer-Arithmetic-Only Inference" (2018), equations 1 to 3, and in compressed-tensors:

    q = clamp(round(w/s + z), 0, 2^b - 1)        w' = (q - z) s

    w  weight     s  scale     z  zero     q  codes     b  bits

Symmetric: s = max|w| / ((2^b - 1)/2), z = 2^(b-1). Otherwise the range is widened to hold 0, so that
zero stays zero, s = (max - min)/(2^b - 1) and z = round(-min/s), itself a code.

Where we differ: s is rounded to bfloat16 before the codes are chosen, and never below 2^-126. There is
no real zero point: with one, this method is hqq without its iterations, and hqq is never worse.
Floating-point formats are rounded to in `_floats`.
Exactly: zero weights stay zero; other weights move by at most half a step, or where the zero point or
the scale was rounded at the ends of the range, by at most one step more.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from autoq.errors import BadInput
from autoq.methods import Grid, QuantizedWeight, Statistics, _floats
from autoq.methods._ruled import RuledMethod
from autoq.methods._uniform import encode, minmax_grid
from autoq.methods._weights import IntegerWeight, grid_shape, row_blocks
from autoq.scheme import Float, Integer, PerTensor, Scheme


class RoundToNearest(RuledMethod):
    """Uniform integers over the range of each group, channel or tensor, and floating-point codes."""

    version = 2

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if isinstance(scheme, Float):
            return None
        if not isinstance(scheme, Integer):
            return "rtn makes integers and floats only"
        if scheme.zero == "real":
            return "rtn rounds its zero point to a code; choose from none, integer"
        return None

    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        if isinstance(scheme, Float):
            return _floats.quantize(weight, scheme)
        assert isinstance(scheme, Integer)
        rows, columns = weight.shape
        per_tensor = isinstance(scheme.granularity, PerTensor)
        grid_rows, groups = grid_shape(scheme.granularity, (rows, columns))
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        scales, zeros = torch.empty(grid_rows, groups), torch.empty(grid_rows, groups)
        if per_tensor:
            low, high = torch.aminmax(weight)
            scale, zero = minmax_grid(low.float(), high.float(), scheme.bits, scheme.zero)
            scales.fill_(scale)
            zeros.fill_(zero)
        for block in row_blocks(rows, columns):
            grouped = weight[block].float().reshape(-1, groups, columns // groups)
            if not per_tensor:
                scales[block], zeros[block] = minmax_grid(grouped.amin(-1), grouped.amax(-1), scheme.bits, scheme.zero)
            grid = slice(None) if per_tensor else block
            found = encode(grouped, scales[grid, :, None], zeros[grid, :, None], scheme.bits)
            codes[block] = found.view(-1, columns)
        return IntegerWeight.of(scheme, codes, scales, zeros)

    def schemes(self, name: str, grid: Grid) -> Iterable[Scheme]:
        """Uniform integers, and the grid's floating-point formats where its other axes hold them."""
        yield from super().schemes(name, grid)
        if "none" not in grid.zero_points:
            return
        granularities = (*grid.granularities, *grid.blocks)
        for format_, granularity, activation in itertools.product(grid.formats, granularities, grid.activations):
            with contextlib.suppress(BadInput):  # not of this format
                scheme = Float(name, format_, granularity, activation)
                if scheme.bits in grid.bits:
                    yield scheme
