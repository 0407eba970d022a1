"""A model in memory whose layers can be swapped by pointer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoq.layer import Layer, ModelInfo


class LoadedModel:
    """A transformers model in eval mode, its tokenizer, and its layers by name.

    The original weights are never written to: `swap` points the modules at other tensors and
    `restore` points them back, so both cost nothing that depends on the model's size.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, info: ModelInfo) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.info = info
        self._modules = dict(model.named_modules())
        self._originals: dict[str, Tensor] = {
            layer.name: self._modules[layer.name].weight.data for layer in info.layers
        }
        self._hooks: list[Any] = []
        self._swapped: set[str] = set()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def modules_of(self, layer: Layer) -> list[nn.Module]:
        """The modules that hold the layer's weight: its own and those tied to it."""
        return [self._modules[name] for name in (layer.name, *layer.tied)]

    def weight(self, name: str) -> Tensor:
        """The original weight (out, in), whatever is swapped in; a view, not a copy."""
        original = self._originals[name]
        return original.t() if self.info.layer(name).kind == "conv1d" else original

    @torch.no_grad()
    def swap(
        self, weights: Mapping[str, Tensor], activations: Mapping[str, Callable[[Tensor], Tensor]] | None = None
    ) -> None:
        """Point layers at `weights` (out, in) of the model's dtype; all others at their originals.

        `activations` maps layer names to functions applied to the layer's input.
        """
        self._remove_hooks()
        for name in self._swapped - set(weights):
            self._point(name, self._originals[name])
        for name, weight in weights.items():
            self._point(name, weight.t() if self.info.layer(name).kind == "conv1d" else weight)
        self._swapped = set(weights)
        for name, function in (activations or {}).items():
            self._hooks.append(self._modules[name].register_forward_pre_hook(_on_first_input(function)))

    def restore(self) -> None:
        """Point every layer at its original weight."""
        self.swap({})

    def _point(self, name: str, tensor: Tensor) -> None:
        for module in self.modules_of(self.info.layer(name)):
            assert module.weight.shape == tensor.shape, (name, module.weight.shape, tensor.shape)
            module.weight.data = tensor

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def outputs(self, input_ids: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary), or final hidden states of an encoder without a head.

        `input_ids` is (batch, tokens). A sequence-to-sequence model reads the same tokens on both
        sides (teacher forcing, the decoder's shifted by its start token). No cache is kept. Gradients
        flow if the caller has them enabled.
        """
        extra: dict[str, Any] = {}
        if self.info.task == "seq2seq":
            start = self.model.config.decoder_start_token_id
            assert start is not None
            extra["decoder_input_ids"] = torch.cat(
                [torch.full_like(input_ids[:, :1], start), input_ids[:, :-1]], dim=1
            )
        if self.info.task in ("causal", "seq2seq"):
            extra["use_cache"] = False
        result = self.model(input_ids=input_ids, **extra)
        return result.last_hidden_state if self.info.task == "encoder" else result.logits


def _on_first_input(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (function(inputs[0]), *inputs[1:])

    return hook
