"""Methods that quantize with an eye to a layer's inputs, and how they read its calibration statistics."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.errors import NotFinite, SchemeRefused
from autoq.layer import Layer
from autoq.methods import Statistics
from autoq.methods._ruled import RuledMethod
from autoq.scheme import Scheme

_LEAST = 1e-6  # importance, of the mean: none is zero


class InputMethod(RuledMethod):
    """A method all of whose schemes are made from statistics of the layer's inputs."""

    def uses_statistics(self, scheme: Scheme) -> bool:
        return True

    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        if layer.kind == "embedding" and scheme.method == self.name:
            return f"{self.name} weighs a layer's inputs, and an embedding's rows are looked up"
        return super().refuses(layer, scheme)


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
