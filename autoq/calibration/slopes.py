"""Slopes: how the loss of a quantized model changes, to first order, with every choice of every layer.

One forward and one backward pass at the assignment that is swapped in give the gradient G = ∂loss/∂W of
every layer at its quantized weight, summed over tokens, and with it for each choice c

    P[c] = <G, W_c − W>

with W_c the dequantized and W the original weight. The gradient itself is not kept: G = Σ_t g_t x_tᵀ is
formed layer by layer during the backward pass, where g_t (out,) and x_t (in,) are at hand. An embedding's
rows are read, not multiplied, so there P[c] = Σ_t g_t · (W_c − W)[token t]; a tied weight sums both uses.

A layer that the loss does not depend on, such as an expert that no token came to, has slopes of 0.
What activation quantization does is left out: its rounding has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from autoq.calibration._hooks import LookUps, linear_output
from autoq.layer import Layer
from autoq.models.loaded import LoadedModel

Weights = Callable[[Layer], Sequence[Tensor]]


def gather(
    model: LoadedModel, ids: Tensor, loss: Callable[[Tensor], Tensor], layers: Sequence[Layer], weights: Weights
) -> tuple[float, Mapping[str, list[float]]]:
    """The loss, and layer name -> P of each of the layer's `weights` (out, in), under what is swapped in.

    `ids` is (windows, tokens), run as one batch; `loss` turns outputs (windows, tokens, v) into a scalar.
    """
    found: dict[str, list[float]] = {layer.name: [] for layer in layers}
    handles: list[RemovableHandle] = []
    look_ups = LookUps()

    def watch(layer: Layer, module: nn.Module) -> None:
        def on_forward(_: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
            output = linear_output(outputs)
            if not output.requires_grad:
                output.requires_grad_()
            seen = look_ups.ids if isinstance(module, nn.Embedding) else inputs[0].detach()
            output.register_hook(lambda grad: add(layer, module, seen, grad.detach()))  # type: ignore[no-untyped-call]

        if isinstance(module, nn.Embedding):
            handles.extend(look_ups.watch(module))
        handles.append(module.register_forward_hook(on_forward))

    def add(layer: Layer, module: nn.Module, seen: Tensor, grad: Tensor) -> None:
        rows = grad.reshape(-1, grad.shape[-1]).float()
        original = model.weight(layer.name)
        if isinstance(module, nn.Embedding):
            tokens = seen.reshape(-1)
            shares = [rows.mul((w[tokens] - original[tokens]).float()).sum() for w in weights(layer)]
        else:
            whole = rows.t() @ seen.reshape(-1, seen.shape[-1]).float()
            shares = [whole.mul((w - original).float()).sum() for w in weights(layer)]
        own = [float(share) for share in shares]
        found[layer.name] = [a + b for a, b in zip(found[layer.name] or [0.0] * len(own), own, strict=True)]

    for layer in layers:
        for module in model.modules_of(layer):
            watch(layer, module)
    try:
        with torch.enable_grad():
            value = loss(model.outputs(ids.to(model.device)))
            value.backward()  # type: ignore[no-untyped-call]
    finally:
        for handle in handles:
            handle.remove()
    for layer in layers:
        found[layer.name] = found[layer.name] or [0.0] * len(weights(layer))
    return float(value.detach()), found
