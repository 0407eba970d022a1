"""Assembled models: they compute what swapped weights compute, and leave nothing behind."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch

from autoq import plugins
from autoq.assignment import Assignment
from autoq.errors import KernelMismatch, ModelRefused, SchemeRefused, SpecError
from autoq.scheme import Keep, parse_scheme
from autoq.spec import TargetSpec
from autoq.targets import Target
from autoq.targets import _dealing as dealing
from autoq.targets import _torch_cpu_assembly as assembly
from autoq.targets import _torch_cpu_costs as costs
from autoq.targets import _torch_cpu_kernels as kernels
from autoq.targets import _torch_cpu_timing as timing

SCHEMES = ("rtn-int4-g32", "rtn-int8-channel-sym", "rtn-int8-channel-sym-a8dyn", "rtn-int4-g64-sym")
WORKLOAD = TargetSpec(prompt_tokens=24)


@pytest.fixture
def target():
    return plugins.load("targets", "torch_cpu", Target)


@pytest.fixture(autouse=True)
def short_rounds(monkeypatch):
    monkeypatch.setattr(timing, "STEPS", 3)
    monkeypatch.setattr(timing, "ROUNDS_SECONDS", 0.0)


def state_of(model):
    """What must be as before: the modules, their instance attributes, their weights' storage, hooks."""
    return {
        name: (id(module), sorted(vars(module)), [p.data_ptr() for p in module.parameters(recurse=False)])
        for name, module in model.model.named_modules()
    }


@torch.no_grad()
def logits_of(model, ids):
    return model.outputs(ids).float()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5", "bert"])
def test_assembled_model_computes_what_swapped_weights_compute(tiny, deal, target, family):
    model = tiny(family)
    weights = deal(model, target, *SCHEMES)
    used = {str(weight.scheme) for weight in weights.values()}
    assert used >= set(SCHEMES)
    ids = torch.randint(96, (2, 16), generator=torch.Generator().manual_seed(1))
    original = logits_of(model, ids)
    functions = {n: f for n, w in weights.items() if (f := target.activation(w.scheme)) is not None}
    model.swap({name: weight.dequantize(torch.bfloat16) for name, weight in weights.items()}, functions)
    swapped = logits_of(model, ids)
    model.restore()
    before = state_of(model)
    forwards, chosen = assembly.assemble(model, weights, lambda layer: "fbgemm")
    with assembly.installed(forwards):
        assembled = logits_of(model, ids)
    assert state_of(model) == before
    assert {str(kernel) for kernel in chosen.values()} >= {"int4-g32", "int4-g64", "int8", "int8-dynamic"}
    # Rounding in bfloat16 differs between the two; what quantization itself does is far larger.
    quantized = (swapped - original).norm()
    assert (assembled - swapped).norm() < 0.25 * quantized
    assert torch.equal(logits_of(model, ids), original)


def test_a_tied_head_and_embedding_share_their_codes(tiny, quantize):
    model = tiny("llama")
    head = model.info.layer("lm_head")
    weight = quantize(model.weight("lm_head"), "rtn-int8-channel-sym")
    kernel = assembly.kernel_of(head, weight)
    (_, matmul), (_, lookup) = assembly.packed_modules(model, head, weight, kernel, lambda layer: "fbgemm")
    assert isinstance(matmul, kernels.Int8Linear)
    assert isinstance(lookup, kernels.Int8Embedding)
    assert matmul.codes.data_ptr() == lookup.codes.data_ptr()


