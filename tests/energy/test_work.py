"""Work counted by hand, and prices in joules from published constants."""

from __future__ import annotations

import dataclasses

import pytest

from autoq.assignment import Assignment
from autoq.energy import estimate, work
from autoq.energy.estimate import HOST, per_token
from autoq.kv_cache import Cache, KeyValue
from autoq.layer import Layer, ModelInfo
from autoq.scheme import Keep, parse_scheme
from autoq.spec import TargetSpec

WORKLOAD = TargetSpec(batch_size=2, prompt_tokens=10)
KEEP = Keep()


def linear(name, out, inputs, block=0, **more):
    return Layer(name, "linear", out, inputs, 2, block=block, **more)


LLAMA = ModelInfo(
    "LlamaForCausalLM", "causal", "bfloat16", 100, 64,
    (
        linear("model.layers.0.self_attn.q_proj", 8, 8),
        linear("model.layers.0.self_attn.k_proj", 4, 8),
        linear("model.layers.0.self_attn.v_proj", 4, 8),
        linear("model.layers.0.self_attn.o_proj", 8, 8),
        linear("model.layers.0.mlp.up_proj", 16, 8),
        linear("model.layers.0.mlp.down_proj", 8, 16),
        Layer("lm_head", "head", 100, 8, 2, tied=("model.embed_tokens",)),
    ),
    other_bytes=48,
)  # fmt: skip
T5 = ModelInfo(
    "T5ForConditionalGeneration",
    "seq2seq",
    "float32",
    100,
    None,
    (
        Layer("shared", "embedding", 100, 8, 4, tied=("encoder.embed_tokens", "decoder.embed_tokens")),
        *(Layer(f"encoder.block.0.layer.0.SelfAttention.{n}", "linear", 8, 8, 4, block=0) for n in "qkvo"),
        *(Layer(f"decoder.block.0.layer.0.SelfAttention.{n}", "linear", 8, 8, 4, block=1) for n in "qkvo"),
        *(Layer(f"decoder.block.0.layer.1.EncDecAttention.{n}", "linear", 8, 8, 4, block=1) for n in "qkvo"),
        Layer("lm_head", "head", 100, 8, 4),
    ),
    other_bytes=0,
)


def named(info, end):
    return next(layer for layer in info.layers if layer.name.endswith(end))


def test_a_product_counts_two_operations_and_every_byte_once():
    up = named(LLAMA, "up_proj")
    found = work.layer_work(LLAMA, up, KEEP, work.DECODE, WORKLOAD)
    assert found == work.Work(2 * 2 * 16 * 8, 16 * 8 * 2 + 2 * (8 + 16) * 2)
    found = work.layer_work(LLAMA, up, KEEP, work.PREFILL, WORKLOAD)
    assert found == work.Work(2 * 20 * 16 * 8, 16 * 8 * 2 + 20 * (8 + 16) * 2)


def test_a_scheme_changes_bytes_and_not_operations():
    up, scheme = named(LLAMA, "up_proj"), parse_scheme("rtn-int4-channel-sym")
    kept = work.layer_work(LLAMA, up, KEEP, work.DECODE, WORKLOAD)
    found = work.layer_work(LLAMA, up, scheme, work.DECODE, WORKLOAD)
    assert found.operations == kept.operations
    assert kept.moved - found.moved == 16 * 8 * 2 - (16 * 4 + 16 * 2)


def test_a_head_computes_the_last_position_and_looks_up_the_rows_it_is_tied_to():
    head = LLAMA.layers[-1]
    products = 100 * 8 * 2 + 2 * (8 + 100) * 2
    found = work.layer_work(LLAMA, head, KEEP, work.PREFILL, WORKLOAD)
    assert found == work.Work(2 * 2 * 100 * 8, products + 20 * 8 * 2 * 2)
    found = work.layer_work(LLAMA, head, KEEP, work.DECODE, WORKLOAD)
    assert found == work.Work(2 * 2 * 100 * 8, products + 2 * 8 * 2 * 2)


