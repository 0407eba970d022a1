"""Hooks that add up what the curvature proxy is made of while a model runs forward and backward."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from autoq.calibration.histogram import Binned, Histogram
from autoq.errors import NotFinite
from autoq.layer import MOST_HESSIAN_INPUTS
from autoq.models.loaded import LoadedModel


@dataclass
class Sums:
    """Running sums of one module over passes; G (out, in) is the gradient of a pass with respect to the weight."""

    output_square: Tensor | None = None  # (out,) diagonal of G Gᵀ; of an embedding (columns,) that of Gᵀ G
    input_square: Tensor | None = None  # (in, in) Gᵀ G
    inputs: list[Tensor] = field(default_factory=list)  # or rows (≤ tokens, in) whose sum of squares is Gᵀ G
    row_square: Tensor | None = None  # (rows,) diagonal of an embedding's G Gᵀ
    grad_square: Tensor | None = None  # (out,) squared gradients of the output, summed over positions
    step_square: Tensor | None = None  # () squared 8-bit step of the input, times the sum of a pass's squared gradients
    token_step_square: Tensor | None = None  # () the same with the step of each position's own largest magnitude
    plain_square: Tensor | None = None  # (in,) sum over positions of the squared input
    positions: int = 0  # in `plain_square`
    low: Tensor | None = None  # (in,) the least input, at most 0
    high: Tensor | None = None
    hessian: Tensor | None = None  # (in, in) sum over positions of x xᵀ; never written to, as others may hold it
    read: tuple[Tensor, ...] = ()  # or the inputs themselves, (positions, in) of each pass
    counts: Histogram = field(default_factory=Histogram)  # of the inputs
    saliency: Histogram = field(default_factory=Histogram)  # the same, each weighted by its position's Σ g²


@dataclass
class _Read:
    """The input that was read last. Layers that read it one after the other (q, k, v) share what is made of it."""

    input: Tensor
    rows: Tensor  # (positions, in), detached
    low: Tensor  # (in,)
    high: Tensor
    square: Tensor  # (in,) summed over positions
    binned: Binned
    peaks: Tensor  # (positions,) largest magnitudes
    product: Tensor | None = None  # (in, in) summed over positions, or a copy of the rows
    before: Tensor | None = None  # the sum that `product` was added to first
    after: Tensor | None = None


class LookUps(TorchFunctionMode):
    """Remembers the rows that were looked up last: a position embedding makes them of what it is given."""

    ids: Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            self.ids = args[0]
        return func(*args, **(kwargs or {}))


def linear_output(outputs: Any) -> Tensor:
    """The product with the weight among a module's outputs: a router gives what it makes of it as well."""
    found: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return found


