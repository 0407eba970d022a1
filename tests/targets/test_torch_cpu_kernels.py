"""Packed kernels compute what the dequantized weights compute."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.nn.functional as F

from autoq.targets import _torch_cpu_kernels as kernels
from autoq.targets._torch_cpu_assembly import TOLERANCE


def relative(found, expected):
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("lead", [(1,), (5,), (2, 7), (3, 1, 2)])
@pytest.mark.parametrize(("out", "inputs"), [(80, 128), (16, 512), (192, 64)])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(
    "scheme", ["rtn-int4-g64", "rtn-int4-g32-sym", "hqq-int4-g64-rz", "rtn-int4-channel", "rtn-int8-channel-sym"]
)
def test_weight_only_kernels_agree_with_dequantized_weights(quantize, scheme, out, inputs, lead, biased):
    torch.manual_seed(out + inputs)
    weight = quantize(torch.randn(out, inputs).bfloat16(), scheme)
    bias = torch.randn(out).bfloat16() if biased else None
    if "int8" in scheme:
        packed = kernels.Int8Linear.from_weight(weight, bias)
    else:
        packed = kernels.Int4Linear.from_weight(weight, bias, 64 if "g64" in scheme else 32)
    x = torch.randn(*lead, inputs).bfloat16()
    found = packed(x)
    assert found.dtype == torch.bfloat16
    assert found.shape == (*lead, out)
    expected = F.linear(x.float(), weight.dequantize(torch.float32), None if bias is None else bias.float())
    assert relative(found, expected) < TOLERANCE


@pytest.mark.parametrize("engine", kernels.engines())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dynamic_kernel_agrees_with_fake_quantized_activations(quantize, engine, dtype):
    torch.manual_seed(2)
    weight = quantize(torch.randn(33, 70), "rtn-int8-channel-sym")
    bias = torch.randn(33).to(dtype)
    packed = kernels.DynamicLinear.from_weight(weight, bias, engine)
    for x in (torch.randn(1, 70), 3 + torch.randn(2, 9, 70), -torch.rand(4, 70), torch.zeros(2, 70)):
        x = x.to(dtype)
        found = packed(x)
        assert found.dtype == dtype
        expected = F.linear(kernels.dynamic_activation(x.float()), weight.dequantize(torch.float32), bias.float())
        assert relative(found, expected) < (TOLERANCE if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize("engine", kernels.engines())
@pytest.mark.parametrize("spread", [1e-5, 1e-3, 1.0, 1e4])
@pytest.mark.parametrize("shift", [-2.0, 0.0, 5.0])
def test_activation_is_the_rounding_that_the_kernel_applies(engine, spread, shift):
    # Through an identity matrix the kernel gives its rounded activations back.
    identity = kernels.DynamicLinear(torch.eye(64, dtype=torch.int8), torch.ones(64), None, engine)
    torch.manual_seed(3)
    x = (torch.randn(400, 64) + shift) * spread
    seen, expected = identity(x), kernels.dynamic_activation(x)
    step = (torch.aminmax(x).max.clamp(min=0) - torch.aminmax(x).min.clamp(max=0)).item() / 255
    different = (seen - expected).abs() > 1e-5 * x.abs().max()
    # Ties between two steps may fall either way: the kernels multiply by 1/scale in other orders.
    assert different.float().mean() < 1e-3
    assert (seen - expected).abs().max() <= 1.02 * max(step, 6.2e-5)


def test_activation_keeps_dtype_and_lets_what_is_not_finite_through():
    x = torch.randn(3, 5).bfloat16()
    assert kernels.dynamic_activation(x).dtype == torch.bfloat16
    for bad in (torch.nan, torch.inf):
        x[1, 2] = bad
        assert kernels.dynamic_activation(x) is x


@pytest.mark.parametrize("engine", kernels.engines())
@pytest.mark.parametrize("rows", [1, 64])
def test_the_largest_operands_do_not_saturate(engine, rows):
    packed = kernels.DynamicLinear(torch.full((64, 256), 127, dtype=torch.int8), torch.ones(64), None, engine)
    assert torch.allclose(packed(torch.ones(rows, 256)), torch.full((rows, 64), 256 * 127.0), rtol=1e-3)


@pytest.mark.skipif("onednn" not in kernels.engines(), reason="only oneDNN can be told to use fewer instructions")
def test_without_vnni_instructions_activations_keep_to_seven_bits():
    program = """
        import torch
        from autoq.targets import _torch_cpu_kernels as kernels
        assert kernels.reduced_range()
        packed = kernels.DynamicLinear(torch.full((64, 256), 127, dtype=torch.int8), torch.ones(64), None, "onednn")
        assert torch.allclose(packed(torch.ones(3, 256)), torch.full((3, 64), 256 * 127.0), rtol=1e-3)
        x = torch.randn(50, 64)
        assert kernels.dynamic_activation(x).unique().numel() <= 128
    """
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], env=environment, check=True)


@pytest.mark.parametrize("engine", kernels.engines())
def test_packing_leaves_the_engine_as_it_was_and_warns_nothing(engine):
    before = torch.backends.quantized.engine
    kernels.DynamicLinear(torch.ones(4, 4, dtype=torch.int8), torch.ones(4), None, engine)
    assert torch.backends.quantized.engine == before


def test_lookup_gives_the_dequantized_rows_to_the_bit(quantize):
    torch.manual_seed(4)
    weight = quantize(torch.randn(50, 24).bfloat16(), "rtn-int8-channel-sym")
    ids = torch.randint(50, (2, 3, 4))
    found = kernels.Int8Embedding.from_weight(weight)(ids)
    assert torch.equal(found, F.embedding(ids, weight.dequantize(torch.bfloat16)))


def test_inputs_that_start_anywhere_in_memory_are_safe(quantize):
    torch.manual_seed(5)
    weight = quantize(torch.randn(8, 32).bfloat16(), "rtn-int8-channel-sym")
    packed = kernels.Int8Linear.from_weight(weight, None)
    buffer = torch.randn(200).bfloat16()
    for offset in range(20):
        x = buffer[offset : offset + 32].view(1, 32)
        assert relative(packed(x), F.linear(x.float(), weight.dequantize(torch.float32))) < TOLERANCE
    strided = torch.randn(4, 70).bfloat16()[:, 3:35]
    assert relative(packed(strided), F.linear(strided.float(), weight.dequantize(torch.float32))) < TOLERANCE
