"""Pruning one layer: the least important weights of every row become zero, and the rest may be quantized.

A method says how important each weight is; this says which weights that leaves. Two patterns:

    2:4            the two most important of every four consecutive inputs
    unstructured   of a row of n inputs the n - floor(n p/100) most important

Ties go to the later input, as in the stable sort of Wanda's own code. What is left stays as it is or is quantized
as rtn quantizes the pruned weight: its range is widened to hold 0, so zero is a code and pruned weights come back
as exact zeros also from a kernel that unpacks the whole row.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterable

import torch
from torch import Tensor

from autoq.methods import Grid, QuantizedWeight, Statistics
from autoq.methods._ruled import RuledMethod
from autoq.methods._sparse_weight import SparseWeight
from autoq.methods._weights import IntegerWeight, row_blocks
from autoq.methods.rtn import RoundToNearest
from autoq.scheme import Integer, Scheme, Sparse
from autoq.sparsity import Pattern, TwoOfFour


class PruningMethod(RuledMethod):
    """Everything about pruning but what makes a weight important."""

    @abc.abstractmethod
    def input_norms(self, scheme: Sparse, inputs: int, statistics: Statistics | None) -> Tensor:
        """What each input's weights are multiplied by, (in,) float64, not negative, to compare their magnitudes."""

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if not isinstance(scheme, Sparse):
            return f"{self.name} makes pruned weights only"
        if isinstance(scheme.pattern, TwoOfFour):
            return f"2:4 needs inputs in fours, not {shape[1]} as of shape {shape}" if shape[1] % 4 else None
        if scheme.pattern.kept(shape[1]) == shape[1]:
            return f"{scheme.pattern} % of the {shape[1]} inputs of shape {shape} is less than one"
        return None

    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        assert isinstance(scheme, Sparse)
        mask = torch.empty(weight.shape, dtype=torch.bool)
        norms = self.input_norms(scheme, weight.shape[1], statistics)
        for block in row_blocks(*weight.shape):
            mask[block] = most_important(weight[block].double().abs(), norms, scheme.pattern)
        if scheme.inner is None:
            return SparseWeight.of(scheme, mask, weight)
        whole = RoundToNearest().quantize(torch.where(mask, weight, 0), scheme.inner)
        assert isinstance(whole, IntegerWeight)
        parameters = {name: tensor for name, tensor in whole.tensors.items() if name != "codes"}
        return SparseWeight.of_integers(scheme, mask, whole.codes(), parameters)

    def schemes(self, name: str, grid: Grid) -> Iterable[Scheme]:
        """Every sparsity of the grid with every width, granularity and zero point that is a code, and where the
        methods hold `keep` with what is left as it is."""
        for pattern in grid.sparsity:
            if "keep" in grid.methods:
                yield Sparse(name, pattern)
            for bits, granularity, zero in itertools.product(grid.bits, grid.granularities, grid.zero_points):
                if zero != "real":
                    yield Sparse(name, pattern, Integer("rtn", bits, granularity, zero))


def most_important(magnitudes: Tensor, norms: Tensor, pattern: Pattern) -> Tensor:
    """Which weights `pattern` leaves, (rows, in) bool, of `magnitudes` (rows, in) and `norms` (in,) float64.

    Where inputs have no norm at all, so that their products are all zero, the magnitude decides among them.
    """
    rows, columns = magnitudes.shape
    run = 4 if isinstance(pattern, TwoOfFour) else columns
    pruned = run - pattern.kept(run)
    scores = (magnitudes * norms).view(-1, run)
    if bool((norms == 0).any()):
        first = magnitudes.view(-1, run).argsort(dim=1, stable=True)
        order = first.gather(1, scores.gather(1, first).argsort(dim=1, stable=True))
    else:
        order = scores.argsort(dim=1, stable=True)
    mask = torch.ones(scores.shape, dtype=torch.bool)
    return mask.scatter_(1, order[:, :pruned], False).view(rows, columns)
