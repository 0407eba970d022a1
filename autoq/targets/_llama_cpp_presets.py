"""llama.cpp's own mixes of types, as its `llama-quantize` would make them of a model. No torch.

A name such as Q4_K_M is a default type and a dozen rules on top: more bits for attention values and the
down projections of some blocks, the head in 6 bits, and another type where 256 does not divide a row. The
rules are those of llama_tensor_get_type and tensor_type_fallback in src/llama-quant.cpp (build 11434),
without an importance matrix, for the architectures and types that AutoQ writes. There is one block of each
tensor here, so llama.cpp's running counters are the block's index.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from autoq.layer import Layer, ModelInfo
from autoq.scheme import Gguf, Scheme
from autoq.targets._gguf_names import layer_tensors

# Types whose blocks of 256 do not divide a row fall back to (tensor_type_fallback):
_FALLBACK = {
    "q2_k": "q4_0",
    "q3_k": "q4_0",
    "q4_k": "q5_0",
    "q5_k": "q5_1",
    "q6_k": "q8_0",
    "iq3_s": "iq4_nl",
    "iq3_xxs": "iq4_nl",
    "iq4_xs": "iq4_nl",
}


@dataclass(frozen=True)
class _Place:
    """Where a tensor is: its `part` (`attn_v`, `ffn_down`, …), its block of `blocks`; `shared` is how many query
    heads use one key and value head; `large` says that it is of the size that llama.cpp calls 70B."""

    part: str
    block: int
    blocks: int
    shared: float
    large: bool


def _more_bits(place: _Place) -> bool:
    """The first and last eighth of the blocks, and every third between (use_more_bits)."""
    eighth = place.blocks // 8
    return place.block < eighth or place.block >= 7 * place.blocks // 8 or (place.block - eighth) % 3 == 2


def _q2_k(place: _Place) -> str:
    if place.part == "attn_v":
        return "q4_k" if place.shared >= 4 else "q3_k"
    return "q3_k" if place.part in ("ffn_down", "attn_output") else "q2_k"


def _q3_k_m(place: _Place) -> str:
    if place.part == "attn_v":
        return "q5_k" if place.block < 2 else "q4_k"
    if place.part == "ffn_down":
        return "q5_k" if place.block < place.blocks // 16 else "q4_k"
    return "q4_k" if place.part == "attn_output" else "q3_k"


def _iq4_xs(place: _Place) -> str:
    if place.part == "attn_v":
        return "q5_k" if place.shared >= 4 else "iq4_xs"
    return "q5_k" if place.part == "ffn_down" and place.block < place.blocks // 8 else "iq4_xs"


def _medium(usual: str) -> Callable[[_Place], str]:
    """Q4_K_M and Q5_K_M: 6 bits for some attention values and down projections."""
    return lambda place: "q6_k" if place.part in ("attn_v", "ffn_down") and _more_bits(place) else usual


def _pure(usual: str) -> Callable[[_Place], str]:
    return lambda place: usual


# name -> default type, and what a linear layer gets
_PRESETS: dict[str, tuple[str, Callable[[_Place], str]]] = {
    "q8_0": ("q8_0", _pure("q8_0")),
    "q6_k": ("q6_k", _pure("q6_k")),
    "q5_k_m": ("q5_k", _medium("q5_k")),
    "q5_0": ("q5_0", _pure("q5_0")),
    "q4_k_m": ("q4_k", _medium("q4_k")),
    "q4_0": ("q4_0", _pure("q4_0")),
    "iq4_xs": ("iq4_xs", _iq4_xs),
    "q3_k_m": ("q3_k", _q3_k_m),
    "q2_k": ("q2_k", _q2_k),
}


def presets(info: ModelInfo) -> dict[str, dict[str, Scheme]]:
    """Preset -> layer -> scheme, of every layer. Raises `ModelRefused` for a model that GGUF cannot hold."""
    tensors = layer_tensors(info.architecture, info.layers)
    places = _places(info, tensors)
    own_head = any(tensor == "output.weight" for tensor in tensors.values())
    found: dict[str, dict[str, Scheme]] = {}
    for name, (default, rule) in _PRESETS.items():
        found[name] = {}
        for layer in info.layers:
            tensor = tensors[layer.name]
            if tensor == "output.weight" or (tensor == "token_embd.weight" and not own_head):
                divides = layer.in_features % Gguf(default).block == 0
                kind = "q6_k" if divides and default != "q8_0" else "q8_0"
            elif (place := places.get(layer.name)) is None:
                kind = default
            else:
                kind = rule(place)
                # So many heads share a value tensor of the 70B models that bits there are nearly free.
                if place.part == "attn_v" and place.large and kind in ("q3_k", "q4_k"):
                    kind = "q5_k"
            found[name][layer.name] = Gguf(_dividing(kind, layer))
    return found


def _dividing(kind: str, layer: Layer) -> str:
    """The type itself where its blocks divide the layer's rows, else what llama.cpp takes instead."""
    for choice in (kind, _FALLBACK.get(kind, kind)):
        if layer.in_features % Gguf(choice).block == 0:
            return choice
    return "f16"


def _places(info: ModelInfo, tensors: Mapping[str, str]) -> dict[str, _Place]:
    """Layer -> its place, of the layers in blocks."""
    parts = {}
    for layer in info.layers:
        if (found := re.fullmatch(r"blk\.(\d+)\.(\w+)\.weight", tensors[layer.name])) is not None:
            parts[layer.name] = int(found[1]), found[2]
    blocks = 1 + max((block for block, _ in parts.values()), default=0)
    rows = {part: layer for layer in info.layers for block, part in [parts.get(layer.name, (-1, ""))] if block == 0}
    shared = _sharing(rows)
    large = blocks == 80 and shared > 1
    return {
        # One tensor of queries, keys and values counts as values (category_is_attn_v).
        name: _Place({"attn_qkv": "attn_v"}.get(part, part), block, blocks, shared, large)
        for name, (block, part) in parts.items()
    }


def _sharing(block: Mapping[str, Layer]) -> float:
    """Query heads for each key head, from the rows of one block's tensors."""
    if "attn_q" in block and "attn_k" in block:
        return block["attn_q"].out_features / block["attn_k"].out_features
    if "attn_qkv" in block and "attn_output" in block:
        queries = block["attn_output"].in_features
        return 2 * queries / (block["attn_qkv"].out_features - queries)
    return 1.0
