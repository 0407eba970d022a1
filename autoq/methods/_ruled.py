"""A method whose refusals are one rule, asked before a model is loaded and again with the weight."""

from __future__ import annotations

import abc

import torch
from torch import Tensor

from autoq.errors import NotFinite, SchemeRefused
from autoq.layer import Layer
from autoq.methods import Method, QuantizedWeight, Statistics
from autoq.scheme import PerGroup, Scheme

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class RuledMethod(Method):
    """`refuses` and `quantize` in terms of `rule`, so that they cannot disagree."""

    @property
    def name(self) -> str:
        """The method's name: that of its file."""
        return type(self).__module__.rpartition(".")[2]

    @abc.abstractmethod
    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        """Why `scheme`, which is of this method and divides the rows, cannot be made for `shape`, or None."""

    @abc.abstractmethod
    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        """Quantize `weight` (out, in), finite, on the CPU, in its own dtype, by a scheme that `rule` allows."""

    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        return self._refusal(scheme, (layer.out_features, layer.in_features))

    @torch.no_grad()
    def quantize(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None = None) -> QuantizedWeight:
        if weight.ndim != 2 or weight.numel() == 0 or weight.dtype not in _FLOATS:
            raise SchemeRefused(f"{scheme} needs a float matrix (out, in), not {weight.dtype} {tuple(weight.shape)}")
        if reason := self._refusal(scheme, (weight.shape[0], weight.shape[1])):
            raise SchemeRefused(f"{scheme} for a weight of shape {tuple(weight.shape)}: {reason}")
        weight = weight.detach().cpu().contiguous()  # sums, too, must not depend on strides
        _check_finite(weight)
        return self.make(weight, scheme, statistics)

    def _refusal(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        if scheme.method != self.name:
            return f"it is a scheme of method {scheme.method}, not of {self.name}"
        granularity = getattr(scheme, "granularity", None)
        if isinstance(granularity, PerGroup) and shape[1] % granularity.size:
            return f"group size {granularity.size} does not divide the {shape[1]} inputs of shape {shape}"
        return self.rule(scheme, shape)


def _check_finite(weight: Tensor) -> None:
    # NaN wins over every number, so two numbers tell all. Methods compute in float32: a float64 must fit.
    ends = torch.stack(torch.aminmax(weight)).float()
    if not ends.isfinite().all():
        bad = weight.numel() - int(weight.float().isfinite().sum())
        raise NotFinite(
            f"{bad} of the {weight.numel()} numbers of the weight {tuple(weight.shape)} are NaN or infinite"
        )
