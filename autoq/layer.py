"""What is known of a model without its weights: layers, shapes, fusion groups, bytes, caches. No torch."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from autoq.kv_cache import Cache
from autoq.scheme import Scheme

LayerKind = Literal["linear", "conv1d", "embedding", "head", "router"]
Task = Literal["causal", "masked", "seq2seq", "encoder", "classification"]
ONE_PASS: frozenset[Task] = frozenset({"masked", "encoder", "classification"})  # they read, and decode nothing

# Calibration keeps no second moments between the inputs of a layer that has more: that matrix alone would take 1 GB.
MOST_HESSIAN_INPUTS = 16384


@dataclass(frozen=True)
class Source:
    """What makes a layer's inputs, if a scale of each input can go there without a change of what the model computes.

    `module` has outputs that are, but for what keeps the scale of each (a product with other numbers, a mean over
    positions, ReLU), what the layer reads: outputs of a norm that multiplies by its weight (`gain`) or by one more
    (`gain_plus_one`), and adds its bias if it has one; or those of a layer, which its weight has a row for (`rows`).
    `channels` are runs of its outputs (first, count), in the order of the layer's inputs; the heads that share a value
    read the same ones. Nothing but layers of this model reads these outputs: all whose source is the same module.
    """

    module: str
    kind: Literal["gain", "gain_plus_one", "rows"]
    channels: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Layer:
    """One quantizable weight.

    `out_features` and `in_features` are those of the mathematical map y = W x, whatever order the
    module stores (GPT-2's Conv1D stores the transpose). For an embedding, `out_features` is the
    number of rows (tokens) and `in_features` the width. A tied head and embedding are one layer,
    of kind `head`, named after the head; `tied` names the other modules that hold the same weight.
    `fusion_group` names the layers that read the same input in the same parent module (q/k/v,
    gate/up): they carry equal group names; a layer alone in its group has None.
    `block` is the index of the repeated block that holds the layer, or None.

    A matrix of one expert of a mixture is a slice of a 3-D parameter, which `stack` names; it is None for all
    other layers. Gate and up are one matrix, as the model holds them: a runtime that runs them as one demands one
    scheme, and for all others a method that works row by row gives the same codes. All matrices of a block's
    experts are one fusion group. `reach` is the share of tokens that the layer sees, if experts see equally many.
    What weighs the experts is a layer of kind `router`. `source` is what scales of the layer's inputs can be folded
    into, or None.
    """

    name: str
    kind: LayerKind
    out_features: int
    in_features: int
    dtype_bytes: int
    has_bias: bool = False
    tied: tuple[str, ...] = ()
    fusion_group: str | None = None
    block: int | None = None
    stack: str | None = None
    reach: float = 1.0
    source: Source | None = None

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return self.out_features * self.in_features

    def nbytes(self, scheme: Scheme) -> int:
        """Bytes that ship for this layer's weight under `scheme`."""
        return _nbytes(scheme, self.out_features, self.in_features, self.dtype_bytes)


@functools.lru_cache(maxsize=65536)
def _nbytes(scheme: Scheme, out_features: int, in_features: int, dtype_bytes: int) -> int:
    """Of few shapes and schemes, and asked for with every layer of every trial."""
    return scheme.nbytes(out_features, in_features, dtype_bytes)


@dataclass(frozen=True)
class Images:
    """What a model of images reads: pixel values (channels, height, width), which are `tokens` rows in its layers.

    An image is one sequence: wherever tokens are counted, it counts as these.
    """

    channels: int
    height: int
    width: int
    tokens: int


@dataclass(frozen=True)
class ModelInfo:
    """A model's skeleton: enough to build the search space before any weight is loaded.

    `other_bytes` is everything that ships beside the layers: norms, biases, positional tables,
    stored buffers. `architecture` is the transformers class name, `dtype` a torch dtype name. `labels` are the
    classes that a classification model tells apart, in the order of its outputs. `caches` are the KV caches of a
    decoder that can be quantized, one per attention module in the order in which they run: all or none. `images` is
    what a model reads instead of token ids, or None; then `vocab_size` is 0.
    """

    architecture: str
    task: Task
    dtype: str
    vocab_size: int
    max_positions: int | None
    layers: tuple[Layer, ...]
    other_bytes: int
    labels: tuple[str, ...] = ()
    caches: tuple[Cache, ...] = ()
    images: Images | None = None

    @property
    def answers(self) -> int:
        """How many numbers each of the model's logits has: its classes, or else its vocabulary."""
        return len(self.labels) or self.vocab_size

    def layer(self, name: str) -> Layer:
        """The layer of that name. Raises `KeyError` where there is none."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Layer]:
        return {layer.name: layer for layer in self.layers}
