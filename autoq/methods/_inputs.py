"""Methods that quantize with an eye to a layer's inputs, and how they read its calibration statistics."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from autoq.errors import NotFinite, SchemeRefused
from autoq.layer import Layer
from autoq.methods import Grid, Statistics
from autoq.methods._ruled import RuledMethod
from autoq.scheme import OBSERVERS, Integer, Scheme

LEAST = 2.0**-12  # scale of an input, of the largest
_LEAST = 1e-6  # importance, of the mean: none is zero


class InputMethod(RuledMethod):
    """A method all of whose schemes are made from statistics of the layer's inputs."""

    def uses_statistics(self, scheme: Scheme) -> bool:
        return True

    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        if layer.kind == "embedding" and scheme.method == self.name:
            return f"{self.name} weighs a layer's inputs, and an embedding's rows are looked up"
        return super().refuses(layer, scheme)


class ScalingMethod(InputMethod):
    """A method that divides a layer's inputs by scales: they ship, or are folded into what makes the inputs.

    Folded ones are powers of two: numbers of any float type stand being multiplied by them, so the folded model's
    outputs are the same, bit for bit, but for weights that enter a norm as 1 + w.
    """

    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        if isinstance(scheme, Integer) and scheme.folded:
            if layer.source is None:
                return "its scales are to be folded, and nothing makes the layer's inputs that can be scaled"
            if layer.kind == "router" or (layer.stack is not None and layer.source.kind != "rows"):
                return "its scales are to be folded, and all experts of a block would have to share them"
            if layer.tied:
                return "its scales are to be folded, and an embedding has the same weight"
        return super().refuses(layer, scheme)

    def schemes(self, name: str, grid: Grid) -> Iterable[Scheme]:
        for scheme in super().schemes(name, grid):
            assert isinstance(scheme, Integer)
            yield replace(scheme, folded=grid.folds)

    def folded_rule(self, scheme: Integer) -> str | None:
        """Why scales of `scheme` cannot be folded, or None."""
        if scheme.folded and scheme.activation in OBSERVERS:
            return "a calibrated range is one of inputs as they are, before scales are folded into them"
        return None


def together(weight: Tensor, scheme: Integer, statistics: Statistics | None) -> Tensor:
    """The weights (rows, in) float32 that share the scales of inputs: the layer's alone unless they are folded."""
    found = (statistics or {}).get("together") if scheme.folded else None
    return weight.float() if found is None else found.float()


def shared(wanted: Tensor, scheme: Integer, statistics: Statistics | None, reduce: Literal["mean", "amax"]) -> Tensor:
    """`wanted` (in,), one number for all inputs that must share a scale."""
    channels = (statistics or {}).get("channels") if scheme.folded else None
    if channels is None:
        return wanted
    _, place = torch.unique(channels, return_inverse=True)
    pooled = torch.zeros(int(place.max()) + 1, dtype=wanted.dtype)
    return pooled.scatter_reduce_(0, place, wanted, reduce, include_self=False)[place]


def input_scales(wanted: Tensor, folded: bool = False) -> Tensor:
    """Scales (in,) as they ship, at most 1, in proportion to those `wanted`; a 0 stands for no wish.

    `folded` ones are powers of two.
    """
    some = wanted > 0
    middle = wanted[some].log().mean().exp() if some.any() else torch.ones(())
    filled = torch.where(some, wanted, middle)
    scales = (filled / filled.max()).clamp_(min=LEAST)
    return scales.log2_().round_().exp2_() if folded else scales.to(torch.bfloat16).float()


def needed(scheme: Scheme, statistics: Statistics | None, name: str, shape: tuple[int, ...]) -> Tensor:
    """The statistic `name` of the layer, of `shape`, float32, on the CPU.

    Raises `SchemeRefused` where the calibration never saw the layer's inputs, and `NotFinite` for NaN or infinity.
    """
    if statistics is None or name not in statistics:
        raise SchemeRefused(f"{scheme} is made from statistics of the layer's inputs, and there are none")
    found = statistics[name].detach().cpu().float()
    assert found.shape == shape, (name, found.shape, shape)
    if not torch.stack(torch.aminmax(found)).isfinite().all():  # NaN wins over every number
        bad = found.numel() - int(found.isfinite().sum())
        raise NotFinite(f"{bad} of the {found.numel()} numbers of the statistic {name} are NaN or infinite")
    return found


def mean_squares(scheme: Scheme, statistics: Statistics | None, inputs: int) -> Tensor:
    """E[x_j²] (in,) over its mean, float32; all ones where every input was zero, so that errors still count."""
    squares = needed(scheme, statistics, "input_mean_square", (inputs,)).double()
    mean = squares.mean()
    return (squares / mean).float() if mean > 0 else torch.ones(inputs)


def importance(scheme: Scheme, statistics: Statistics | None, inputs: int) -> Tensor:
    """E[x_j²] (in,) float32 of the layer's inputs, positive: how much the error of each input's weights counts.

    Raises `SchemeRefused` where the calibration never saw the layer's inputs, `NotFinite` where they were not.
    """
    squares = needed(scheme, statistics, "input_mean_square", (inputs,))
    mean = float(squares.mean(dtype=torch.float64))
    if mean <= 0:
        raise SchemeRefused(f"{scheme}: all inputs of the layer were zero on the calibration data")
    return squares.clamp(min=_LEAST * mean)


def second_moments(scheme: Scheme, statistics: Statistics | None, inputs: int) -> Tensor:
    """E[x xᵀ] (in, in) over the mean of its diagonal, float64 and symmetric; zero where every input was."""
    if statistics is not None and "input_rows" in statistics:
        rows = needed(scheme, statistics, "input_rows", (len(statistics["input_rows"]), inputs)).double()
        # Before they are multiplied, as squares of the largest float32 would not be kept in one.
        rows /= rows.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        moments = rows.t() @ rows
    else:
        moments = needed(scheme, statistics, "hessian", (inputs, inputs)).double()
    mean = moments.diagonal().mean()
    return moments.div_(mean) if mean > 0 else torch.zeros_like(moments)
