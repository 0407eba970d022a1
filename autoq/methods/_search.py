"""The best of several uniform grids for each group, channel or tensor, by weighted squared error."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from autoq.methods._uniform import encode, minmax_grid
from autoq.methods._weights import IntegerWeight, grid_shape, row_blocks
from autoq.scheme import Integer, PerTensor

# From the least and the greatest weight of each group (rows, groups): candidates of (scales, zeros), as they ship.
Grids = Callable[[Tensor, Tensor], Iterable[tuple[Tensor, Tensor]]]


def best_grid(weight: Tensor, scheme: Integer, grids: Grids, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(scales, zeros), each (rows, groups): those with the least Σ_j h_j (w_j - w'_j)²; the first of equal ones.

    `weight` is (out, in); `importance` is h (in,), of about 1; without it all inputs count alike.
    """
    rows, columns = weight.shape
    grid_rows, groups = grid_shape(scheme.granularity, (rows, columns))
    if isinstance(scheme.granularity, PerTensor):
        low, high = (end.float().view(1, 1) for end in torch.aminmax(weight))
        parts = [weight[block] for block in row_blocks(rows, columns)]
        return _choose(parts, low, high, scheme.bits, grids, importance)
    scales, zeros = torch.empty(grid_rows, groups), torch.empty(grid_rows, groups)
    for block in row_blocks(rows, columns):
        low, high = torch.aminmax(weight[block].float().view(-1, groups, columns // groups), dim=-1)
        scales[block], zeros[block] = _choose([weight[block]], low, high, scheme.bits, grids, importance)
    return scales, zeros


def plain_grid(weight: Tensor, scheme: Integer) -> tuple[Tensor, Tensor]:
    """(scales, zeros), each (rows, groups): those of rtn, over the whole range of each group."""
    if isinstance(scheme.granularity, PerTensor):
        low, high = (end.float().view(1, 1) for end in torch.aminmax(weight))
    else:
        rows, groups = grid_shape(scheme.granularity, (weight.shape[0], weight.shape[1]))
        low, high = torch.aminmax(weight.float().view(rows, groups, -1), dim=-1)
    return minmax_grid(low, high, scheme.bits, scheme.zero)


def values(weight: Tensor, scheme: Integer, scales: Tensor, zeros: Tensor) -> Tensor:
    """The levels nearest to `weight` (out, in) of a grid (rows, groups), float32: `nearest`, but not packed."""
    grouped = weight.float().view(len(weight), scales.shape[1], -1)
    codes = encode(grouped, scales[..., None], zeros[..., None], scheme.bits)
    return codes.sub_(zeros[..., None]).mul_(scales[..., None]).view_as(weight)


def unit_of(weight: Tensor) -> float:
    """The power of two that brings the largest number of `weight` to between 1/2 and 1, for sums of squares."""
    _, exponent = torch.frexp(weight.abs().max().float())
    return float(2.0 ** -max(int(exponent), -100))


def row_errors(delta: Tensor, moments: Tensor) -> Tensor:
    """(ΔW H ΔWᵀ)_ii of each row of `delta` (rows, in), with H `moments` (in, in)."""
    return (delta @ moments).mul_(delta).sum(1)


def nearest(
    weight: Tensor, scheme: Integer, scales: Tensor, zeros: Tensor, input_scales: Tensor | None = None
) -> IntegerWeight:
    """`weight` (out, in), which `input_scales` (in,) are in already, on the nearest levels of a grid (rows, groups)."""
    rows, columns = weight.shape
    codes = torch.empty(rows, columns, dtype=torch.uint8)
    for block in row_blocks(rows, columns):
        own = slice(None) if len(scales) == 1 else block
        grouped = weight[block].float().view(-1, scales.shape[1], columns // scales.shape[1])
        codes[block] = encode(grouped, scales[own, :, None], zeros[own, :, None], scheme.bits).view(-1, columns)
    return IntegerWeight.of(scheme, codes, scales, zeros, input_scales)


def _choose(
    parts: list[Tensor], low: Tensor, high: Tensor, bits: int, grids: Grids, importance: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The best candidate for rows that come in `parts`, each group with a grid of its own or all with one."""
    groups = low.shape[1]
    shares = None if importance is None else importance.view(groups, -1)
    # Errors are parts of the largest weight, whose square need not be a finite number.
    unit = torch.maximum(-low, high).clamp_(min=torch.finfo(torch.float32).tiny)
    best: tuple[Tensor, Tensor] | None = None
    least = torch.empty(0)
    for scale, zero in grids(low, high):
        error = torch.zeros(low.shape, dtype=torch.float64)
        for part in parts:
            grouped = part.float().view(len(part), groups, -1)
            coded = grouped / scale[..., None]
            off = coded.sub_((coded + zero[..., None]).round_().clamp_(0, 2**bits - 1).sub_(zero[..., None]))
            off.mul_((scale / unit)[..., None]).square_()
            if shares is not None:
                off.mul_(shares)
            error += off.sum(-1, dtype=torch.float64).sum_to_size(low.shape)
        if best is None:
            best, least = (scale, zero), error
            continue
        better = error < least
        best = torch.where(better, scale, best[0]), torch.where(better, zero, best[1])
        least = torch.minimum(least, error)
    assert best is not None
    return best
