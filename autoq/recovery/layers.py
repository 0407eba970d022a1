"""Layers of a model in training: what is trained of them, and the gradients that reach their weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from autoq.assignment import Assignment
from autoq.errors import BadInput
from autoq.methods import QuantizedWeight
from autoq.models import LoadedModel
from autoq.recovery.latents import latent
from autoq.trained import trainable


def trainable_names(assignment: Assignment) -> list[str]:
    """The layers that can be trained, in the assignment's order. Raises `BadInput` where there is none."""
    names = [name for name, scheme in assignment.items() if trainable(scheme)]
    if not names:
        raise BadInput(
            "nothing in the assignment can be trained: integer schemes and codebooks can be, awq, smooth and others not"
        )
    return names


class LayersInTraining:
    """Some layers of `model` on their way from `starts`: layer -> how it ships so far.

    `weights` are what is to be swapped in, (out, in) in the model's dtype, and follow what is learned.
    """

    def __init__(self, model: LoadedModel, starts: Mapping[str, QuantizedWeight]) -> None:
        self.latents = {name: latent(start, model.weight(name)) for name, start in starts.items()}
        self.weights = {name: torch.empty_like(model.weight(name)) for name in starts}
        self.write()
        layers = {name: model.info.layer(name) for name in starts}
        self._turned = {name: layer.kind == "conv1d" for name, layer in layers.items()}
        self._shared = {
            name: list({id(module.weight): module for module in model.modules_of(layer)}.values())
            for name, layer in layers.items()
        }

    def write(self) -> None:
        """Bring `weights` up to date."""
        for name, each in self.latents.items():
            each.write(self.weights[name])

    def collected(self, gradients: dict[str, Tensor], last: bool) -> dict[str, Tensor]:
        """The gradients (out, in) of the layers' weights, added to those before; the parameters' are taken away."""
        for name in self.latents:
            for parameter in self._parameters(name):
                if parameter.grad is None:  # an expert to whom no token came
                    continue
                grad = parameter.grad.t() if self._turned[name] else parameter.grad
                parameter.grad = None
                if name in gradients:
                    gradients[name] += grad
                else:
                    gradients[name] = grad if last else grad.float()
        return gradients

    def learn(self, gradients: Mapping[str, Tensor], count: int, rates: Mapping[str, float]) -> None:
        """Take update number `count`, from 1, of the layers that `gradients` are of."""
        for name, gradient in gradients.items():
            self.latents[name].learn(gradient, count, rates)
            self.latents[name].write(self.weights[name])

    def quantized(self) -> dict[str, QuantizedWeight]:
        """The layers as they ship now."""
        return {name: each.quantized() for name, each in self.latents.items()}

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """The layers' parameters ask for gradients."""
        parameters = [parameter for name in self.latents for parameter in self._parameters(name)]
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            yield
        finally:
            for parameter in parameters:
                parameter.requires_grad_(False)
                parameter.grad = None

    def _parameters(self, name: str) -> list[torch.nn.Parameter]:
        return [module.weight for module in self._shared[name]]
