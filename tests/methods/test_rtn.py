"""Round to nearest: by hand, and against formulas written out a second time."""

from __future__ import annotations

import pytest
import torch

from autoq import plugins
from autoq.methods import Method, _weights
from autoq.scheme import parse_scheme

RTN = plugins.load("methods", "rtn", Method)


def test_two_by_four_by_hand():
    """Row 0 spans [-1, 2]: s = 1, z = 1. Row 1 spans [0, 1.5] once widened to 0: s = 0.5, z = 0."""
    weight = torch.tensor([[-1.0, 0.4, 2.0, 1.6], [0.5, 0.9, 1.5, 0.6]])
    quantized = RTN.quantize(weight, parse_scheme("rtn-int2-channel"))
    assert quantized.codes().tolist() == [[0, 1, 3, 3], [1, 2, 3, 1]]
    assert quantized.scales().tolist() == [[1.0], [0.5]]
    assert quantized.zeros().tolist() == [[1.0], [0.0]]
    assert quantized.dequantize().tolist() == [[-1.0, 0.0, 2.0, 2.0], [0.5, 1.0, 1.5, 0.5]]
    # Codes 0,1,3,3 of 2 bits, lowest bits first: 0b11_11_01_00 and 0b01_11_10_01; a byte for each zero.
    assert quantized.tensors["codes"].tolist() == [[0b11110100], [0b01111001]]
    assert quantized.tensors["zeros"].tolist() == [[1], [0]]
    assert quantized.nbytes == 2 + 4 + 2


def test_two_by_four_symmetric_by_hand():
    """s = 3/1.5 = 2 and 0.75/1.5 = 0.5; codes -2 … 1 are stored as 0 … 3."""
    weight = torch.tensor([[-3.0, 0.9, 3.0, -1.2], [0.75, 0.2, -0.5, 0.3]])
    quantized = RTN.quantize(weight, parse_scheme("rtn-int2-channel-sym"))
    assert quantized.codes().tolist() == [[0, 2, 3, 1], [3, 2, 1, 3]]
    assert quantized.dequantize().tolist() == [[-4.0, 0.0, 2.0, -2.0], [0.5, 0.0, -0.5, 0.5]]
    assert set(quantized.tensors) == {"codes", "scales"}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("symmetric", [True, False])
def test_against_the_formulas_of_compressed_tensors(bits, symmetric):
    """Signed codes there, unsigned here; the values must be equal."""
    weight = torch.randn(32, 96, generator=torch.Generator().manual_seed(bits)) * 0.05
    grouped = weight.view(32, 3, 32)
    low, high = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    least, most = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    if symmetric:
        scale = (torch.maximum(-low, high) / ((most - least) / 2)).bfloat16().float()
        zero = torch.zeros_like(scale)
    else:
        scale = ((high - low) / (most - least)).bfloat16().float()
        zero = (least - low / scale).round().clamp(least, most)
    codes = (grouped / scale[..., None] + zero[..., None]).clamp(least, most).round()
    expected = ((codes - zero[..., None]) * scale[..., None]).view(32, 96)
    text = f"rtn-int{bits}-g32" + ("-sym" if symmetric else "")
    found = RTN.quantize(weight, parse_scheme(text)).dequantize()
    # Two float32 roundings may part at a tie; a tie is a step apart and rare.
    assert ((found - expected).abs() > 1e-7).float().mean() < 1e-3
    assert torch.allclose(found, expected, atol=float(scale.max()) * 1.001)


def test_the_tensor_has_one_scale_and_the_outlier_sets_it():
    weight = torch.zeros(3, 5)
    weight[1, 2] = 7.5
    quantized = RTN.quantize(weight, parse_scheme("rtn-int4-tensor-sym"))
    assert quantized.scales().tolist() == [[1.0]] * 3
    assert quantized.tensors["scales"].shape == (1, 1)
    assert quantized.dequantize()[1, 2] == 7.0


def test_activation_bits_do_not_change_the_weight():
    weight = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    plain, dynamic = (RTN.quantize(weight, parse_scheme(f"rtn-int8-channel-sym{a}")) for a in ("", "-a8dyn"))
    assert torch.equal(plain.dequantize(), dynamic.dequantize())


def test_blocks_of_rows_do_not_show(monkeypatch):
    weight = torch.randn(50, 24, generator=torch.Generator().manual_seed(0))
    schemes = [parse_scheme(f"rtn-int3-{form}") for form in ("g8", "channel", "tensor", "tensor-sym")]
    whole = [RTN.quantize(weight, scheme) for scheme in schemes]
    monkeypatch.setattr(_weights, "BLOCK_ELEMENTS", 100)
    for scheme, expected in zip(schemes, whole, strict=True):
        found = RTN.quantize(weight, scheme)
        assert all(torch.equal(found.tensors[key], tensor) for key, tensor in expected.tensors.items())
        assert torch.equal(found.dequantize(), expected.dequantize())


def test_symmetric_at_the_largest_half_saturates_instead_of_overflowing():
    """-65504 takes the code -8, and 8 steps of 65504/7.5 are more than a half can hold."""
    weight = torch.tensor([[-65504.0, 65504.0]], dtype=torch.float16)
    quantized = RTN.quantize(weight, parse_scheme("rtn-int4-channel-sym"))
    assert quantized.dequantize(torch.float16)[0, 0] == -65504.0
    assert quantized.dequantize()[0, 0] < -69000
