"""Folding: a model and its quantized layers, with scales of inputs moved into what makes the inputs.

For each source (`autoq.layer.Source`) that a layer of a folded scheme reads, with s the scale of each of its outputs:

    norm        weight g → g / s, or for 1 + w:  w → (1 + w) / s - 1;  bias b → b / s
    layer       row i of the weight over s_i, quantized by its scales; bias b → b / s
    readers     folded ones lose their scales: codes are of W diag(s) as it is; kept ones get W → W diag(s)

so that every product is what it was. s are powers of two: float numbers take them without rounding, and the folded
model's outputs are equal bit for bit; only 1 + w rounds anew, to the model's dtype.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from autoq import folding
from autoq.errors import AutoQError, SchemeRefused
from autoq.layer import Source
from autoq.methods import QuantizedWeight
from autoq.methods._weights import FOLDED
from autoq.models.folding import channels
from autoq.models.loaded import LoadedModel
from autoq.scheme import Codebook, Integer, Keep

Weights = Mapping[str, QuantizedWeight]


def without_scales(weight: QuantizedWeight) -> QuantizedWeight:
    """A weight in the coordinates of its folded inputs: its scales of inputs are elsewhere."""
    tensors = {name: tensor for name, tensor in weight.tensors.items() if name != FOLDED}
    return dataclasses.replace(weight, tensors=tensors)


@contextlib.contextmanager
def folded(model: LoadedModel, weights: Weights) -> Iterator[Weights]:
    """The weights without scales that must be folded, while these are folded into `model`; then it is as it was.

    `weights` (layer -> weight; others are kept) in, those that ship out. Raises `SchemeRefused` where they cannot be
    folded together, and `AutoQError` where a number would not fit its dtype.
    """
    schemes = {name: weight.scheme for name, weight in weights.items()}
    if not any(map(folding.is_folded, schemes.values())):
        yield weights
        return
    if (rule := folding.conflict(model.info.layers, schemes)) is not None:
        raise SchemeRefused(f"scales of inputs cannot be folded: {rule}")
    model.restore()
    fold = _Fold(model, dict(weights))
    try:
        for module in folding.readers(model.info.layers):
            fold.take(module)
        yield {name: without_scales(weight) for name, weight in fold.weights.items()}
    finally:
        fold.undo()


class _Fold:
    """A fold under way: `weights` as they are so far."""

    def __init__(self, model: LoadedModel, weights: dict[str, QuantizedWeight]) -> None:
        self.model, self.weights = model, weights
        self.before: list[tuple[Any, str, Tensor]] = []  # owner, parameter, tensor

    def take(self, module: str) -> None:
        """Fold the scales of all that reads `module`."""
        own = folding.readers(self.model.info.layers)[module]
        scales: Tensor | None = None
        for layer in own:
            weight = self.weights.get(layer.name)
            if weight is None or FOLDED not in weight.tensors:
                continue
            assert layer.source is not None
            place, wanted = channels(layer.source), weight.tensors[FOLDED].float()
            if scales is None:
                scales = torch.full((self._outputs(layer.source),), torch.nan)
            known = scales[place]
            if not torch.equal(torch.where(known.isnan(), wanted, known), wanted):
                raise SchemeRefused(f"{layer.name} has other scales than layers that read the same inputs")
            scales[place] = wanted
            if not torch.equal(scales[place], wanted):
                raise SchemeRefused(f"{layer.name} has several scales for inputs that are one")
        if scales is None:
            return
        scales.nan_to_num_(1.0)
        for layer in own:
            assert layer.source is not None
            if isinstance(self._scheme(layer.name), Keep):
                self._kept(layer.name, columns=scales[channels(layer.source)])
        assert own[0].source is not None
        self._divide(own[0].source, scales)

    def undo(self) -> None:
        """Put everything back."""
        for owner, name, tensor in reversed(self.before):
            if name:
                getattr(owner, name).data = tensor
            else:
                self.model.replace(owner, tensor)

    def _outputs(self, source: Source) -> int:
        if source.kind == "rows":
            return self.model.info.layer(source.module).out_features
        return len(self.model.model.get_submodule(source.module).weight)  # type: ignore[arg-type]

    def _scheme(self, name: str) -> Any:
        return self.weights[name].scheme if name in self.weights else Keep()

    def _divide(self, source: Source, scales: Tensor) -> None:
        module: Any = self.model.model.get_submodule(source.module)
        if getattr(module, "bias", None) is not None:
            self._parameter(module, "bias", module.bias.data.float().cpu() / scales, source.module)
        match source.kind:
            case "gain":
                self._parameter(module, "weight", module.weight.data.float().cpu() / scales, source.module)
            case "gain_plus_one":
                gain = (1 + module.weight.data.double().cpu()) / scales - 1
                self._parameter(module, "weight", gain, source.module)
            case "rows" if isinstance(self._scheme(source.module), Keep):
                self._kept(source.module, rows=scales)
            case "rows":
                self.weights[source.module] = _rows_over(self.weights[source.module], scales)

    def _parameter(self, owner: Any, name: str, value: Tensor, told: str) -> None:
        old = getattr(owner, name).data
        self.before.append((owner, name, old))
        getattr(owner, name).data = _fitting(value, old, f"{told}.{name}")

    def _kept(self, name: str, columns: Tensor | None = None, rows: Tensor | None = None) -> None:
        """A weight that is not quantized, its columns times or its rows over scales."""
        old = self.model.weight(name)
        changed = old.float().cpu() * (torch.ones(()) if columns is None else columns)
        new = _fitting(changed if rows is None else changed / rows[:, None], old, name)
        self.before.append((name, "", old))
        self.model.replace(name, new)
        if name in self.weights:
            self.weights[name] = dataclasses.replace(self.weights[name], tensors={"weight": new.cpu().contiguous()})


def _fitting(value: Tensor, old: Tensor, name: str) -> Tensor:
    found = value.to(old.device, old.dtype)
    if not found.isfinite().all():
        raise AutoQError(f"{name} with the scales folded into it does not fit {old.dtype}")
    return found


def _rows_over(weight: QuantizedWeight, scales: Tensor) -> QuantizedWeight:
    """The weight whose rows are over `scales` (out,), powers of two."""
    name = "codebook" if isinstance(weight.scheme, Codebook) and "codebook" in weight.tensors else "scales"
    old = weight.tensors[name]
    new = old.float() / scales.view(-1, *(1 for _ in old.shape[1:]))
    if not new.isfinite().all() or not torch.equal(new.to(old.dtype).float(), new):
        raise AutoQError(f"a weight of {weight.scheme} has scales that cannot take those that are folded into them")
    assert not (isinstance(weight.scheme, Integer) and old.shape[0] == 1 and len(scales) > 1), weight.scheme
    return dataclasses.replace(weight, tensors={**weight.tensors, name: new.to(old.dtype)})