class Gatherer:
    """The sums of every layer's modules, over passes of `tokens` tokens in all."""

    def __init__(self, model: LoadedModel, tokens: int) -> None:
        self.model = model
        self.tokens = tokens
        self.by_module: dict[nn.Module, Sums] = {}
        self._look_ups = LookUps()
        self._last: _Read | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for layer in self.model.info.layers:
            for module in self.model.modules_of(layer):
                self.by_module.setdefault(module, Sums())
                handles.append(module.register_forward_hook(self._on_forward(module, layer.name)))
        try:
            with self._look_ups:
                yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    @contextlib.contextmanager
    def reading(self, names: Iterable[str]) -> Iterator[None]:
        """Add up what the layers `names` read, before their kernels round it; no gradients are waited for."""
        handles = []
        for name in names:
            for module in self.model.modules_of(self.model.info.layer(name)):
                self.by_module.setdefault(module, Sums())
                handles.append(module.register_forward_pre_hook(self._on_read(module, name), prepend=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None

    def _on_read(self, module: nn.Module, name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            try:
                self._inputs_seen(self.by_module[module], inputs[0])
            except NotFinite as problem:
                raise NotFinite(f"layer {name}: {problem}") from problem

        return hook

    def _on_forward(self, module: nn.Module, name: str) -> Callable[..., Any]:
        own = self.by_module[module]

        def hook(_: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
            output = linear_output(outputs)
            if not output.requires_grad:
                output.requires_grad_()
            if isinstance(module, nn.Embedding):
                on_gradient = self._rows_seen(own, self._look_ups.ids, module.num_embeddings)
            else:
                try:
                    on_gradient = self._inputs_seen(own, inputs[0])
                except NotFinite as problem:
                    raise NotFinite(f"layer {name}: {problem}") from problem
            output.register_hook(lambda grad: on_gradient(grad.detach().reshape(-1, grad.shape[-1])))  # type: ignore[no-untyped-call]

        return hook

    def _rows_seen(self, own: Sums, ids: Tensor, rows: int) -> Callable[[Tensor], None]:
        """What to do with the output's gradient (positions, out) once it is known; so for `_inputs_seen`."""

        def on_gradient(grad: Tensor) -> None:
            # Not on a GPU, where the order of the additions is another one each time.
            read, place = torch.unique(ids.reshape(-1).cpu(), return_inverse=True)
            whole = torch.zeros(len(read), grad.shape[1]).index_add_(0, place, grad.float().cpu())
            square = whole.square()
            own.output_square = _plus(own.output_square, square.sum(0))
            if own.row_square is None:
                own.row_square = torch.zeros(rows)
            own.row_square[read] += square.sum(1)

        return on_gradient

    def _inputs_seen(self, own: Sums, x: Tensor) -> Callable[[Tensor], None]:
        if self._last is None or self._last.input is not x:
            rows = x.detach().reshape(-1, x.shape[-1])
            low, high = torch.aminmax(rows, dim=0)
            low, high = low.float().clamp(max=0), high.float().clamp(min=0)
            peaks = rows.abs().amax(1).float()
            self._last = _Read(x, rows, low, high, _squares(rows, 0), Binned(rows), peaks)
        last = self._last
        step_square = float((last.high.max() - last.low.min()) / 255) ** 2
        own.low = last.low if own.low is None else torch.minimum(own.low, last.low)
        own.high = last.high if own.high is None else torch.maximum(own.high, last.high)
        own.plain_square = last.square if own.plain_square is None else own.plain_square + last.square
        own.positions += len(last.rows)
        own.counts.add(last.binned)
        self._add_second_moments(own, last)
        rows, binned, peaks = last.rows, last.binned, last.peaks

        def on_gradient(grad: Tensor) -> None:
            square = _squares(grad, 0)
            by_position = _squares(grad, 1)
            own.saliency.add(binned, by_position.unsqueeze(1).expand(rows.shape))
            own.token_step_square = _plus(own.token_step_square, (peaks / 127).square() @ by_position)
            own.grad_square = _plus(own.grad_square, square)
            own.step_square = _plus(own.step_square, step_square * square.sum())
            whole = product(grad, rows)
            own.output_square = _plus(own.output_square, _squares(whole, 1))
            if self.tokens >= whole.shape[1]:
                own.input_square = _plus(own.input_square, product(whole, whole, short=rows.dtype is torch.bfloat16))
            elif len(grad) >= whole.shape[0]:
                own.inputs.append(whole)
            else:  # g gᵀ = Rᵀ R, so xᵀ g gᵀ x are the squares of the rows of R x, which are fewer
                own.inputs.append(torch.linalg.qr(grad.float().t(), mode="r").R @ rows.float())

        return on_gradient

    def _add_second_moments(self, own: Sums, last: _Read) -> None:
        """Layers whose sums were one tensor before and that read the same again hold one tensor after."""
        inputs = last.rows.shape[1]
        if inputs > MOST_HESSIAN_INPUTS:
            return
        if self.tokens < inputs:  # fewer numbers than the matrix has
            if last.product is None:
                last.product = last.rows.clone()
            own.read = (*own.read, last.product)
            return
        if last.product is None:
            last.product, last.before = product(last.rows, last.rows), own.hessian
            last.after = last.product if own.hessian is None else own.hessian + last.product
            own.hessian = last.after
        elif own.hessian is last.before:
            own.hessian = last.after
        else:
            own.hessian = last.product if own.hessian is None else own.hessian + last.product


def product(a: Tensor, b: Tensor, short: bool = False) -> Tensor:
    """aᵀ b float32 for `a` (n, i) and `b` (n, j), summed in float32.

    Of bfloat16 numbers the products are exact, so units for them do it without a loss, several times faster;
    `short` lets them round the numbers of other types, too.
    """
    if not (short or a.dtype is b.dtype is torch.bfloat16) or a.device.type != "cpu":
        return a.float().t() @ b.float()
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        return a.float().t() @ b.float()
    finally:
        matmul.fp32_precision = before


def _squares(values: Tensor, dim: int) -> Tensor:
    """Sum of squares over `dim`, float32. Values stay as they are: a gradient goes on."""
    norms: Tensor = torch.linalg.vector_norm(values, dim=dim, dtype=torch.float32)
    return norms.square_()


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
