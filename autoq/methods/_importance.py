"""How much the error of each input's weights counts."""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.errors import SchemeRefused
from autoq.methods import Statistics
from autoq.scheme import Scheme

_LEAST = 1e-6  # of the mean


def importance(scheme: Scheme, statistics: Statistics | None, inputs: int) -> Tensor:
    """E[x_j²] (in,) float32 of the layer's inputs, positive.

    Raises `SchemeRefused` where the calibration never saw the layer's inputs.
    """
    if statistics is None or "input_mean_square" not in statistics:
        raise SchemeRefused(f"{scheme} is made from statistics of the layer's inputs, and there are none")
    moments = statistics["input_mean_square"].float().cpu()
    assert moments.shape == (inputs,), (moments.shape, inputs)
    mean = float(moments.mean(dtype=torch.float64))
    if mean <= 0:
        raise SchemeRefused(f"{scheme}: all inputs of the layer were zero on the calibration data")
    return moments.clamp(min=_LEAST * mean)
