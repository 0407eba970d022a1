"""CUDA's kernels: their rules anywhere, what can be computed anywhere, and the rest where there is a GPU."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F

from autoq import plugins
from autoq.errors import ModelRefused
from autoq.layer import Layer
from autoq.scheme import parse_scheme
from autoq.spec import TargetSpec
from autoq.targets import Target
from autoq.targets._cuda_kernels import Fp8Linear, Int8Linear
from autoq.targets._cuda_rules import k_tiles, kernel_for

WORKLOAD = TargetSpec(name="cuda", prompt_tokens=32)
CPU = torch.device("cpu")


@pytest.fixture
def target():
    return plugins.load("targets", "cuda", Target)


def layer(out=96, inputs=64, **more):
    return Layer("proj", more.pop("kind", "linear"), out, inputs, more.pop("dtype_bytes", 2), **more)


@pytest.mark.parametrize(
    ("text", "kernel"),
    [
        ("keep", "as-is"),
        ("rtn-int4-g64", "int4-g64"),
        ("hqq-int4-g32-rz", "int4-g32"),
        ("rtn-int4-channel-sym", "int4-g64"),
        ("rtn-int8-channel-sym-a8dyn", "int8"),
        ("rtn-int8-tensor-sym-a8dyn", "int8"),
        ("rtn-fp8-channel-a8dyn", "fp8"),
    ],
)
def test_the_kernel_of_a_scheme(text, kernel):
    assert str(kernel_for(layer(), parse_scheme(text))) == kernel


@pytest.mark.parametrize(
    ("text", "changes", "reason"),
    [
        ("rtn-int8-channel-sym", {}, "no 8-bit kernel for unquantized activations"),
        ("rtn-int3-g64", {}, "no 3-bit kernel"),
        ("rtn-int8-channel-a8dyn", {}, "int8-channel-sym weights only"),
        ("rtn-int4-g64-sym-a8dyn", {}, "int8-channel-sym weights only"),
        ("rtn-int8-channel-sym-a8static", {}, "find the range of each token themselves"),
        ("rtn-fp8-channel", {}, "fp8-channel-a8dyn"),
        ("rtn-mxfp4-g32", {}, "fp8-channel-a8dyn"),
        ("kmeans4-channel", {}, "no kernel for kmeans4-channel"),
        ("gguf-q4_0", {}, "no kernel for gguf-q4_0"),
        ("rtn-int4-g64", {"inputs": 96}, "64 does not divide the 96 inputs of shape (96, 96)"),
        ("rtn-int4-g16", {}, "multiples of 32 inputs, not by 16"),
        ("rtn-int4-g64", {"out": 100}, "outputs in multiples of 8, and the layer has shape (100, 64)"),
        ("rtn-int8-channel-sym-a8dyn", {"out": 100}, "multiples of 8"),
        ("rtn-fp8-channel-a8dyn", {"out": 104}, "multiples of 16"),
        ("rtn-int4-g64", {"dtype_bytes": 4}, "another dtype"),
        ("rtn-int4-g64", {"kind": "embedding"}, "looked up"),
        ("rtn-int4-g64", {"kind": "head", "tied": ("embedding",)}, "looked up"),
    ],
)
def test_what_no_kernel_runs_is_refused_by_its_rule(target, text, changes, reason):
    assert reason in target.refuses(layer(**changes), parse_scheme(text))


def test_packed_int4_takes_the_most_inner_tiles_that_divide():
    assert [k_tiles(inputs) for inputs in (1024, 576, 96, 40)] == [8, 4, 2, None]


def test_a_machine_without_a_gpu_says_so(target, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert target.unavailable() == f"PyTorch {torch.__version__} sees no CUDA device"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert target.unavailable() is None
    monkeypatch.setitem(sys.modules, "torch", None)
    assert target.unavailable() is None or "sees no CUDA device" in target.unavailable()


def test_a_model_on_the_cpu_is_refused(target, tiny):
    with pytest.raises(ModelRefused, match=r"on cpu; set workers\.gpus to 1"):
        target.time(tiny("llama"), {}, WORKLOAD)
    assert "bfloat16" in target.refuses_model(tiny("llama", torch.float32).info)


@pytest.mark.parametrize("rows", [1, 16, 17, 40])
@pytest.mark.parametrize(
    ("text", "packed"), [("rtn-int8-channel-sym-a8dyn", Int8Linear), ("rtn-fp8-channel-a8dyn", Fp8Linear)]
)
def test_eight_bit_products_are_what_the_evaluation_computes(target, quantize, text, packed, rows):
    torch.manual_seed(0)
    weight = quantize(torch.randn(96, 64), text)
    bias = torch.randn(96).bfloat16()
    x = torch.randn(1, rows, 64).bfloat16() * torch.logspace(-3, 3, rows)[:, None].bfloat16()
    found = packed(weight, bias, CPU)(x)
    seen = target.activation(parse_scheme(text))(x.float())
    expected = F.linear(seen, weight.dequantize(torch.float32), bias.float())
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected, rtol=2**-7, atol=2e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuda: PyTorch sees no CUDA device")
def test_on_a_gpu_every_kernel_computes_and_is_timed(target, tiny, deal):
    model = tiny("llama")
    texts = ["rtn-int4-g64", "hqq-int4-g32-rz", "rtn-int8-channel-sym-a8dyn"]
    if torch.cuda.get_device_capability() >= (8, 9):
        texts.append("rtn-fp8-channel-a8dyn")
    weights = deal(model, target, *texts)
    model.model.to("cuda")
    model = type(model)(model.model, None, model.info)
    measured = target.time(model, weights, WORKLOAD)
    assert {m.objective for m in measured} == target.latencies
    assert all(m.kind == "measured" and m.value > 0 and m.detail["unquantized_ms"] > 0 for m in measured)
    table = target.cost_table(model, {name: [weight] for name, weight in weights.items()}, WORKLOAD)
    assert table.covers({name: [str(w.scheme)] for name, w in weights.items()}, sorted(target.latencies))
