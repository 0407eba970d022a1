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
    """Running sums of one module. The saliency of a position is the squared norm of its output's gradient."""

    grad_square: Tensor | None = None  # (out,) sum over positions
    input_square: Tensor | None = None  # (in, in) sum over positions, weighted by saliency
    inputs: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # or input (tokens, in), saliency (tokens,)
    row_saliency: Tensor | None = None  # (rows,) sum over an embedding row's readings
    step_square: Tensor | None = None  # () sum over passes of the input's squared 8-bit step, weighted by saliency
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
                on_saliency = self._rows_seen(own, self._look_ups.ids, module.num_embeddings)
            else:
                on_saliency = self._inputs_seen(own, inputs[0].detach())

            def on_gradient(grad: Tensor) -> None:
                # Not in place: a float32 gradient would go on squared.
                square = grad.detach().reshape(-1, grad.shape[-1]).float().square()
                own.grad_square = _plus(own.grad_square, square.sum(0))
                on_saliency(square.sum(1))

            output.register_hook(on_gradient)  # type: ignore[no-untyped-call]

        return hook

    def _rows_seen(self, own: Sums, ids: Tensor, rows: int) -> Callable[[Tensor], None]:
        """What to do with the saliency (positions,) once it is known; so for `_inputs_seen`."""

        def on_saliency(saliency: Tensor) -> None:
            # Not on a GPU, where the order of the additions is another one each time.
            found = torch.bincount(ids.reshape(-1).cpu(), weights=saliency.cpu(), minlength=rows)
            own.row_saliency = _plus(own.row_saliency, found)

        return on_saliency

    def _inputs_seen(self, own: Sums, x: Tensor) -> Callable[[Tensor], None]:
        low, high = torch.aminmax(x)
        step_square = float((high.clamp(min=0) - low.clamp(max=0)) / 255) ** 2
        own.low, own.high = min(own.low, float(low)), max(own.high, float(high))
        flat = x.reshape(-1, x.shape[-1])
        own.plain_square = _plus(own.plain_square, flat.float().square().sum(0))
        own.positions += len(flat)

        def on_saliency(saliency: Tensor) -> None:
            own.step_square = _plus(own.step_square, step_square * saliency.sum())
            if self.tokens < flat.shape[1]:
                own.inputs.append((flat, saliency))
            else:
                weighted = flat.float() * saliency.sqrt().unsqueeze(1)
                own.input_square = _plus(own.input_square, weighted.t() @ weighted)

        return on_saliency


def _plus(total: Tensor | None, more: Tensor) -> Tensor:
    return more if total is None else total.add_(more)
