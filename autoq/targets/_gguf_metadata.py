"""What llama.cpp must know of a model beside its tensors: sizes, norms, rotary positions.

Keys as in the GGUF specification (ggml/docs/gguf.md) and in llama.cpp's own conversion. What transformers
computes and llama.cpp's code for the same architecture does not is refused, by its name in config.json.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from autoq.errors import ModelRefused
from autoq.targets._gguf_names import family

_TANH_GELU = ("gelu_new", "gelu_pytorch_tanh")


def add_metadata(writer: Any, architecture: str, config: Any) -> None:
    """Add the architecture's keys to a `gguf.GGUFWriter`. The same config gives the same keys in the same order.

    Raises `ModelRefused` for a config that asks for what llama.cpp does not compute.
    """
    import gguf

    writer.add_type("model")
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(config.vocab_size)
    if family(architecture).name == "gpt2":
        _add_gpt2(writer, architecture, config)
    else:
        _add_llama_like(writer, architecture, config)


def _require(architecture: str, config: Any, name: str, choices: Sequence[object]) -> None:
    """Refuse a config whose `name`, where it is there, is none of `choices`."""
    value = getattr(config, name, choices[0])
    if value not in choices:
        raise ModelRefused(
            f"GGUF cannot hold this {architecture}: its config has {name} {value!r}, and llama.cpp computes "
            f"{' or '.join(repr(choice) for choice in choices)}"
        )


def _add_gpt2(writer: Any, architecture: str, config: Any) -> None:
    _require(architecture, config, "activation_function", _TANH_GELU)
    _require(architecture, config, "scale_attn_weights", [True])
    _require(architecture, config, "scale_attn_by_inverse_layer_idx", [False])
    _require(architecture, config, "add_cross_attention", [False])
    writer.add_block_count(config.n_layer)
    writer.add_context_length(config.n_positions)
    writer.add_embedding_length(config.n_embd)
    writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
    writer.add_head_count(config.n_head)
    writer.add_layer_norm_eps(config.layer_norm_epsilon)


def _add_llama_like(writer: Any, architecture: str, config: Any) -> None:
    _require(architecture, config, "hidden_act", ["silu", "swish"])
    if family(architecture).name == "qwen3":
        _require(architecture, config, "attention_bias", [False])
    head = head_width(config)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(_context(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    _add_rotary(writer, architecture, config, head)


def head_width(config: Any) -> int:
    """Numbers per attention head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def _context(config: Any) -> int:
    """Tokens up to which llama.cpp computes the same: it attends to all of them, so no more than a window's."""
    window = getattr(config, "sliding_window", None)
    return int(min(config.max_position_embeddings, window or config.max_position_embeddings))


def _add_rotary(writer: Any, architecture: str, config: Any, head: int) -> None:
    import gguf

    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    kinds = ["default", "linear", *(["llama3"] if family(architecture).name == "llama" else [])]
    if kind not in kinds:
        raise ModelRefused(f"GGUF export of {architecture} knows no rope_type {kind!r}; choose from {', '.join(kinds)}")
    writer.add_rope_dimension_count(int(head * rope.get("partial_rotary_factor", 1.0)))
    writer.add_rope_freq_base(rope["rope_theta"])
    if kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])


def rotary_factors(config: Any) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """What each rotary frequency is divided by, (head width / 2,), for Llama 3's scaling; else None."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    scaled, attention = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    assert attention == 1, attention
    width = head_width(config)
    plain = float(rope["rope_theta"]) ** -(np.arange(0, width, 2, dtype=np.float64) / width)
    factors: np.ndarray[Any, np.dtype[np.float32]] = (plain / scaled.double().numpy()).astype(np.float32)
    return factors
