"""A model whose layers and KV caches can be swapped for quantized ones: model, target, calibration, bank.

What a worker loads once. Layers are quantized by their methods, through the bank, from statistics that are gathered
once per model and data and kept in this node's cache.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from autoq import folding, plugins, trained
from autoq.assignment import Assignment
from autoq.bank import Bank, unpack
from autoq.cache import cache_dir
from autoq.calibration import curvature
from autoq.calibration.data import parts
from autoq.device import threads
from autoq.errors import AutoQError, BadInput, NotFinite, SchemeRefused
from autoq.layer import Layer
from autoq.methods import Method, QuantizedWeight, Statistics
from autoq.methods._weights import IntegerWeight
from autoq.models import LoadedModel, load
from autoq.models.caches import Read, read
from autoq.models.folding import channels
from autoq.scheme import Integer, Keep, Scheme, kernel_activation
from autoq.spec import StudySpec
from autoq.targets import load_target

CURVATURE_TOKENS = 4096  # more of them changed nothing


@contextlib.contextmanager
def naming(layer: str, scheme: Scheme) -> Iterator[None]:
    """Name the layer and the scheme in what a method raises: it knows neither."""
    try:
        yield
    except (NotFinite, SchemeRefused) as problem:
        raise type(problem)(f"layer {layer} as {scheme}: {problem}") from problem
    except AutoQError:  # of the bank: not this layer's fault
        raise
    except Exception as problem:
        raise AutoQError(f"layer {layer} as {scheme}: {type(problem).__name__}: {problem}") from problem


def _over(scales: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What `function` does to an input that it gets over its scales (in,), in the input's own units and dtype."""
    return function(x.float() / scales).mul(scales).to(x.dtype)


