"""Operations and bytes of one prefill or one decode step, counted from a model's skeleton.

Counted are matrix products of layers (2 · rows · in · out operations; weights read once, inputs read
and outputs written once, in the model's dtype), lookups in embeddings, attention (scores and mixing,
2 · queries · keys · width operations each; keys and values read, new ones written) and one reading of
everything else that ships (norms, biases). Element-wise arithmetic is left out: it is less than a
percent of the products. Keys and values are kept for the whole context, so a model with sliding windows is
counted from above; in the model's dtype, or as codes, scales and zeros of a quantized cache. Tokens are taken to
come to experts evenly and at random: an expert multiplies its share of them, and is read if any comes.

A skeleton does not say which layer holds keys and values, nor which tokens a layer sees. Both are told
by the names that transformers gives its modules, and a model whose names say neither is refused.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal

from autoq.kv_cache import KeyValue
from autoq.layer import ONE_PASS, Layer, ModelInfo
from autoq.scheme import Float, Gguf, Integer, Scheme
from autoq.spec import TargetSpec

Phase = Literal["latency_prefill_ms", "latency_decode_ms"]
PREFILL: Phase = "latency_prefill_ms"
DECODE: Phase = "latency_decode_ms"

# What numbers are multiplied in, narrowest first.
ComputeFormat = Literal["int4", "int8", "fp8", "fp16", "bf16", "fp32"]
DTYPE_FORMATS: dict[str, ComputeFormat] = {"float16": "fp16", "bfloat16": "bf16", "float32": "fp32"}
_DTYPE_BYTES = {"float16": 2, "bfloat16": 2, "float32": 4}

_QUERY = {"q_proj", "q", "query", "q_lin"}
_KEY = {"k_proj", "k", "key", "k_lin"}
_VALUE = {"v_proj", "v", "value", "v_lin"}
_FUSED = {"c_attn", "query_key_value", "qkv_proj", "qkv", "Wqkv"}
_OUTPUT = {"o_proj", "c_proj", "dense", "out_proj", "o", "wo"}
_CROSS = re.compile(r"encdec|encoder_attn|cross", re.IGNORECASE)
_SHARED = re.compile(r"albert_layer_groups")


@dataclass(frozen=True)
class Work:
    """`operations`, a multiplication and an addition being two, and `moved` bytes to and from memory."""

    operations: float = 0.0
    moved: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.moved + other.moved)

    def __bool__(self) -> bool:
        return self.operations > 0 or self.moved > 0


@dataclass(frozen=True)
class Attention:
    """One attention module: widths of its queries and of its keys and values together, per token.

    `reads` says whose keys and values they are: the model's own tokens (`decoder`, one after the other),
    all tokens at once (`encoder`), or the encoder's (`cross`).
    """

    name: str
    query_width: int
    cache_width: int
    reads: Literal["decoder", "encoder", "cross"]


def phases(info: ModelInfo) -> tuple[Phase, ...]:
    """The phases that such a model has: what reads in one pass decodes nothing."""
    return (PREFILL,) if info.task in ONE_PASS else (PREFILL, DECODE)


def compute_format(scheme: Scheme, dtype: str) -> ComputeFormat:
    """What a layer under `scheme` is multiplied in: its activations' format, which is the model's dtype unless
    the scheme quantizes them. llama.cpp quantizes the inputs of all its block formats to 8 bits."""
    if isinstance(scheme, Integer | Float) and scheme.activation is not None:
        return "int8" if isinstance(scheme, Integer) else "fp8"
    if isinstance(scheme, Gguf) and scheme.type not in ("f16", "bf16"):
        return "int8"
    return DTYPE_FORMATS[dtype]


@functools.lru_cache(maxsize=16)
def refuses(info: ModelInfo) -> str | None:
    """Why the work of such a model cannot be counted (one clause), or None."""
    if info.dtype not in DTYPE_FORMATS:
        return f"its dtype {info.dtype} has no known arithmetic"
    if any(_SHARED.search(layer.name) for layer in info.layers):
        return "its blocks share layers, and the skeleton does not say how often each runs"
    if info.other_bytes > sum(layer.parameters * layer.dtype_bytes for layer in info.layers):
        return (
            "most of its weights are in tensors that are no layers (experts), and how many of them a token "
            "reads is not known"
        )
    if info.task == "seq2seq" and not {"encoder", "decoder"} <= {_side(layer) for layer in info.layers}:
        return "its layers' names do not tell encoder from decoder"
    attentions = attention_modules(info)
    known = {layer.block for layer in info.layers if _attention_of(layer.name, attentions)}
    for layer in info.layers:
        if layer.kind in ("linear", "conv1d") and layer.block is not None and layer.block not in known:
            return f"block {layer.block} has no attention layers that are known by name, as for {layer.name}"
    return None if attentions else "it has no attention layers that are known by name (q_proj, k_proj, v_proj …)"


@functools.lru_cache(maxsize=16)
def attention_modules(info: ModelInfo) -> tuple[Attention, ...]:
    """The attention modules of a model, found by the names of their layers."""
    siblings: dict[str, dict[str, Layer]] = {}
    for layer in info.layers:
        parent, _, own = layer.name.rpartition(".")
        siblings.setdefault(parent, {})[own] = layer
    return tuple(found for parent, own in siblings.items() if (found := _attention(info, parent, own)) is not None)


def _attention(info: ModelInfo, parent: str, own: dict[str, Layer]) -> Attention | None:
    def width(names: set[str], of: Callable[[Layer], int]) -> int | None:
        return next((of(layer) for name, layer in own.items() if name in names), None)

    def outputs(layer: Layer) -> int:
        return layer.out_features

    query, key, value = (width(names, outputs) for names in (_QUERY, _KEY, _VALUE))
    fused, back = width(_FUSED, outputs), width(_OUTPUT, lambda layer: layer.in_features)
    if fused is not None and back is not None and fused > back:
        # The projection back reads as many numbers as there are queries.
        query, cache = back, fused - back
    elif query is not None and key is not None and value is not None:
        cache = key + value
    else:
        return None
    if info.task in ONE_PASS or _side(next(iter(own.values()))) == "encoder":
        return Attention(parent, query, cache, "encoder")
    return Attention(parent, query, cache, "cross" if _CROSS.search(parent) else "decoder")


def _attention_of(name: str, attentions: tuple[Attention, ...]) -> bool:
    parent = name.rpartition(".")[0]
    return any(parent == attention.name for attention in attentions)


def _side(layer: Layer) -> str:
    parts = layer.name.split(".")
    return "decoder" if "decoder" in parts else "encoder" if "encoder" in parts else "both"


def _rows(info: ModelInfo, layer: Layer, phase: Phase, workload: TargetSpec) -> tuple[int, int]:
    """How many input rows the layer multiplies and how many rows of it are looked up, in one pass."""
    batch, prompt = workload.batch_size, workload.batch_size * workload.prompt_tokens
    parent, _, own = layer.name.rpartition(".")
    if info.task == "seq2seq":
        side = _side(layer)
        crossing = bool(_CROSS.search(parent)) and own in _KEY | _VALUE
        reads_prompt = side == "encoder" or crossing
        products = (prompt if phase == PREFILL else 0) if reads_prompt else batch
        shared = side == "both" and phase == PREFILL
        lookups = products if side == "encoder" else batch + (prompt if shared else 0)
    else:
        products = lookups = prompt if phase == PREFILL else batch
        # Generation needs the logits of the last position only; a pooler reads the first, and so do classes.
        classes = info.task == "classification" and layer.kind == "linear" and layer.block is None
        if (layer.kind == "head" and info.task == "causal") or "pooler" in layer.name.split(".") or classes:
            products = batch
    if layer.kind == "embedding":
        return 0, lookups
    return products, lookups if layer.tied else 0


def runs(info: ModelInfo, layer: Layer, phase: Phase, workload: TargetSpec) -> float:
    """How often the layer runs in one pass: once, but for an expert that perhaps no token comes to."""
    tokens_in, lookups = _rows(info, layer, phase, workload)
    return 1.0 if lookups else 1 - (1 - layer.reach) ** tokens_in


def layer_work(info: ModelInfo, layer: Layer, scheme: Scheme, phase: Phase, workload: TargetSpec) -> Work:
    """One layer's share of one pass over the whole batch under `scheme`."""
    tokens_in, lookups = _rows(info, layer, phase, workload)
    out, inputs, nbytes, wide = layer.out_features, layer.in_features, layer.nbytes(scheme), layer.dtype_bytes
    work = Work()
    if tokens_in:
        products = tokens_in * layer.reach
        read = nbytes * runs(info, layer, phase, workload)
        work += Work(2.0 * products * out * inputs, read + products * (inputs + out) * wide)
    if lookups:
        work += Work(0.0, nbytes * min(lookups, out) / out + lookups * inputs * wide)
    return work