def test_attention_reads_its_cache():
    (attention,) = work.attention_modules(LLAMA)
    assert attention == work.Attention("model.layers.0.self_attn", 8, 8, "decoder")
    found = work.attention_work(LLAMA, attention, work.DECODE, WORKLOAD)
    # 11 tokens are attended to by one: the prompt and itself, whose key and value are written too
    assert found == work.Work(4 * 2 * 11 * 8, 2 * 2 * (12 * 8 + 2 * 8))
    found = work.attention_work(LLAMA, attention, work.PREFILL, WORKLOAD)
    assert found == work.Work(4 * 2 * 55 * 8, 2 * 2 * (20 * 8 + 2 * 10 * 8))
    assert work.cache_bytes(LLAMA, WORKLOAD) == 2 * 10 * 8 * 2


def test_an_encoder_decoder_runs_its_encoder_once():
    def products(end, phase):
        return work.layer_work(T5, named(T5, end), KEEP, phase, WORKLOAD).operations / (2 * 8 * 8)

    assert (products("encoder.block.0.layer.0.SelfAttention.q", work.PREFILL),
            products("encoder.block.0.layer.0.SelfAttention.q", work.DECODE)) == (20, 0)  # fmt: skip
    # keys and values of the encoder's output are computed once, queries for every token
    assert (products("EncDecAttention.k", work.PREFILL), products("EncDecAttention.k", work.DECODE)) == (20, 0)
    assert (products("EncDecAttention.q", work.PREFILL), products("EncDecAttention.q", work.DECODE)) == (2, 2)
    assert [a.reads for a in work.attention_modules(T5)] == ["encoder", "decoder", "cross"]
    assert [a.reads for a in work.active(T5, work.DECODE)] == ["decoder", "cross"]
    assert work.cache_bytes(T5, WORKLOAD) == 2 * (1 + 10) * 16 * 4


def test_experts_multiply_their_share_of_tokens_and_are_read_if_any_comes():
    """Two of eight experts per token; decoding 2 sequences, the prompt 20 tokens."""
    dense = linear("model.layers.0.mlp.experts.0.down_proj", 8, 16)
    expert = dataclasses.replace(dense, stack="model.layers.0.mlp.experts.down_proj", reach=0.25)
    for phase, rows in ((work.DECODE, 2), (work.PREFILL, 20)):
        whole = work.layer_work(LLAMA, dense, KEEP, phase, WORKLOAD)
        found = work.layer_work(LLAMA, expert, KEEP, phase, WORKLOAD)
        assert found.operations == whole.operations / 4 == 2 * (rows / 4) * 8 * 16
        assert found.moved == pytest.approx(8 * 16 * 2 * (1 - 0.75**rows) + rows / 4 * (8 + 16) * 2)
        assert work.runs(LLAMA, expert, phase, WORKLOAD) == pytest.approx(1 - 0.75**rows)
        assert work.runs(LLAMA, dense, phase, WORKLOAD) == 1


@pytest.mark.parametrize(
    ("layers", "widths"),
    [
        ([("h.0.attn.c_attn", 24, 8), ("h.0.attn.c_proj", 8, 8)], (8, 16)),
        ([("layers.0.attention.query_key_value", 24, 8), ("layers.0.attention.dense", 8, 8)], (8, 16)),
        ([("layers.0.self_attn.qkv_proj", 16, 8), ("layers.0.self_attn.o_proj", 8, 8)], (8, 8)),
    ],
)
def test_fused_projections_are_taken_apart(layers, widths):
    info = dataclasses.replace(LLAMA, layers=tuple(linear(*layer) for layer in layers))
    (attention,) = work.attention_modules(info)
    assert (attention.query_width, attention.cache_width) == widths


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": (linear("layers.0.mixer.in_proj", 8, 8),)}, "block 0 has no attention"),
        ({"layers": (linear("up", 8, 8, None),)}, "no attention layers that are known"),
        ({"layers": (*LLAMA.layers, linear("model.layers.1.mlp.up_proj", 8, 8, 1))}, "block 1 has no attention"),
        ({"layers": (linear("encoder.albert_layer_groups.0.attention.query", 8, 8),)}, "share layers"),
        ({"other_bytes": 10**6}, "experts"),
        ({"task": "seq2seq"}, "encoder from decoder"),
        ({"dtype": "float64"}, "float64"),
    ],
)
def test_what_cannot_be_counted_is_refused(change, reason):
    assert work.refuses(LLAMA) is None
    assert work.refuses(T5) is None
    assert reason in work.refuses(dataclasses.replace(LLAMA, **change))


