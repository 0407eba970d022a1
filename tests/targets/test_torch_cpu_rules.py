"""Refusals are true at their edges: what is just allowed runs, what is just refused would not."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest
import torch

from autoq.layer import Layer
from autoq.scheme import parse_scheme
from autoq.targets._torch_cpu_assembly import check
from autoq.targets._torch_cpu_kernels import pack
from autoq.targets._torch_cpu_rules import Kernel, kernel_for


def layer(out, inputs, kind="linear", dtype_bytes=2, tied=()):
    return Layer("block.0.proj", kind, out, inputs, dtype_bytes, tied=tied)


@pytest.mark.parametrize(
    ("scheme", "shape", "kernel"),
    [
        ("keep", (7, 5), "as-is"),
        ("rtn-int4-g64", (16, 64), "int4-g64"),
        ("rtn-int4-g32", (48, 96), "int4-g32"),
        ("hqq-int4-g256-rz", (16, 512), "int4-g256"),
        ("rtn-int4-g96", (16, 192), "int4-g32"),
        ("rtn-int4-g512-sym", (16, 1024), "int4-g256"),
        ("rtn-int4-channel", (16, 576), "int4-g64"),
        ("rtn-int4-tensor", (32, 32), "int4-g32"),
        ("rtn-int8-channel-sym", (3, 16), "int8"),
        ("rtn-int8-tensor-sym", (3, 48), "int8"),
        ("rtn-int8-channel-sym-a8dyn", (5, 7), "int8-dynamic"),
    ],
)
def test_what_is_just_allowed_runs(quantize, scheme, shape, kernel):
    chosen = kernel_for(layer(*shape), parse_scheme(scheme))
    assert isinstance(chosen, Kernel)
    assert str(chosen) == kernel
    if kernel == "as-is":
        return
    torch.manual_seed(1)
    module = torch.nn.Linear(shape[1], shape[0]).to(torch.bfloat16).requires_grad_(False)
    weight = quantize(module.weight, scheme)
    check(layer(*shape), weight, chosen, [(module, pack(chosen, weight, module.bias, "fbgemm"))])


@pytest.mark.parametrize(
    ("scheme", "refused", "rule"),
    [
        ("rtn-int4-g64", layer(24, 64), "outputs in multiples of 16"),
        ("rtn-int4-g64", layer(16, 96), "group size 64 does not divide the 96 inputs"),
        ("rtn-int4-g48", layer(16, 96), "not by 48"),
        ("rtn-int4-channel", layer(16, 48), "not by 48"),
        ("rtn-int8-channel-sym", layer(16, 24), "inputs in multiples of 16"),
        ("rtn-int8-channel", layer(16, 64), "no zero point"),
        ("rtn-int8-g64-sym", layer(16, 64), "one scale per output row"),
        ("rtn-int8-g64-sym-a8dyn", layer(16, 64), "int8-channel-sym weights only"),
        ("rtn-int4-channel-sym-a8dyn", layer(16, 64), "int8-channel-sym weights only"),
        ("rtn-int3-g64", layer(16, 64), "no 3-bit kernel"),
        ("kmeans4-channel", layer(16, 64), "no kernel for kmeans4-channel"),
        ("rtn-int4-g64", layer(16, 64, dtype_bytes=4), "bfloat16 model"),
        ("rtn-int8-channel-sym", layer(16, 64, dtype_bytes=4), "bfloat16 model"),
        ("rtn-int8-channel-sym", layer(16, 64, "embedding", dtype_bytes=4), "bfloat16 model"),
        ("rtn-int4-g64", layer(16, 64, "embedding"), "looked up"),
        ("rtn-int8-channel-sym-a8dyn", layer(16, 64, "embedding"), "looked up"),
        ("rtn-int4-g64", layer(16, 64, "head", tied=("embed",)), "looked up"),
        ("rtn-int8-channel-sym", layer(16, 24, "head", tied=("embed",)), "inputs in multiples of 16"),
    ],
)
def test_what_is_refused_names_the_rule(scheme, refused, rule):
    found = kernel_for(refused, parse_scheme(scheme))
    assert isinstance(found, str)
    assert rule in found
    assert "\n" not in found


def test_float32_models_still_have_dynamic_int8_and_heads_alone_have_int4():
    assert str(kernel_for(layer(5, 7, dtype_bytes=4), parse_scheme("rtn-int8-channel-sym-a8dyn"))) == "int8-dynamic"
    assert str(kernel_for(layer(32, 64, "head"), parse_scheme("rtn-int4-g64"))) == "int4-g64"
    assert str(kernel_for(layer(33, 7, "embedding"), parse_scheme("rtn-int8-channel-sym"))) == "int8"


def test_the_int4_kernel_itself_rejects_what_is_refused():
    with pytest.raises(RuntimeError, match="16"):
        torch._convert_weight_to_int4pack_for_cpu(torch.zeros(24, 64, dtype=torch.int32), 1)
    packed = torch._convert_weight_to_int4pack_for_cpu(torch.zeros(16, 96, dtype=torch.int32), 1)
    x = torch.zeros(1, 96, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError):
        torch._weight_int4pack_mm_for_cpu(x, packed, 48, torch.zeros(2, 16, 2, dtype=torch.bfloat16))


def test_the_int8_kernel_crashes_or_miscomputes_on_what_is_refused():
    program = """
        import torch
        torch.manual_seed(0)
        x = torch.randn(4, 20).bfloat16()
        codes = torch.randint(-128, 128, (8, 20), dtype=torch.int8)
        y = torch._weight_int8pack_mm(x, codes, torch.ones(8).bfloat16()).float()
        expected = x.float() @ codes.float().T
        raise SystemExit(0 if (y - expected).norm() < 0.01 * expected.norm() else 3)
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, check=False)
    assert ended.returncode != 0