@pytest.mark.parametrize(
    ("family", "phases"),
    [
        ("llama", {"latency_decode_ms", "latency_prefill_ms"}),
        ("gpt2", {"latency_decode_ms", "latency_prefill_ms"}),
        ("t5", {"latency_decode_ms", "latency_prefill_ms"}),
        ("bert", {"latency_prefill_ms"}),
    ],
)
def test_time_measures_every_phase_and_restores_everything(tiny, deal, target, family, phases):
    model = tiny(family)
    weights = deal(model, target, *SCHEMES)
    before, threads = state_of(model), torch.get_num_threads()
    measured = target.time(model, weights, TargetSpec(prompt_tokens=24, batch_size=2, threads=1))
    assert state_of(model) == before
    assert torch.get_num_threads() == threads
    assert {m.objective for m in measured} == phases
    for m in measured:
        assert (m.kind, m.part, m.unit) == ("measured", "report", "ms")
        assert m.value > 0
        assert m.stderr is not None
        assert m.n == timing.MIN_ROUNDS * (timing.STEPS if "decode" in m.objective else 1)
        assert m.detail["threads"] == 1
        assert m.detail["batch_size"] == 2
        assert m.detail["kernels"]["rtn-int4-g32"] == "int4-g32"
        assert m.detail["iqr_ms"] >= 0
        assert m.detail["cpu_ms"] > 0
        json.dumps(m.to_json())


def test_time_takes_out_what_was_swapped_in(tiny, target):
    model = tiny("llama")
    name = model.info.layers[0].name
    model.swap({name: torch.full_like(model.weight(name), torch.nan)})
    target.time(model, {}, WORKLOAD)
    assert not model.model.get_submodule(name).weight.isnan().any()


def test_time_restores_the_model_when_a_run_fails(tiny, deal, target, monkeypatch):
    model = tiny("llama")
    weights = deal(model, target, *SCHEMES)
    before, threads = state_of(model), torch.get_num_threads()

    def fails(session, state):
        raise RuntimeError("out of luck")

    monkeypatch.setattr(timing.Session, "step", fails)
    with pytest.raises(RuntimeError, match="out of luck"):
        target.time(model, weights, TargetSpec(prompt_tokens=24, threads=1))
    assert state_of(model) == before
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("kind", ["Int4Linear", "Int8Linear", "DynamicLinear", "Int8Embedding"])
def test_a_kernel_that_computes_something_else_is_caught(tiny, deal, target, monkeypatch, kind):
    right = getattr(kernels, kind).forward
    monkeypatch.setattr(getattr(kernels, kind), "forward", lambda self, x: right(self, x) * 1.02)
    model = tiny("llama")
    weights = deal(model, target, *SCHEMES)
    before = state_of(model)
    with pytest.raises(KernelMismatch, match=r"layer \S+ under rtn-int\S+: the int\S+ kernel is off by 2\.\de-02"):
        target.time(model, weights, WORKLOAD)
    assert state_of(model) == before


def test_swapped_nibbles_are_caught(tiny, quantize, target, monkeypatch):
    right = torch._convert_weight_to_int4pack_for_cpu

    def swapped(codes, tiles):
        packed = right(codes, tiles)
        return (packed >> 4) | (packed << 4)

    monkeypatch.setattr(torch, "_convert_weight_to_int4pack_for_cpu", swapped)
    model = tiny("llama")
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(KernelMismatch, match=name):
        target.time(model, {name: quantize(model.weight(name), "rtn-int4-g32")}, WORKLOAD)


def test_prediction_of_the_unquantized_model_is_its_measurement_and_predictions_add_up(tiny, quantize, target):
    model = tiny("llama")
    choices = {}
    for layer in model.info.layers:
        usable = [text for text in SCHEMES if target.refuses(layer, parse_scheme(text)) is None]
        choices[layer.name] = [quantize(model.weight(layer.name), text) for text in usable]
    before = state_of(model)
    table = target.cost_table(model, choices, WORKLOAD)
    assert state_of(model) == before
    assert set(table.layer_ms) == set(table.base_ms) == set(target.latencies)
    keep = Assignment({layer.name: Keep() for layer in model.info.layers})
    for phase in target.latencies:
        assert table.predict(phase, keep) == pytest.approx(table.detail["unquantized_ms"][phase])
        for name, entries in table.layer_ms[phase].items():
            assert set(entries) == {"keep", *(str(weight.scheme) for weight in choices[name])}
            assert entries["keep"] > 0
            assert min(entries.values()) >= 0, "what noise makes of a layer that takes no time"
        name = "model.layers.1.mlp.up_proj"
        one = Assignment({**keep, name: parse_scheme("rtn-int4-g32")})
        change = table.layer_ms[phase][name]["rtn-int4-g32"] - table.layer_ms[phase][name]["keep"]
        assert table.predict(phase, one) == pytest.approx(table.predict(phase, keep) + change)
        # Layers at the same place of repeated blocks cost the same.
        assert table.layer_ms[phase][name] == table.layer_ms[phase]["model.layers.0.mlp.up_proj"]
    json.dumps(asdict(table))