def _over_exactly(scales: Tensor, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The same for powers of two: the function sees the input's own dtype."""
    own = scales.to(x.dtype)
    return function(x / own) * own


class QuantizedModel:
    """The model of a study, with every layer under any scheme at hand: model, data, bank and target, loaded once.

    Raises `AutoQError` where the model, the data or the target cannot be used.
    """

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec
        torch.set_num_threads(spec.workers.cpus or max(1, threads() // spec.workers.count))
        if spec.workers.gpus > 0 and not torch.cuda.is_available():
            raise BadInput(f"workers.gpus is {spec.workers.gpus:g} but this machine has no CUDA device; set it to 0")
        self.device = "cuda" if spec.workers.gpus > 0 else "cpu"
        self.model: LoadedModel = load(spec.model, self.device)
        self.info = self.model.info
        self.parts = parts(spec.data, self.model)
        self.target = load_target(spec.target)
        share = psutil.virtual_memory().available // (4 * spec.workers.count)
        self.share_bytes = share if spec.bank.memory is None else spec.bank.memory
        self.bank = Bank(cache_dir() / "bank", spec.bank.disk, self.share_bytes)
        self._hashes: dict[str, str] = {}
        self._path: Path | None = None
        self._calibrated: dict[tuple[str, Scheme], Callable[[Tensor], Tensor] | None] = {}

    def calibrate(self) -> str:
        """Gather the statistics of the curvature proxy and of the methods into this node's cache; returns the file.

        One forward and one backward pass over the calibration part. A file that is already there for
        the same model and data is used as it is.
        """
        path = self._statistics_path()
        if not curvature.is_whole(path):
            data = self.parts.calibration
            data = data[: max(1, CURVATURE_TOKENS // self.model.length(data))]
            curvature.save(curvature.gather(self.model, data, self.spec.data.seed), path)
            curvature.bound(path.parent, self.spec.bank.disk // 4)
        else:
            with contextlib.suppress(OSError):  # a cache that can only be read
                path.touch()
        return str(path)

    def _hash(self, name: str) -> str:
        if name not in self._hashes:
            self._hashes[name] = self.bank.weight_hash(self.model.weight(name))
        return self._hashes[name]

    def quantized(self, name: str, scheme: Scheme) -> QuantizedWeight:
        """A layer under `scheme`, from the bank or made now."""
        statistics, calibration = self._statistics_for(name, scheme)
        with naming(name, scheme):
            return self.bank.quantized(self.model.weight(name).cpu(), self._hash(name), scheme, statistics, calibration)

    def layers(self, assignment: Assignment, names: Iterable[str] | None = None) -> dict[str, QuantizedWeight]:
        """The layers of an assignment (default: all that are not kept) as they ship, those that the assignment names by
        content as they were stored.

        Raises `AutoQError` where one of these is not on this machine.
        """
        chosen = (n for n, s in assignment.items() if not isinstance(s, Keep)) if names is None else names
        return {name: self._layer(assignment, name) for name in chosen}

    def _layer(self, assignment: Assignment, name: str) -> QuantizedWeight:
        scheme, digest = assignment[name], assignment.trained.get(name)
        if digest is None:
            return self.quantized(name, scheme)
        layer = self.info.layer(name)
        try:
            content = trained.path_of(digest).read_bytes()
        except OSError:
            raise AutoQError(
                f"layer {name} was trained or made in sequence, and its weights {digest[:12]}… are not on this machine"
            ) from None
        return unpack(content, scheme, (layer.out_features, layer.in_features), digest)

    def _dequantized_of(self, assignment: Assignment, name: str) -> Tensor:
        if name not in assignment.trained:
            return self.dequantized(name, assignment[name])
        original = self.model.weight(name)
        return self._layer(assignment, name).dequantize(original.dtype).to(original.device)

    def statistics(self, name: str) -> Statistics:
        """The layer's calibration statistics, gathered where they are not yet."""
        return curvature.load(Path(self.calibrate()), name)

    def _statistics_for(self, name: str, scheme: Scheme) -> tuple[Callable[[], Statistics] | None, str]:
        """How to get a layer's statistics and what they are known by, for a scheme that is made from them."""
        if not plugins.load("methods", scheme.method, Method).uses_statistics(scheme):
            return None, ""
        if folding.is_folded(scheme):
            # Those of the first layer that shares the scales, so that all find the same.
            first = self._sharing(name)[0].name
            return lambda: self.together(name, self.statistics(first)), self._together_key(name)
        return functools.partial(self.statistics, name), self._statistics_path().stem

    def together(self, name: str, statistics: Statistics) -> Statistics:
        """`statistics` of a layer whose scales of inputs are folded, with the weights of all that share them. A key of
        the bank is made of the same things."""
        weights = torch.cat([self.model.weight(layer.name).cpu().float() for layer in self._sharing(name)])
        source = self.info.layer(name).source
        assert source is not None
        return {**statistics, "together": weights, "channels": channels(source)}

    def _together_key(self, name: str) -> str:
        hashes = [f"{layer.name} {self._hash(layer.name)}" for layer in self._sharing(name)]
        told = "\n".join([self._statistics_path().stem, *hashes, str(self.info.layer(name).source)])
        return hashlib.sha256(told.encode()).hexdigest()[:32]

    def _sharing(self, name: str) -> list[Layer]:
        """The layers that share the scales of a layer's inputs: all that read its source, but for routers and a block's
        experts."""
        source = self.info.layer(name).source
        assert source is not None, name
        own = folding.readers(self.info.layers)[source.module]
        return [
            layer
            for layer in own
            if layer.source == source and layer.kind != "router" and (layer.stack is None or source.kind == "rows")
        ]

    def activation(
        self, name: str, scheme: Scheme, weight: QuantizedWeight | None = None
    ) -> Callable[[Tensor], Tensor] | None:
        """What the target's kernel does to the layer's input, which it sees over its scales where it has some.

        These are the scales of `weight`, where that is not what the scheme's method makes of the layer.
        """
        activation = kernel_activation(scheme)
        scaled = isinstance(scheme, Integer) and scheme.scales_inputs and activation is not None
        if activation != "a8static" and not scaled:
            return self.target.activation(scheme)
        if weight is not None or (name, scheme) not in self._calibrated:
            function = self.target.activation(scheme, self.statistics(name) if activation == "a8static" else None)
            if scaled and function is not None:
                made = weight or self.quantized(name, scheme)
                assert isinstance(made, IntegerWeight)
                scales = made.input_scales()
                assert scales is not None
                # Folded ones are powers of two, and inputs over them are numbers of their own type.
                over = _over_exactly if folding.is_folded(scheme) else _over
                function = functools.partial(over, scales.to(self.model.device), function)
            if weight is not None:
                return function
            self._calibrated[name, scheme] = function
        return self._calibrated[name, scheme]

    def swappable(self, assignment: Assignment) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Read]]:
        """What `LoadedModel.swap` takes: layer -> weight, layer -> what happens to its input, cache -> what is read.

        Raises `BadInput` for a scheme of caches on what is none of this model, and the other way round.
        """
        self._refuse_strangers(assignment)
        weights, activations = {}, {}
        for name, scheme in assignment.items():
            if isinstance(scheme, Keep):
                continue
            weights[name] = self._dequantized_of(assignment, name)
            own = self._layer(assignment, name) if name in assignment.trained else None
            if (function := self.activation(name, scheme, own)) is not None:
                activations[name] = function
        return weights, activations, {name: read(scheme.bits) for name, scheme in assignment.caches.items()}

    def _refuse_strangers(self, assignment: Assignment) -> None:
        layers, caches = {layer.name for layer in self.info.layers}, {cache.name for cache in self.info.caches}
        for name in assignment:
            if name not in layers:
                what = "a KV cache, which is kept or of a scheme like kv4" if name in caches else "no layer"
                raise BadInput(f"{name} as {assignment.text(name)}: in {self.spec.model.id} that is {what}")
        for name in assignment.caches:
            if name not in caches:
                what = "a layer, not a KV cache" if name in layers else "no KV cache"
                raise BadInput(f"{name} as {assignment.text(name)}: in {self.spec.model.id} that is {what}")

    def dequantized(self, name: str, scheme: Scheme) -> Tensor:
        """The layer's weight (out, in) under `scheme`, where and as the model has it."""
        original = self.model.weight(name)
        if isinstance(scheme, Keep):
            return original
        statistics, calibration = self._statistics_for(name, scheme)
        with naming(name, scheme):
            dequantized = self.bank.dequantized(
                original.cpu(), self._hash(name), scheme, original.dtype, statistics, calibration
            )
        return dequantized.to(original.device)

    def _statistics_path(self) -> Path:
        if self._path is None:
            self._path = self._find_statistics_path()
        return self._path

    def _find_statistics_path(self) -> Path:
        digest = self._digest()
        digest.update(self.parts.calibration.numpy().tobytes())
        digest.update(f"{self.spec.data.seed} {self.info.task} {CURVATURE_TOKENS} 11".encode())
        return cache_dir() / "statistics" / f"{digest.hexdigest()[:32]}.safetensors"

    def identity(self) -> str:
        """A digest of the model: of every weight, and of what its config says."""
        return self._digest().hexdigest()

    def _digest(self) -> hashlib._Hash:
        digest = hashlib.sha256()
        for layer in self.info.layers:
            digest.update(f"{layer.name} {self._hash(layer.name)}\n".encode())
        # Gradients depend on all that the model computes: norms, biases, and what its config says.
        own = {name for layer in self.info.layers for name in (layer.name, *layer.tied)}
        for name, tensor in self.model.model.state_dict().items():
            if name.removesuffix(".weight") not in own:
                digest.update(f"{name} {self.bank.weight_hash(tensor)}\n".encode())
        config: Any = self.model.model.config
        told = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
        return digest

    @contextlib.contextmanager
    def swapped(self, assignment: Assignment) -> Iterator[None]:
        """The model under `assignment`, then as it was."""
        self.model.swap(*self.swappable(assignment))
        try:
            yield
        finally:
            self.model.restore()
