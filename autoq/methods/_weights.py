"""What methods give back: one class per kind of scheme, holding exactly the tensors that ship."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from autoq.errors import SchemeRefused
from autoq.methods import QuantizedWeight
from autoq.methods._float_weight import FloatWeight, float_tensors
from autoq.methods._gguf_weight import GgufWeight, gguf_tensors
from autoq.methods._levels import LevelsWeight
from autoq.methods._packing import pack_rows, unpack_rows
from autoq.methods._sparse_weight import SparseWeight
from autoq.scheme import Codebook, Float, Gguf, Granularity, Integer, Keep, Levels, PerGroup, PerTensor, Scheme, Sparse

FOLDED = "folded_scales"  # the one tensor of a quantized weight that does not ship

# Elements per block of rows: a block's float32 temporaries stay in a core's cache.
BLOCK_ELEMENTS = 1 << 18


def row_blocks(rows: int, columns: int) -> Iterator[slice]:
    """Slices of whole rows that cover `rows`, of about `BLOCK_ELEMENTS` elements each."""
    step = max(1, BLOCK_ELEMENTS // columns)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def grid_shape(granularity: Granularity, shape: tuple[int, int]) -> tuple[int, int]:
    """(rows, groups per row) of the parameters that ship for a weight of `shape` (out, in)."""
    if isinstance(granularity, PerTensor):
        return 1, 1
    return shape[0], shape[1] // granularity.size if isinstance(granularity, PerGroup) else 1


def to_dtype(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` float32 rounded to `dtype`; what lies beyond its range becomes its largest number."""
    limit = torch.finfo(dtype).max
    return values.clamp_(-limit, limit).to(dtype)


def _saturates(peak: float, dtype: torch.dtype) -> bool:
    """Whether numbers up to `peak` might not fit `dtype`. NaN and infinity count as not fitting."""
    return not peak < torch.finfo(dtype).max / 2


@dataclass(frozen=True)
class KeptWeight(QuantizedWeight):
    """The weight itself. `tensors`: `weight` (out, in) in the dtype it came in."""

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.tensors["weight"].to(dtype)


