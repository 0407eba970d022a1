"""The two factors of a layer's curvature from one pass: exact where that is cheap, and else from random projections.

For the gradient G = gᵀ x (out, in) of a pass, with g (positions, out) that of the layer's output and x (positions, in)
its input, the curvature proxy needs the diagonal of G Gᵀ and rows whose sum of squares is Gᵀ G. G itself costs as much
as the layer's own forward product, and Gᵀ G more. With S (out, k) and R (in, k) of independent signs ±1,

    E[|(G R)_i|²] = k (G Gᵀ)_ii        G R  = gᵀ (x R)
    E[(Sᵀ G)ᵀ (Sᵀ G)] = k Gᵀ G         Sᵀ G = (g S)ᵀ x

by which neither is ever formed (Hutchinson, "A stochastic estimator of the trace", 1990; Woodruff, "Sketching as a tool
for numerical linear algebra", 2014). Their relative standard error is at most √(2/k) for a direction and a pass. Passes
have signs of their own, and a layer's loss adds up directions by the hundred, so little of it is left of the sum: less
than another drawing of the labels changes.

    k  SKETCH     S, R  `Signs`     x R  `mixed`, shared by the layers that read x

A layer or pass of at most k outputs, inputs or positions is exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SKETCH = 64
_PORTION = 2**19  # numbers at once


class Signs:
    """Random signs for the current pass, the same for all layers of one size. Deterministic."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)
        self._drawn: dict[int, Tensor] = {}

    def draw(self) -> None:
        """Let the next pass have others."""
        self._drawn.clear()

    def __call__(self, size: int, like: Tensor) -> Tensor:
        """±1 (size, SKETCH), in the type and place of `like`."""
        if size not in self._drawn:
            bits = torch.randint(2, (size, SKETCH), generator=self._generator, dtype=torch.int8)
            self._drawn[size] = bits.mul_(2).sub_(1).to(like.device, like.dtype)
        return self._drawn[size]


def factors(grad: Tensor, rows: Tensor, signs: Signs, mixed: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """The diagonal of G Gᵀ (out,), rows (k, in) whose sum of squares is Gᵀ G, and x R to be given for the same x again.

    `grad` is g (positions, out), `rows` x (positions, in).
    """
    (positions, outputs), inputs = grad.shape, rows.shape[1]
    if min(positions, outputs, inputs) <= SKETCH:
        whole = product(grad.float(), rows.float(), _common(grad, rows))
        diagonal = whole.square().sum(1)
        if positions < min(outputs, inputs):
            # g gᵀ = Rᵀ R, so xᵀ g gᵀ x are the squares of the rows of R x, which are fewer.
            whole = torch.linalg.qr(grad.float().t(), mode="r").R @ rows.float()
        return diagonal, whole, mixed
    if grad.dtype is not torch.bfloat16 or rows.dtype is not torch.bfloat16:  # float16 would overflow
        grad, rows = grad.float(), rows.float()
    if mixed is None:
        mixed = rows @ signs(inputs, rows)
    diagonal = (grad.t() @ mixed).float().square_().sum(1).div_(SKETCH)
    return diagonal, ((grad @ signs(outputs, grad)).t() @ rows).float().div_(SKETCH**0.5), mixed


def squares(grad: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of squares by position (positions,) and by output (out,), float32, of `grad` (positions, out).

    By portions that stay in a cache.
    """
    at_once = max(1, _PORTION // grad.shape[1])
    by_position, by_output = [], torch.zeros(grad.shape[1], device=grad.device)
    for start in range(0, len(grad), at_once):
        values = grad[start : start + at_once].float()
        square = values.mul_(values) if values.dtype is not grad.dtype else values * values
        by_position.append(square.sum(1))
        by_output += square.sum(0)
    return torch.cat(by_position) if by_position else by_output[:0], by_output


def add_rows(kept: list[Tensor], square: Tensor | None, rows: Tensor) -> Tensor | None:
    """Keep `rows` (k, in), or once `kept` are as many as a row is long the sum of their squares (in, in) instead."""
    kept.append(rows)
    if sum(map(len, kept)) < rows.shape[1]:
        return square
    together = torch.cat(kept)
    kept.clear()
    return plus(square, together.t() @ together)


def _common(a: Tensor, b: Tensor) -> torch.dtype:
    return a.dtype if a.dtype is b.dtype else torch.float32


def product(a: Tensor, b: Tensor, dtype: torch.dtype, total: Tensor | None = None) -> Tensor:
    """aᵀ b float32 for float32 `a` (n, i) and `b` (n, j), added to `total` in place if there is one.

    `dtype` is that which the numbers had. Of bfloat16 numbers the products are exact and are summed in float32, so
    units for them do it without a loss, several times faster.
    """
    if dtype is not torch.bfloat16 or a.device.type != "cpu":
        return a.t() @ b if total is None else total.addmm_(a.t(), b)
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        return a.t() @ b if total is None else total.addmm_(a.t(), b)
    finally:
        matmul.fp32_precision = before


def plus(total: Tensor | None, more: Tensor) -> Tensor:
    """Their sum, in the first one's place."""
    return more if total is None else total.add_(more)
