"""Quantization methods: one file each, and what they all give back.

A method turns a weight of shape (out, in) into a `QuantizedWeight`: the exact tensors that ship, and
the way back to numbers. To add one, write `autoq/methods/NAME.py` with one subclass of `Method`; the
contract tests enrol it by themselves.
"""

from __future__ import annotations

import abc
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from autoq.layer import Layer
from autoq.scheme import Activation, FloatFormat, Granularity, Integer, PerBlock, Scheme, ZeroPoint
from autoq.sparsity import Pattern


@dataclass(frozen=True)
class Grid:
    """The axes that a search space is spanned by; each method makes its own schemes from them."""

    methods: tuple[str, ...]
    bits: tuple[int, ...]
    granularities: tuple[Granularity, ...]
    zero_points: tuple[ZeroPoint, ...]
    activations: tuple[Activation | None, ...] = (None,)
    formats: tuple[FloatFormat, ...] = ()
    blocks: tuple[PerBlock, ...] = ()  # granularities that only some formats know
    sparsity: tuple[Pattern, ...] = ()
    folds: bool = False  # kernels know no scales of inputs, which must be folded into what comes before


@dataclass(frozen=True)
class QuantizedWeight(abc.ABC):
    """A layer's weight as it ships.

    `tensors` holds exactly the bytes that ship (packed codes, scales, zero points, codebooks), each
    contiguous; `shape` is (out, in).
    """

    scheme: Scheme
    shape: tuple[int, int]
    tensors: Mapping[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes that ship; equals `scheme.nbytes(...)` for the same shape."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())

    @abc.abstractmethod
    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight's values, (out, in): computed in float32, then rounded once to `dtype`."""


# Name -> tensor of one layer: second moments of its inputs, ranges, gradients. For a scheme whose scales of inputs are
# folded also `together` (rows, in), the weights of all layers that must share these scales, and `channels` (in,), equal
# for inputs that must share one.
Statistics = Mapping[str, Tensor]


class Method(abc.ABC):
    """One quantization method. `version` is part of every cache key: raise it when results change."""

    version: ClassVar[int] = 1

    @abc.abstractmethod
    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        """Why this method cannot make `scheme` for `layer` (one clause, naming the rule), or None."""

    def uses_statistics(self, scheme: Scheme) -> bool:
        """Whether `scheme` is made from the layer's calibration statistics, beside its weight."""
        return False

    @abc.abstractmethod
    def quantize(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> QuantizedWeight:
        """Quantize `weight` (out, in), of any float dtype, deterministically.

        `statistics` are the layer's, as `autoq.calibration.curvature.gather` names them; given where
        `uses_statistics` says so.

        Raises `SchemeRefused` for a scheme or shape that `refuses` would refuse and `NotFinite` for a
        weight with NaN or infinity.
        """

    def schemes(self, name: str, grid: Grid) -> Iterable[Scheme]:
        """The schemes of this method, called `name`, within `grid`: by default, uniform integers."""
        for bits, granularity, zero, activation in itertools.product(
            grid.bits, grid.granularities, grid.zero_points, grid.activations
        ):
            yield Integer(name, bits, granularity, zero, activation)
