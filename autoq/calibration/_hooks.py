"""Hooks that add up what the curvature proxy is made of while a model runs forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

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
    plain_square: Tensor | None = None  # (in,) sum over positions of the squared input
    positions: int = 0  # in `plain_square`
    low: float = 0.0  # the least input
    high: float = 0.0


class LookUps(TorchFunctionMode):
    """Remembers the rows that were looked up last: a position embedding makes them of what it is given."""

    ids: Tensor

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            self.ids = args[0]
        return func(*args, **(kwargs or {}))


class Gatherer:
    """The sums of every layer's modules, over passes of `tokens` tokens in all."""

    def __init__(self, model: LoadedModel, tokens: int) -> None:
        self.model = model
        self.tokens = tokens
        self.by_module: dict[nn.Module, Sums] = {}
        self._look_ups = LookUps()

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = []
        for layer in self.model.info.layers:
            for module in self.model.modules_of(layer):
                self.by_module.setdefault(module, Sums())
                handles.append(module.register_forward_hook(self._on_forward(module)))
        try:
            with self._look_ups:
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _on_forward(self, module: nn.Module) -> Callable[..., Any]:
        own = self.by_module[module]

        def hook(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            if isinstance(module, nn.Embedding):
                on_gradient = self._rows_seen(own, self._look_ups.ids, module.num_embeddings)
            else:
                on_gradient = self._inputs_seen(own, inputs[0].detach())
            output.register_hook(lambda grad: on_gradient(grad.detach().reshape(-1, grad.shape[-1]).float()))  # type: ignore[no-untyped-call]

        return hook

    def _rows_seen(self, own: Sums, ids: Tensor, rows: int) -> Callable[[Tensor], None]:
        """What to do with the output's gradient (positions, out) once it is known; so for `_inputs_seen`."""

        def on_gradient(grad: Tensor) -> None:
            # Not on a GPU, where the order of the additions is another one each time.
            read, place = torch.unique(ids.reshape(-1).cpu(), return_inverse=True)
            whole = torch.zeros(len(read), grad.shape[1]).index_add_(0, place, grad.cpu())
            square = whole.square()
            own.output_square = _plus(own.output_square, square.sum(0))
            if own.row_square is None:
                own.row_square = torch.zeros(rows)
            own.row_square[read] += square.sum(1)

        return on_gradient

    def _inputs_seen(self, own: Sums, x: Tensor) -> Callable[[Tensor], None]:
        low, high = torch.aminmax(x)
        step_square = float((high.clamp(min=0) - low.clamp(max=0)) / 255) ** 2
        own.low, own.high = min(own.low, float(low)), max(own.high, float(high))
        flat = x.reshape(-1, x.shape[-1])
        own.plain_square = _plus(own.plain_square, flat.float().square().sum(0))
        own.positions += len(flat)

        def on_gradient(grad: Tensor) -> None:
            # Not in place: a float32 gradient would go on squared.
            square = grad.square().sum(0)
            own.grad_square = _plus(own.grad_square, square)
            own.step_square = _plus(own.step_square, step_square * square.sum())
            inputs = flat.float()
            whole = grad.t() @ inputs
            own.output_square = _plus(own.output_square, whole.square().sum(1))
            if self.tokens >= whole.shape[1]:
                own.input_square = _plus(own.input_square, whole.t() @ whole)
            elif len(grad) >= whole.shape[0]:
                own.inputs.append(whole)
            else:  # g gᵀ = Rᵀ R, so xᵀ g gᵀ x are the squares of the rows of R x, which are fewer
                own.inputs.append(torch.linalg.qr(grad.t(), mode="r").R @ inputs)

        return on_gradient


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
