"""llama.cpp's own mixes, against what its llama-quantize wrote for the same shapes."""

from __future__ import annotations

from collections import Counter

import pytest

from autoq.errors import ModelRefused
from autoq.layer import Layer, ModelInfo
from autoq.targets._llama_cpp_presets import presets

# part -> (rows, columns) in units of the width
_LLAMA = {
    "self_attn.q_proj": (1, 1),
    "self_attn.k_proj": (1 / 3, 1),
    "self_attn.v_proj": (1 / 3, 1),
    "self_attn.o_proj": (1, 1),
    "mlp.gate_proj": (8 / 3, 1),
    "mlp.up_proj": (8 / 3, 1),
    "mlp.down_proj": (1, 8 / 3),
}


def llama(width: int, blocks: int, tied: bool = True, parts=None, architecture: str = "LlamaForCausalLM") -> ModelInfo:
    layers = [
        Layer(f"model.layers.{block}.{part}", "linear", round(rows * width), round(columns * width), 2, block=block)
        for block in range(blocks)
        for part, (rows, columns) in (parts or _LLAMA).items()
    ]
    embedding = "model.embed_tokens"
    if tied:
        layers.append(Layer("lm_head", "head", 1000, width, 2, tied=(embedding,)))
    else:
        layers = [Layer(embedding, "embedding", 1000, width, 2), *layers, Layer("lm_head", "head", 1000, width, 2)]
    return ModelInfo(architecture, "causal", "bfloat16", 1000, 2048, tuple(layers), 0)


def types(info: ModelInfo, preset: str, part: str = "") -> list[str]:
    """The types of the layers whose name ends in `part`, in the model's order."""
    found = presets(info)[preset]
    return [found[layer.name].type for layer in info.layers if layer.name.endswith(part)]


# What llama-quantize makes of SmolLM2-135M: 30 blocks, width 576, tied head.
SMOLLM2 = llama(576, 30)


@pytest.mark.parametrize(
    ("preset", "expected"),
    [
        ("q8_0", {"q8_0": 211}),
        ("q6_k", {"q6_k": 30, "q8_0": 181}),
        ("q5_0", {"q5_0": 210, "q8_0": 1}),
        ("q4_k_m", {"q4_k": 16, "q6_k": 14, "q5_0": 166, "q8_0": 15}),
        ("q4_0", {"q4_0": 210, "q8_0": 1}),
    ],
)
def test_where_256_does_not_divide_another_type_is_taken(preset, expected):
    assert Counter(types(SMOLLM2, preset)) == expected


def test_the_blocks_that_get_more_bits():
    """From a file that llama-quantize wrote: the first three, the last four, and every third between."""
    more = [i for i, kind in enumerate(types(SMOLLM2, "q4_k_m", "down_proj")) if kind == "q6_k"]
    assert more == [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, 26, 27, 28, 29]
    values = [i for i, kind in enumerate(types(SMOLLM2, "q4_k_m", "v_proj")) if kind == "q8_0"]
    assert values == more


class TestRowsThat256Divides:
    INFO = llama(768, 32, tied=False)

    def test_the_head_has_six_bits_and_the_embedding_the_usual_type(self):
        for preset, usual in (("q4_k_m", "q4_k"), ("q5_k_m", "q5_k"), ("q3_k_m", "q3_k"), ("q4_0", "q4_0")):
            assert types(self.INFO, preset, "lm_head") == ["q6_k"]
            assert types(self.INFO, preset, "embed_tokens") == [usual]
        assert types(self.INFO, "q8_0", "lm_head") == ["q8_0"]

    def test_q3_k_m(self):
        assert types(self.INFO, "q3_k_m", "v_proj") == ["q5_k"] * 2 + ["q4_k"] * 30
        assert types(self.INFO, "q3_k_m", "down_proj") == ["q5_k"] * 2 + ["q4_k"] * 30
        assert set(types(self.INFO, "q3_k_m", "o_proj")) == {"q4_k"}
        assert set(types(self.INFO, "q3_k_m", "gate_proj")) == {"q3_k"}

    def test_q2_k(self):
        assert set(types(self.INFO, "q2_k", "down_proj")) == {"q3_k"}
        assert set(types(self.INFO, "q2_k", "v_proj")) == {"q3_k"}
        assert set(types(self.INFO, "q2_k", "q_proj")) == {"q2_k"}


def test_values_that_many_heads_share_get_more_bits():
    shared = {**_LLAMA, "self_attn.k_proj": (1 / 4, 1), "self_attn.v_proj": (1 / 4, 1)}
    info = llama(1024, 8, parts=shared)
    assert set(types(info, "iq4_xs", "v_proj")) == {"q5_k"}
    assert set(types(info, "q2_k", "v_proj")) == {"q4_k"}
    assert set(types(llama(768, 8), "iq4_xs", "v_proj")) == {"iq4_xs"}


def test_what_llama_cpp_calls_70b():
    shared = {**_LLAMA, "self_attn.k_proj": (1 / 8, 1), "self_attn.v_proj": (1 / 8, 1)}
    info = llama(2048, 80, parts=shared)
    assert set(types(info, "q4_k_m", "v_proj")) == {"q5_k", "q6_k"}
    assert set(types(info, "q4_k_m", "q_proj")) == {"q4_k"}


def test_one_tensor_of_queries_keys_and_values_counts_as_values():
    parts = {
        "self_attn.qkv_proj": (3, 1),
        "self_attn.o_proj": (1, 1),
        "mlp.gate_up_proj": (4, 1),
        "mlp.down_proj": (1, 2),
    }
    info = llama(512, 16, tied=False, parts=parts, architecture="Phi3ForCausalLM")
    assert types(info, "q4_k_m", "qkv_proj")[:3] == ["q6_k", "q6_k", "q4_k"]


def test_rows_that_nothing_divides_stay_in_half_precision():
    assert set(types(llama(24, 1), "q4_0", "q_proj")) == {"f16"}


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ModelRefused, match="BloomForCausalLM"):
        presets(llama(64, 1, architecture="BloomForCausalLM"))
