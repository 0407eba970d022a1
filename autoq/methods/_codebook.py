"""Methods that cluster weights: what they share is everything but how much each input counts."""

from __future__ import annotations

import abc
from collections.abc import Iterable

import torch
from torch import Tensor

from autoq.methods import Grid, QuantizedWeight, Statistics
from autoq.methods._clusters import borders, fit
from autoq.methods._ruled import RuledMethod
from autoq.methods._weights import CodebookWeight, grid_shape, row_blocks
from autoq.scheme import Codebook, PerTensor, Scheme

SAMPLE = 1 << 22


class CodebookMethod(RuledMethod):
    """Codebooks of 2^bits centroids per group, channel or tensor."""

    @abc.abstractmethod
    def importance(self, scheme: Scheme, statistics: Statistics | None, inputs: int) -> Tensor | None:
        """How much the squared errors of each input's weights count, (in,) float32 above 0; None for alike."""

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not isinstance(scheme, Codebook):
            return f"{self.name} makes codebooks only"
        rows, groups = grid_shape(scheme.granularity, shape)
        shared = shape[0] * shape[1] // (rows * groups)
        if shared < 2**scheme.bits:
            return f"{2**scheme.bits} centroids for {shared} weights of shape {shape} are more than there are weights"
        return None

    def schemes(self, name: str, grid: Grid) -> Iterable[Scheme]:
        for bits in grid.bits:
            for granularity in grid.granularities:
                yield Codebook(name, bits, granularity)

    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        assert isinstance(scheme, Codebook)
        rows, columns = weight.shape
        book_rows, groups = grid_shape(scheme.granularity, (rows, columns))
        levels = 2**scheme.bits
        books = torch.empty(book_rows, groups, levels)
        codes = torch.empty(rows, columns, dtype=torch.uint8)
        counts = self.importance(scheme, statistics, columns)
        if isinstance(scheme.granularity, PerTensor):
            books[0] = fit(*_sample(weight, scheme.bits, counts))
        for block in row_blocks(rows, columns):
            values = weight[block].float()
            if isinstance(scheme.granularity, PerTensor):
                book, values = books[0], values.reshape(1, -1)
            else:
                values = values.reshape(-1, columns // groups)
                own = None if counts is None else counts.view(groups, -1).repeat(len(values) // groups, 1)
                book = fit(values, scheme.bits, own)
                books[block] = book.view(-1, groups, levels)
            codes[block] = torch.searchsorted(borders(book), values, out_int32=True).view(-1, columns).to(torch.uint8)
        return CodebookWeight.of(scheme, codes, books)


def _sample(weight: Tensor, bits: int, counts: Tensor | None) -> tuple[Tensor, int, Tensor | None]:
    """What one book for all is fitted to: at most `SAMPLE` evenly spaced weights and the two extremes, (1, n)."""
    flat = weight.reshape(-1)
    stride = -(-len(flat) // SAMPLE)
    chosen = torch.arange(0, len(flat), stride)
    if stride > 1:
        chosen = torch.cat([chosen, torch.stack([flat.argmin(), flat.argmax()])])
    own = None if counts is None else counts[chosen % weight.shape[1]].view(1, -1)
    return flat[chosen].float().view(1, -1), bits, own