@pytest.mark.parametrize(
    ("text", "computed"),
    [
        ("keep", "bf16"), ("rtn-int4-g32", "bf16"), ("rtn-int8-channel-sym-a8dyn", "int8"), ("kmeans4-channel", "bf16"),
        ("rtn-fp8-channel-a8dyn", "fp8"), ("rtn-fp8-channel", "bf16"), ("gguf-q4_0", "int8"), ("gguf-bf16", "bf16"),
    ],
)  # fmt: skip
def test_products_are_computed_in_the_format_of_their_inputs(text, computed):
    assert work.compute_format(parse_scheme(text), "bfloat16") == computed


def test_energy_is_priced_from_the_cited_table():
    found = per_token(HOST, LLAMA, Assignment({}), WORKLOAD)
    layers = [work.layer_work(LLAMA, layer, KEEP, work.DECODE, WORKLOAD) for layer in LLAMA.layers]
    total = sum(layers, work.other_work(LLAMA, work.DECODE, WORKLOAD))
    # bfloat16: 0.21 pJ to multiply and 0.38 pJ to add in float32; 1.3 nJ per 64 bits of DRAM
    joules = total.operations * (0.21 + 0.38) / 2 * 1e-12 + total.moved / 8 * 1.3e-9
    assert found.joules == pytest.approx(joules / 2)
    parts = found.detail
    assert parts["operations_joule"] + parts["memory_joule"] + parts["idle_joule"] == pytest.approx(found.joules)
    assert parts["tokens"] == 2


def test_fewer_bytes_and_narrower_products_cost_less():
    def joules(text):
        quantized = {layer.name: parse_scheme(text) for layer in LLAMA.layers if layer.kind == "linear"}
        return per_token(HOST, LLAMA, Assignment(quantized), WORKLOAD).detail

    kept, int8, a8 = joules("keep"), joules("rtn-int8-channel-sym"), joules("rtn-int8-channel-sym-a8dyn")
    assert int8["memory_joule"] < kept["memory_joule"]
    assert int8["operations_joule"] == kept["operations_joule"]
    assert a8["operations_joule"] < int8["operations_joule"]


def test_an_encoder_is_priced_per_input_token():
    encoder = dataclasses.replace(LLAMA, task="masked")
    assert work.phases(encoder) == (work.PREFILL,)
    assert per_token(HOST, encoder, Assignment({}), WORKLOAD).detail["tokens"] == 20


def test_the_constants_are_ordered_as_the_hardware_is():
    operation = estimate.HOST.operation
    assert operation["int8"] < operation["bf16"] <= operation["fp8"] < operation["fp16"] < operation["fp32"]
    assert estimate.GPU.byte < estimate.HOST.byte


def test_a_quantized_cache_moves_its_own_bytes_and_computes_as_much():
    cache = Cache("model.layers.0.self_attn", 1, 4, 4, 2, window=16)  # windows do not count, quantized or not
    info = dataclasses.replace(LLAMA, caches=(cache,))
    workload = TargetSpec(batch_size=2, prompt_tokens=70)
    kept, coded = (work.other_work(info, work.DECODE, workload, own) for own in ({}, {cache.name: KeyValue(4)}))
    assert coded.operations == kept.operations
    # 71 tokens are read: 2 groups of keys and 7 tokens as they are, 71 values; one of each is written.
    read = 4 * (2 * (16 + 4) + 7 * 2) + 71 * (2 + 4)
    assert kept.moved - coded.moved == 2 * (72 * 8 * 2 - read - (4 * 2 + 2 + 4))
    energies = [
        per_token(HOST, info, Assignment({}, caches=own), workload).joules for own in ({}, {cache.name: KeyValue(4)})
    ]
    assert energies[1] < energies[0]
