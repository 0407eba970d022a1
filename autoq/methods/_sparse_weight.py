"""Pruned weights exactly as they ship: what is left of every row, and a bit per weight that says where.

For 2:4 two bits for the position of each weight left would take the same four bits for every four weights as the
bitmask does; the bitmask serves every pattern, and is how compressed-tensors' formats `sparse-bitmask` and
`sparse-24-bitmask` say it: bit i of a row, least significant first, is set where input i is left.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.methods import QuantizedWeight
from autoq.methods._packing import pack_rows, unpack_rows
from autoq.scheme import Integer, Sparse
from autoq.sparsity import TwoOfFour


@dataclass(frozen=True)
class SparseWeight(QuantizedWeight):
    """A pruned weight: zero where its mask has no bit.

    `tensors`: `mask` (out, ceil(in/8)) uint8; what is left of each row, in the order of its inputs, as `values`
    (out, kept) in the model's dtype, or as `codes` (out, ceil(kept*bits/8)) uint8, a bit stream per row, with the
    `scales` and `zeros` of an `IntegerWeight` of the same granularity.
    """

    @classmethod
    def of(cls, scheme: Sparse, mask: Tensor, weight: Tensor) -> SparseWeight:
        """Keep of `weight` (out, in) what `mask` (out, in) bool says: as many in every row as the scheme leaves."""
        assert scheme.inner is None, scheme
        rows, columns = weight.shape
        values = weight[mask].view(rows, scheme.pattern.kept(columns))
        return cls(scheme, (rows, columns), {"mask": pack_rows(mask.to(torch.uint8), 1), "values": values})

    @classmethod
    def of_integers(cls, scheme: Sparse, mask: Tensor, codes: Tensor, parameters: Mapping[str, Tensor]) -> SparseWeight:
        """The same with `codes` (out, in) uint8 and the `scales` and `zeros` of an `IntegerWeight`, as they ship."""
        assert scheme.inner is not None, scheme
        rows, columns = codes.shape
        left = codes[mask].view(rows, scheme.pattern.kept(columns))
        tensors = {"mask": pack_rows(mask.to(torch.uint8), 1), "codes": pack_rows(left, scheme.inner.bits)}
        return cls(scheme, (rows, columns), {**tensors, **parameters})

    def mask(self) -> Tensor:
        """Where weights are left, (out, in) bool."""
        return unpack_rows(self.tensors["mask"], 1, self.shape[1]).bool()

    def is_of_pattern(self) -> bool:
        """Whether the mask leaves what the scheme's pattern says: of every four inputs, or of every row."""
        run = 4 if isinstance(self._sparse.pattern, TwoOfFour) else self.shape[1]
        if self.shape[1] % run:
            return False
        return bool((self.mask().view(-1, run).sum(1) == self._sparse.pattern.kept(run)).all())

    def codes(self) -> Tensor:
        """The code of every weight, (out, in) uint8; where a weight was pruned, the code that stands for zero."""
        inner = self._inner
        zeros, mask = self.zeros().to(torch.uint8), self.mask()
        codes = zeros.repeat_interleave(self.shape[1] // zeros.shape[1], dim=1)
        codes[mask] = unpack_rows(self.tensors["codes"], inner.bits, self._kept).view(-1)
        return codes

    def scales(self) -> Tensor:
        """The step of each group, (out, groups) float32, in units of the weight."""
        scales = self.tensors["scales"].float()
        return scales.expand(self.shape[0], scales.shape[1])

    def zeros(self) -> Tensor:
        """The code that stands for zero in each group, (out, groups) float32."""
        bits, shape = self._inner.bits, self.tensors["scales"].shape
        if self._inner.zero == "none":
            zeros = torch.full(shape, float(2 ** (bits - 1)))
        else:
            zeros = unpack_rows(self.tensors["zeros"], bits, shape[1]).float()
        return zeros.expand(self.shape[0], shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        from autoq.methods._weights import to_dtype

        if self._sparse.inner is None:
            result = torch.zeros(self.shape, dtype=dtype)
            result[self.mask()] = to_dtype(self.tensors["values"].to(torch.float32, copy=True), dtype).view(-1)
            return result
        scales, zeros = self.scales()[:, :, None], self.zeros()[:, :, None]
        grouped = self.codes().view(self.shape[0], scales.shape[1], -1).float()
        return to_dtype(grouped.sub_(zeros).mul_(scales).view(self.shape), dtype)

    @property
    def _sparse(self) -> Sparse:
        assert isinstance(self.scheme, Sparse)
        return self.scheme

    @property
    def _inner(self) -> Integer:
        assert self._sparse.inner is not None
        return self._sparse.inner

    @property
    def _kept(self) -> int:
        return self._sparse.pattern.kept(self.shape[1])