def test_an_encoder_costs_nothing_at_decode(tiny, quantize, target):
    model = tiny("t5")
    names = ["encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q"]
    choices = {name: [quantize(model.weight(name), "rtn-int8-channel-sym")] for name in names}
    table = target.cost_table(model, choices, WORKLOAD)
    encoder, decoder = (table.layer_ms["latency_decode_ms"][name] for name in names)
    assert set(encoder.values()) == {0.0}
    assert decoder["keep"] > 0
    assert min(decoder.values()) >= 0


def test_schemes_on_one_kernel_are_timed_once(tiny, quantize, target):
    model = tiny("llama")
    name = "model.layers.0.mlp.up_proj"
    texts = ["rtn-int4-g32", "rtn-int4-g32-sym", "hqq-int4-g32-rz"]
    table = target.cost_table(model, {name: [quantize(model.weight(name), t) for t in texts]}, WORKLOAD)
    for phase in target.latencies:
        assert len({table.layer_ms[phase][name][text] for text in texts}) == 1


def test_every_layer_kind_meets_every_kernel(tiny, quantize, target):
    model = tiny("llama")
    texts = ["rtn-int4-g32", "rtn-int4-g64", "rtn-int8-channel-sym", "rtn-int8-channel-sym-a8dyn"]
    choices = {
        layer.name: [quantize(model.weight(layer.name), t) for t in texts]
        for layer in model.info.layers
        if layer.kind == "linear"
    }
    kinds = costs._kinds(model, choices)
    assert len(kinds) == 7
    dealt = dealing.leaders(kinds)
    for kind in kinds:
        met = {deal[layer.name][0] for deal in dealt for layer in kind.layers}
        assert met == set(kind.kernels) - {costs.KEEP}
        assert len(kind.kernels) == 5


def test_refusals_of_models_are_one_clear_line(tiny, quantize, target):
    with pytest.raises(ModelRefused, match="bfloat16 or float32, not float16"):
        target.time(tiny("llama", torch.float16), {}, WORKLOAD)
    with pytest.raises(SpecError, match=r"target\.prompt_tokens: 128 is too long for a model of 128 positions"):
        target.time(tiny("llama"), {}, TargetSpec(prompt_tokens=128))
    model = tiny("llama", torch.float32)
    name = model.info.layers[0].name
    with pytest.raises(SchemeRefused, match=f"rtn-int4-g32 on layer {name}: .*bfloat16 model"):
        target.time(model, {name: quantize(model.weight(name), "rtn-int4-g32")}, WORKLOAD)


def test_a_module_that_does_more_than_its_weight_says_is_refused(tiny, quantize, target):
    class Scaled(torch.nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 8

    model = tiny("llama")
    embedding = model.model.model.embed_tokens
    embedding.__class__ = Scaled
    with pytest.raises(ModelRefused, match="lm_head: a Scaled does more than a plain"):
        target.time(model, {"lm_head": quantize(model.weight("lm_head"), "rtn-int8-channel-sym")}, WORKLOAD)


def test_float32_models_run_dynamic_int8(tiny, deal, target):
    model = tiny("gpt2", torch.float32)
    weights = deal(model, target, "rtn-int8-channel-sym-a8dyn")
    chosen = {m.objective: m.detail["kernels"] for m in target.time(model, weights, WORKLOAD)}
    assert chosen["latency_prefill_ms"] == {"keep": "as-is", "rtn-int8-channel-sym-a8dyn": "int8-dynamic"}


def test_timing_poisons_no_later_gradient(tiny, target):
    model = tiny("llama")
    target.time(model, {}, WORKLOAD)
    name = model.info.layers[0].name
    weight = model.model.get_submodule(name).weight.requires_grad_(True)
    model.outputs(torch.arange(8)[None]).float().logsumexp(-1).sum().backward()
    assert weight.grad is not None


def test_available_here(target):
    assert target.unavailable() is None
