"""What ONNX Runtime's kernels do to a layer's input before they multiply, in float32.

    int8-dynamic  s = (max - min)/255 over the whole tensor, the range widened to hold 0, z = round(-min/s);
                  x' = (clamp(round(x/s) + z, 0, 255) - z) s   (ONNX operator DynamicQuantizeLinear)
    int8-static   the same with a calibrated range, whichever observer found it   (QuantizeLinear, DequantizeLinear)
    nbits-a8      s = max|x|/127 per block of a row's inputs; x' = round(x/s) s   (MLAS, QuantizeARow)

Ties round to even, as IEEE says.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from autoq.calibration.observers import AFFINE_INT8, input_range
from autoq.methods import Statistics
from autoq.scheme import OBSERVERS, Integer, Scheme
from autoq.targets._onnx_rules import block_of, is_rowwise


def dynamic(x: Tensor) -> Tensor:
    """One affine range for all of `x`, of any shape."""
    low, high = torch.aminmax(x.float())
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low) / 255
    if step == 0:
        return x
    zero = torch.round(-low / step).clamp(0, 255)
    return _affine(x, step, zero)


def bounds_of(scheme: Scheme, statistics: Statistics) -> tuple[float, float] | None:
    """A layer's (least, greatest) input that its codes hold, where `scheme` is calibrated.

    Raises `SchemeRefused` where there is none.
    """
    if not isinstance(scheme, Integer) or scheme.activation not in OBSERVERS:
        return None
    low, high = input_range(scheme, statistics, AFFINE_INT8).tolist()
    return low, high


def static(low: float, high: float) -> Callable[[Tensor], Tensor]:
    """One affine range that was calibrated."""
    step, zero = static_grid(low, high)
    return lambda x: _affine(x, torch.tensor(step), torch.tensor(float(zero)))


def static_grid(low: float, high: float) -> tuple[float, int]:
    """(step, zero point) of unsigned 8 bits over [low, high], widened to hold 0; the step is a float32."""
    bounds = torch.tensor([min(low, 0.0), max(high, 0.0)])
    step = (bounds[1] - bounds[0]) / 255
    if step == 0:
        return 1.0, 0
    return float(step), int(torch.round(-bounds[0] / step).clamp(0, 255))


def _affine(x: Tensor, step: Tensor, zero: Tensor) -> Tensor:
    codes = (torch.round(x.float() / step) + zero).clamp(0, 255)
    return ((codes - zero) * step).to(x.dtype)


def per_block(x: Tensor, block: int) -> Tensor:
    """A symmetric range per `block` consecutive inputs; `x` is (…, in)."""
    blocks = x.float().reshape(*x.shape[:-1], -1, block)
    step = blocks.abs().amax(-1, keepdim=True) / 127
    codes = torch.where(step > 0, torch.round(blocks / step), 0.0)
    return (codes * step).reshape(x.shape).to(x.dtype)


def activation(scheme: Scheme, statistics: Statistics | None) -> Callable[[Tensor], Tensor] | None:
    """See `Target.activation`. Without `statistics`, a calibrated scheme takes [-1, 1]."""
    return rounding(scheme, (-1.0, 1.0) if statistics is None else bounds_of(scheme, statistics))


def rounding(scheme: Scheme, bounds: tuple[float, float] | None) -> Callable[[Tensor], Tensor] | None:
    """`activation` with the calibrated range, which a calibrated scheme needs, given as `bounds`."""
    if not isinstance(scheme, Integer) or scheme.activation is None:
        return None
    if scheme.activation in OBSERVERS:
        assert bounds is not None, scheme
        return static(*bounds)
    if is_rowwise(scheme):
        return dynamic

    def blocks(x: Tensor) -> Tensor:
        size = block_of(scheme, x.shape[-1])
        assert size is not None, (scheme, x.shape)
        return per_block(x, size)

    return blocks