@dataclass(frozen=True)
class IntegerWeight(QuantizedWeight):
    """Uniform levels: weight = (code - zero) * scale, over the input's scale where the scheme scales inputs.

    `tensors`: `codes` (out, ceil(in*bits/8)) uint8, a bit stream per row; `scales` (rows, groups)
    bfloat16; `zeros`, packed like the codes if integer, (rows, groups) bfloat16 if real, absent if
    symmetric; `input_scales` (in,) bfloat16, positive, of schemes that scale inputs. Of a folded scheme these are
    `folded_scales`, powers of two: they do not ship, and are gone where they are folded. Codes are unsigned; a
    symmetric code has its zero at 2**(bits-1). One scale for the whole tensor has rows = groups = 1.
    """

    @classmethod
    def of(
        cls,
        scheme: Integer,
        codes: Tensor,
        scales: Tensor,
        zeros: Tensor | None = None,
        input_scales: Tensor | None = None,
    ) -> IntegerWeight:
        """Pack `codes` (out, in) uint8, `scales` and `zeros` (rows, groups) in code units, `input_scales` (in,).

        Scales and real zeros must already be bfloat16 numbers and integer zeros codes, whatever dtype
        carries them: packing rounds nothing.
        """
        shape = (codes.shape[0], codes.shape[1])
        assert scales.shape == grid_shape(scheme.granularity, shape), (scheme, shape, scales.shape)
        tensors = {"codes": pack_rows(codes, scheme.bits), "scales": _exactly_bfloat16(scales)}
        if scheme.zero != "none":
            assert zeros is not None and zeros.shape == scales.shape, scheme
            real = scheme.zero == "real"
            tensors["zeros"] = _exactly_bfloat16(zeros) if real else pack_rows(zeros.to(torch.uint8), scheme.bits)
        if scheme.scales_inputs:
            assert input_scales is not None and input_scales.shape == shape[1:], scheme
            tensors[FOLDED if scheme.folded else "input_scales"] = _exactly_bfloat16(input_scales)
        return cls(scheme, shape, tensors)

    def codes(self) -> Tensor:
        """The codes, (out, in) uint8, in 0 … 2**bits - 1."""
        return unpack_rows(self.tensors["codes"], self._integer.bits, self.shape[1])

    def scales(self) -> Tensor:
        """The step of each group, (out, groups) float32, in units of the weight."""
        return self._per_row(self.tensors["scales"].float())

    def zeros(self) -> Tensor:
        """The code, maybe fractional, that stands for zero in each group, (out, groups) float32."""
        return self._per_row(self._zeros())

    def input_scales(self) -> Tensor | None:
        """What each input is to be divided by before it meets the codes, (in,) float32; None where nothing is."""
        scales = self.tensors.get(FOLDED, self.tensors.get("input_scales"))
        return None if scales is None else scales.float()

    @property
    def nbytes(self) -> int:
        """See `QuantizedWeight.nbytes`: scales that are folded elsewhere are none of them."""
        return super().nbytes - (self.tensors[FOLDED].nbytes if FOLDED in self.tensors else 0)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        scheme, (rows, columns) = self._integer, self.shape
        inputs = self.input_scales()
        scales, zeros = self.scales()[:, :, None], self.zeros()[:, :, None]
        codes = self.codes()
        peak = scales.abs().max().item() * (2**scheme.bits + zeros.abs().max().item())
        saturate = _saturates(peak if inputs is None else peak / inputs.min().item(), dtype)
        result = torch.empty(self.shape, dtype=dtype)
        for block in row_blocks(rows, columns):
            grouped = codes[block].view(-1, scales.shape[1], columns // scales.shape[1])
            values = grouped.to(torch.float32).sub_(zeros[block]).mul_(scales[block]).view(-1, columns)
            if inputs is not None:
                values.div_(inputs)
            result[block] = to_dtype(values, dtype) if saturate else values
        return result

    @property
    def _integer(self) -> Integer:
        assert isinstance(self.scheme, Integer)
        return self.scheme

    def _zeros(self) -> Tensor:
        scheme = self._integer
        if scheme.zero == "none":
            return torch.full(self.tensors["scales"].shape, float(2 ** (scheme.bits - 1)))
        if scheme.zero == "real":
            return self.tensors["zeros"].float()
        return unpack_rows(self.tensors["zeros"], scheme.bits, self.tensors["scales"].shape[1]).float()

    def _per_row(self, parameters: Tensor) -> Tensor:
        return parameters.expand(self.shape[0], parameters.shape[1])


@dataclass(frozen=True)
class CodebookWeight(QuantizedWeight):
    """Free levels: weight = centroid[code].

    `tensors`: `codes` (out, ceil(in*bits/8)) uint8, a bit stream per row; `codebook`
    (rows, groups, 2**bits) bfloat16, ascending. One book for the whole tensor has rows = groups = 1.
    """

    @classmethod
    def of(cls, scheme: Codebook, codes: Tensor, codebook: Tensor) -> CodebookWeight:
        """Pack `codes` (out, in) uint8 and `codebook` (rows, groups, 2**bits) of bfloat16 numbers."""
        shape = (codes.shape[0], codes.shape[1])
        assert codebook.shape == (*grid_shape(scheme.granularity, shape), 2**scheme.bits), (scheme, codebook.shape)
        return cls(scheme, shape, {"codes": pack_rows(codes, scheme.bits), "codebook": _exactly_bfloat16(codebook)})

    def codes(self) -> Tensor:
        """The codes, (out, in) uint8, in 0 … 2**bits - 1."""
        assert isinstance(self.scheme, Codebook)
        return unpack_rows(self.tensors["codes"], self.scheme.bits, self.shape[1])

    def codebook(self) -> Tensor:
        """The centroids of each group, (out, groups, 2**bits) float32, in units of the weight."""
        books = self.tensors["codebook"].float()
        return books.expand(self.shape[0], *books.shape[1:])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        stored = self.tensors["codebook"]
        # Rounding the few centroids is rounding every weight that they stand for.
        books = to_dtype(stored.float(), dtype)
        rows, columns = self.shape
        groups, levels = books.shape[1:]
        codes = self.codes()
        result = torch.empty(self.shape, dtype=dtype)
        for block in row_blocks(rows, columns):
            index = codes[block].to(torch.int32)
            flat = books.view(-1)
            if stored.shape[0] * groups > 1:
                flat = books[block].reshape(-1)
                first = torch.arange(0, len(flat), levels, dtype=torch.int32).view(-1, groups, 1)
                index = (index.view(-1, groups, columns // groups) + first).view(-1, columns)
            result[block] = flat.index_select(0, index.view(-1)).view(-1, columns)
        return result


def restore(scheme: Scheme, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantizedWeight:
    """The quantized weight that stored `tensors` belong to: the inverse of `.tensors`.

    Raises `SchemeRefused` where the tensors are not those of `scheme` at this shape, so that what
    comes from outside never reaches an assertion.
    """
    kept = tensors.get("weight", tensors.get("values"))
    expected = expected_tensors(scheme, shape, torch.float32 if kept is None else kept.dtype)
    found = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if isinstance(scheme, Integer) and scheme.folded and FOLDED in tensors:
        expected = expected | {FOLDED: (shape[1:], torch.bfloat16)}
    if found != expected:
        raise SchemeRefused(f"tensors {found} are not those of {scheme} for shape {shape}, which are {expected}")
    match scheme:
        case Keep():
            return KeptWeight(scheme, shape, tensors)
        case Integer():
            return IntegerWeight(scheme, shape, tensors)
        case Levels():
            return LevelsWeight(scheme, shape, tensors)
        case Codebook():
            return CodebookWeight(scheme, shape, tensors)
        case Float():
            return FloatWeight(scheme, shape, tensors)
        case Gguf():
            return GgufWeight(scheme, shape, tensors)
        case Sparse():
            pruned = SparseWeight(scheme, shape, tensors)
            if not pruned.is_of_pattern():
                raise SchemeRefused(f"the mask for shape {shape} does not leave what {scheme} does")
            return pruned


def expected_tensors(
    scheme: Scheme, shape: tuple[int, int], kept: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name -> (shape, dtype) of the tensors that ship for a weight of `shape`; `kept` is the dtype of numbers
    that stay as they are."""
    if isinstance(scheme, Keep):
        return {"weight": (shape, kept)}
    if isinstance(scheme, Float):
        return float_tensors(scheme, shape)
    if isinstance(scheme, Gguf):
        return gguf_tensors(scheme, shape)
    if isinstance(scheme, Sparse):
        return _sparse_tensors(scheme, shape, kept)
    rows, groups = grid_shape(scheme.granularity, shape)
    codes = ((shape[0], math.ceil(shape[1] * scheme.bits / 8)), torch.uint8)
    if isinstance(scheme, Codebook):
        return {"codes": codes, "codebook": ((rows, groups, 2**scheme.bits), torch.bfloat16)}
    parameters = ((rows, groups), torch.bfloat16)
    if isinstance(scheme, Levels):
        return {"codes": codes, "scales": parameters}
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": codes, "scales": parameters}
    if scheme.zero == "real":
        tensors["zeros"] = parameters
    elif scheme.zero == "integer":
        tensors["zeros"] = ((rows, math.ceil(groups * scheme.bits / 8)), torch.uint8)
    if scheme.ships_input_scales:
        tensors["input_scales"] = (shape[1:], torch.bfloat16)
    return tensors


def _sparse_tensors(
    scheme: Sparse, shape: tuple[int, int], kept: torch.dtype
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    left = scheme.pattern.kept(shape[1])
    mask = {"mask": ((shape[0], math.ceil(shape[1] / 8)), torch.uint8)}
    if scheme.inner is None:
        return {**mask, "values": ((shape[0], left), kept)}
    codes = {"codes": ((shape[0], math.ceil(left * scheme.inner.bits / 8)), torch.uint8)}
    return {**expected_tensors(scheme.inner, shape, kept), **mask, **codes}


def _exactly_bfloat16(parameters: Tensor) -> Tensor:
    stored = parameters.to(torch.bfloat16).contiguous()
    assert torch.equal(stored.to(parameters.dtype), parameters), "parameters must be rounded before codes are chosen"
    return stored