def attention_work(
    info: ModelInfo, attention: Attention, phase: Phase, workload: TargetSpec, scheme: KeyValue | None = None
) -> Work:
    """One attention module's scores, mixing, and traffic with its cache, for the whole batch in one pass.

    Decoding reads the prompt's keys and values and the new token's; a sequence-to-sequence decoder starts
    with one token of its own. `scheme` is the cache's where it is quantized.
    """
    batch, prompt = workload.batch_size, workload.prompt_tokens
    seq2seq = info.task == "seq2seq"
    if attention.reads == "encoder":
        if phase == DECODE:
            return Work()
        queries, pairs, keys, new = prompt, prompt * prompt, prompt, prompt
    elif attention.reads == "cross":
        queries, pairs, keys, new = 1, prompt, prompt, prompt if phase == PREFILL else 0
    elif phase == PREFILL:
        queries = 1 if seq2seq else prompt
        pairs, keys, new = queries * (queries + 1) // 2, queries, queries
    else:
        context = (1 if seq2seq else prompt) + 1
        queries, pairs, keys, new = 1, context, context, 1
    wide = _DTYPE_BYTES[info.dtype]
    cached = (keys + new) * attention.cache_width * wide
    if scheme is not None:
        (own,) = (replace(cache, window=None) for cache in info.caches if cache.name == attention.name)
        cached = own.nbytes(scheme, keys) + own.nbytes(scheme, new)
    moved = batch * (cached + 2 * queries * attention.query_width * wide)
    return Work(4.0 * batch * pairs * attention.query_width, float(moved))


