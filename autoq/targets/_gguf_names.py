"""Which models a GGUF file can hold here, and what their tensors are called in it.

llama.cpp computes an architecture by code of its own, so a model can be written only if that code does
what transformers does. Each family below was checked by its logits. No torch here: targets ask before a
model is loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from autoq.errors import ModelRefused
from autoq.layer import Layer


@dataclass(frozen=True)
class Family:
    """One architecture as llama.cpp knows it.

    `name` is what `general.architecture` holds. Of `rotated` tensors the output rows are in another order:
    llama.cpp turns neighbouring numbers of a head by one angle, transformers numbers half a head apart.
    """

    name: str
    rotated: frozenset[str] = frozenset()


_LLAMA = Family("llama", rotated=frozenset({"attn_q", "attn_k"}))
FAMILIES = {
    "GPT2LMHeadModel": Family("gpt2"),
    "LlamaForCausalLM": _LLAMA,
    "MistralForCausalLM": _LLAMA,
    "Phi3ForCausalLM": Family("phi3"),
    "Qwen2ForCausalLM": Family("qwen2"),
    "Qwen3ForCausalLM": Family("qwen3"),
}


def supported(architecture: str) -> str | None:
    """Why a model of that transformers class cannot be written as GGUF (one clause), or None."""
    if architecture not in FAMILIES:
        return f"GGUF export knows no {architecture}; choose from {', '.join(FAMILIES)}"
    return None


def family(architecture: str) -> Family:
    """The family of a transformers class. Raises `ModelRefused` with the choices."""
    if (reason := supported(architecture)) is not None:
        raise ModelRefused(reason)
    return FAMILIES[architecture]


def tensor_name(architecture: str, layer: str) -> str:
    """The GGUF tensor that holds the layer of that name: `blk.3.ffn_up.weight` for `model.layers.3.mlp.up_proj`.

    A head that shares its weight with the embedding has no tensor of its own: see `layer_tensors`.
    Raises `ModelRefused` for an architecture that is not supported and for a name that it does not have.
    """
    return parameter_name(architecture, f"{layer}.weight")


def parameter_name(architecture: str, parameter: str) -> str:
    """The GGUF tensor that holds a parameter of the model, such as `model.norm.weight`; raises as `tensor_name`."""
    known = family(architecture)
    block = next((int(part) for part in parameter.split(".") if part.isdecimal()), 0)
    found = _names(known.name, block + 1).get_name(parameter, try_suffixes=(".weight", ".bias"))
    if not isinstance(found, str):
        raise ModelRefused(f"{parameter} of {architecture} has no place in a GGUF file of architecture {known.name}")
    return found


@functools.lru_cache(maxsize=512)
def _names(architecture: str, blocks: int) -> Any:
    import gguf

    (number,) = (arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    return gguf.get_tensor_name_map(number, blocks)


def layer_tensors(architecture: str, layers: Iterable[Layer]) -> dict[str, str]:
    """Layer name -> GGUF tensor. A tied head is stored once, as the embedding; llama.cpp then uses it twice.

    Raises `ModelRefused` as `tensor_name`, and where a weight is shared in any other way.
    """
    found = {}
    for layer in layers:
        names = {tensor_name(architecture, name) for name in (layer.name, *layer.tied)}
        if len(names) > 1 and names != {"token_embd.weight", "output.weight"}:
            raise ModelRefused(f"{layer.name} shares its weight with {', '.join(layer.tied)}, which GGUF cannot say")
        found[layer.name] = min(names, key=lambda name: name != "token_embd.weight")
    return found


def heads_of(known: Family, tensor: str, heads: int, kv_heads: int) -> int | None:
    """How many heads the rows of a rotated tensor are to be split into; None for a tensor in its own order."""
    part = tensor.rpartition(".")[0].rpartition(".")[2]
    if part not in known.rotated:
        return None
    return heads if part == "attn_q" else kv_heads
