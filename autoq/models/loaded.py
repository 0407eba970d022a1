"""A model in memory whose layers and KV caches can be swapped by pointer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from autoq.kv_cache import Cache
from autoq.layer import Layer, ModelInfo
from autoq.models.caches import Read, install, remove


class LoadedModel:
    """A transformers model in eval mode, its tokenizer (or image processor), and its layers by name.

    The original weights are never written to: `swap` points the modules at other tensors and
    `restore` points them back, so both cost nothing that depends on the model's size.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, info: ModelInfo) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.info = info
        self._layers = {layer.name: layer for layer in info.layers}
        # Typed loosely on purpose: three unrelated module classes that all have a `weight`.
        self._modules: dict[str, Any] = dict(model.named_modules())
        self._originals: dict[str, Tensor] = {name: self._modules[name].weight.data for name in self._layers}
        self._caches = {cache.name: cache for cache in info.caches}
        self._hooks: list[Any] = []
        self._read: list[str] = []  # caches that are not read as they are
        self._swapped: set[str] = set()
        for layer in info.layers:
            assert tuple(self.weight(layer.name).shape) == (layer.out_features, layer.in_features), layer
            for module in self.modules_of(layer):
                assert module.weight.data_ptr() == self._originals[layer.name].data_ptr(), layer

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    def modules_of(self, layer: Layer) -> list[Any]:
        """The modules that hold the layer's weight: its own and those tied to it."""
        return [self._modules[name] for name in (layer.name, *layer.tied)]

    def module_of(self, cache: Cache) -> Any:
        """The attention module that fills a KV cache."""
        return self._modules[cache.name]

    def weight(self, name: str) -> Tensor:
        """The original weight (out, in), whatever is swapped in; a view, not a copy."""
        return self._oriented(name, self._originals[name])

    def replace(self, name: str, weight: Tensor) -> None:
        """Take `weight` (out, in) for a layer's original from now on. The tensor that was it is left as it is."""
        self._originals[name] = self._oriented(name, weight)
        self._point(name, self._originals[name])

    def swap(
        self,
        weights: Mapping[str, Tensor],
        activations: Mapping[str, Callable[[Tensor], Tensor]] | None = None,
        caches: Mapping[str, Read] | None = None,
    ) -> None:
        """Point layers at `weights` (out, in) of the model's dtype; all others at their originals.

        `activations` maps layer names to functions applied to the layer's input, `caches` names of KV caches to what
        is read from them. Raises `KeyError` for a name that is no layer or cache, before anything is changed.
        """
        functions, reads = activations or {}, caches or {}
        for name in (*weights, *functions):
            self._layers[name]
        for name in reads:
            self._caches[name]
        self.restore()
        for name, weight in weights.items():
            self._swapped.add(name)
            self._point(name, self._oriented(name, weight))
        for name, function in functions.items():
            self._hooks.append(self._modules[name].register_forward_pre_hook(_on_first_input(function)))
        for name, read in reads.items():
            self._read.append(name)
            install(self._modules[name], read)

    def restore(self) -> None:
        """Point every layer at its original weight, and take activation functions and quantized caches away."""
        for name in self._read:
            remove(self._modules[name])
        self._read.clear()
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for name in self._swapped:
            self._point(name, self._originals[name])
        self._swapped.clear()

    def _oriented(self, name: str, weight: Tensor) -> Tensor:
        """(out, in) for what the module stores, and the other way round: Conv1D stores (in, out)."""
        return weight.t() if self._layers[name].kind == "conv1d" else weight

    def _point(self, name: str, tensor: Tensor) -> None:
        original = self._originals[name]
        same = tensor.shape == original.shape and tensor.dtype == original.dtype and tensor.device == original.device
        assert same, (name, tensor.shape, tensor.dtype, tensor.device, original.shape, original.dtype, original.device)
        for module in self.modules_of(self._layers[name]):
            module.weight.data = tensor

    def outputs(self, inputs: Tensor) -> Tensor:
        """Logits (batch, tokens, vocabulary), or final hidden states of an encoder without a head.

        Of a classification model logits (batch, 1, classes).

        `inputs` are token ids (batch, tokens), or of a model of images pixel values (batch, channels, height, width).
        A sequence-to-sequence model reads the same tokens on both sides (teacher forcing, the decoder's shifted by
        its start token). No cache is kept. Gradients flow if the caller has them enabled.
        """
        if self.info.images is not None:
            pixels = inputs.to(getattr(torch, self.info.dtype))
            logits: Tensor = self.model(pixel_values=pixels).logits
            return logits.unsqueeze(1)
        config: Any = self.model.config
        if self.info.task == "classification" and config.pad_token_id is None and len(inputs) > 1:
            # A decoder that classifies looks for the last token that is no padding, and refuses to look for nothing.
            return torch.cat([self.outputs(window) for window in inputs[:, None]])
        arguments: dict[str, Any] = {"input_ids": inputs}
        if self.info.task == "seq2seq":
            start = torch.full_like(inputs[:, :1], self._start_token)
            arguments["decoder_input_ids"] = torch.cat([start, inputs[:, :-1]], dim=1)
        if self.info.task in ("causal", "seq2seq"):
            arguments["use_cache"] = False
        result = self.model(**arguments)
        outputs: Tensor = result.last_hidden_state if self.info.task == "encoder" else result.logits
        return outputs.unsqueeze(1) if self.info.task == "classification" else outputs

    def length(self, data: Tensor) -> int:
        """Tokens of each of some windows: ids (n, tokens), or pixel values (n, channels, height, width)."""
        return data.shape[1] if self.info.images is None else self.info.images.tokens

    def tokens(self, data: Tensor) -> int:
        """Tokens of all of these windows together."""
        return len(data) * self.length(data)

    def shortened(self, data: Tensor, tokens: int) -> Tensor:
        """The first so many tokens of windows; images, which cannot be cut, as they are."""
        return data[:, :tokens] if self.info.images is None else data

    def positions(self, tokens: int) -> int:
        """How many outputs a window of so many tokens has: a classification model answers once."""
        return 1 if self.info.task == "classification" else tokens

    def next_tokens(self, window: Tensor) -> Tensor:
        """What each output of `window` (tokens,) is to predict, -1 for nothing.

        A sequence-to-sequence decoder's input is already shifted.
        """
        if self.info.task == "classification":
            return torch.full((1,), -1)
        if self.info.task == "seq2seq":
            return window
        nothing = torch.full_like(window[:1], -1)
        if self.info.task == "causal":
            return torch.cat([window[1:], nothing])
        return nothing.expand_as(window)

    @property
    def _start_token(self) -> int:
        config: Any = self.model.config
        assert config.decoder_start_token_id is not None
        return int(config.decoder_start_token_id)


def _on_first_input(function: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        del module
        return (function(inputs[0]), *inputs[1:])

    return hook