def active(info: ModelInfo, phase: Phase) -> Iterator[Attention]:
    """The attention modules that run in a phase."""
    return (a for a in attention_modules(info) if phase == PREFILL or a.reads != "encoder")


def other_work(
    info: ModelInfo, phase: Phase, workload: TargetSpec, caches: Mapping[str, KeyValue] = MappingProxyType({})
) -> Work:
    """All that is no layer: attention with its `caches`, and one reading of norms, biases and the rest."""
    return sum(
        (attention_work(info, a, phase, workload, caches.get(a.name)) for a in active(info, phase)),
        Work(0.0, float(info.other_bytes)),
    )


def cache_bytes(info: ModelInfo, workload: TargetSpec) -> int:
    """Bytes of the keys and values that one decode step finds in memory; 0 for a model that decodes nothing."""
    if DECODE not in phases(info):
        return 0
    own = 1 if info.task == "seq2seq" else workload.prompt_tokens
    tokens = {"decoder": own, "cross": workload.prompt_tokens, "encoder": 0}
    numbers = sum(tokens[attention.reads] * attention.cache_width for attention in attention_modules(info))
    return workload.batch_size * numbers * _DTYPE_BYTES[info.dtype]


def tokens(info: ModelInfo, workload: TargetSpec) -> int:
    """Tokens that energy is divided by: one per sequence for a decode step, the whole prompt for an encoder."""
    return workload.batch_size * (1 if DECODE in phases(info) else workload.prompt_tokens)
