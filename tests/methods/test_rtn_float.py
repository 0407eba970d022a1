"""Floating-point formats: by hand, and against compressed-tensors' own arithmetic on the same scales."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq import plugins
from autoq.methods import Grid, Method, _floats
from autoq.methods._float_weight import magnitudes, power_of_two
from autoq.scheme import PerChannel, PerGroup, PerTensor, parse_scheme

RTN = plugins.load("methods", "rtn", Method)
ALL = ("rtn-fp8-channel", "rtn-fp8-tensor", "rtn-mxfp4-g32", "rtn-nvfp4-g16")
MORE = ("rtn-fp8_e5m2-g32", "rtn-fp4-g16", "rtn-fp8-b8x32", "rtn-mxfp8-g32", "rtn-mxfp6_e2m3-g32", "rtn-mxfp6_e3m2-g32")


def made(weight, text):
    return RTN.quantize(weight, parse_scheme(text))


def gaussian(rows, columns, seed=0):
    return (torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05).bfloat16()


def test_fp8_by_hand():
    """Row 0: s = 896/448 = 2, and 30/2 = 15 is a number of E4M3. Row 1: s = 7/448 = 2^-6."""
    found = made(torch.tensor([[896.0, 30.0, 0.0, -2.0], [7.0, 0.5, -3.5, 0.0]]), "rtn-fp8-channel")
    assert found.scales().tolist() == [[2.0], [0.015625]]
    assert found.values().tolist() == [[448.0, 15.0, 0.0, -1.0], [448.0, 32.0, -224.0, 0.0]]
    assert found.dequantize().tolist() == [[896.0, 30.0, 0.0, -2.0], [7.0, 0.5, -3.5, 0.0]]
    shared = made(torch.tensor([[896.0, 30.0], [7.0, 0.5]]), "rtn-fp8-tensor")
    assert shared.tensors["scales"].tolist() == [[2.0]]
    assert shared.values().tolist() == [[448.0, 15.0], [3.5, 0.25]]


def test_e2m1_rounds_ties_to_the_even_code():
    halves = torch.tensor([0.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0])
    codes = _floats.encode(halves, "e2m1")
    assert codes.tolist() == [0, 0, 2, 2, 4, 4, 6, 6, 7]
    assert _floats.encode(-halves, "e2m1").tolist() == [8, 8, 10, 10, 12, 12, 14, 14, 15]
    above = torch.nextafter(halves[1:-1], torch.full((7,), torch.inf))
    assert _floats.encode(above, "e2m1").tolist() == [1, 2, 3, 4, 5, 6, 7]
    below = torch.nextafter(halves[1:-1], torch.zeros(7))
    assert _floats.encode(below, "e2m1").tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("largest", "scale"), [(6.0, 1.0), (4.0, 1.0), (6.99, 1.0), (7.0, 2.0), (3.4, 0.5), (3.5, 1.0), (3.75, 1.0)]
)
def test_mxfp4_takes_the_next_octave_from_seven_quarters_on(largest, scale):
    weight = torch.zeros(1, 32)
    weight[0, 3] = -largest
    found = made(weight, "rtn-mxfp4-g32")
    assert found.scales().tolist() == [[scale]]
    assert int(found.tensors["scales"]) == 127 + torch.tensor(scale).log2()


def test_mxfp4_packs_the_first_code_into_the_low_half():
    weight = torch.zeros(1, 32)
    weight[0, :3] = torch.tensor([6.0, -0.5, 3.0])
    assert made(weight, "rtn-mxfp4-g32").tensors["codes"][0, :2].tolist() == [0x97, 0x05]


def test_nvfp4_by_hand():
    """The largest weight 21 lies under c = 448 g: 21/6/448 = 2^-7, so g = 2^-7. The second group's c is 32 g."""
    weight = torch.zeros(1, 32)
    weight[0, 0], weight[0, 16], weight[0, 17] = 21.0, -1.5, 0.25
    found = made(weight, "rtn-nvfp4-g16")
    assert found.tensors["global_scale"].tolist() == [2.0**-7]
    assert found.tensors["scales"].float().tolist() == [[448.0, 32.0]]
    assert found.values()[0, [0, 16, 17]].tolist() == [6.0, -6.0, 1.0]
    assert torch.equal(found.dequantize(), weight)


def test_exponents_are_powers_of_two_down_to_the_least():
    assert power_of_two(torch.tensor([0, 1, 127, 130, 254], dtype=torch.uint8)).tolist() == [
        2.0**-127,
        2.0**-126,
        1.0,
        8.0,
        2.0**127,
    ]


@pytest.mark.parametrize("text", [*ALL, *MORE])
@settings(max_examples=30, deadline=None)
@given(exponent=st.integers(-120, 120), seed=st.integers(0, 5))
def test_scaling_by_a_power_of_two_scales_the_result(text, exponent, seed):
    """Floats know no preferred size; only the ends of the formats' ranges do."""
    weight = gaussian(4, 64, seed)
    limited = max(min(exponent, 110), -100 if "nvfp4" in text or "e5m2" in text else -110)
    found = made((weight.double() * 2.0**limited).float(), text).dequantize().double()
    assert torch.equal(found, made(weight, text).dequantize().double() * 2.0**limited)


def args(text):
    from compressed_tensors.quantization import QuantizationArgs

    common = {"type": "float", "symmetric": True}
    return {
        "rtn-fp8-channel": QuantizationArgs(num_bits=8, strategy="channel", **common),
        "rtn-fp8-tensor": QuantizationArgs(num_bits=8, strategy="tensor", **common),
        "rtn-mxfp4-g32": QuantizationArgs(
            num_bits=4, strategy="group", group_size=32, scale_dtype=torch.uint8, zp_dtype=torch.uint8, **common
        ),
        "rtn-nvfp4-g16": QuantizationArgs(
            num_bits=4,
            strategy="tensor_group",
            group_size=16,
            scale_dtype=torch.float8_e4m3fn,
            zp_dtype=torch.float8_e4m3fn,
            **common,
        ),
    }[text]


@pytest.mark.parametrize("text", ALL)
@pytest.mark.parametrize("seed", range(3))
def test_codes_and_numbers_are_those_of_compressed_tensors_on_the_same_scales(text, seed):
    from compressed_tensors.quantization.lifecycle.forward import dequantize, fake_quantize, quantize

    weight = gaussian(48, 128, seed).float()
    weight[3] *= 50
    weight[5, :32] = 0
    found = made(weight, text)
    scale, parts = found.tensors["scales"].float(), {}
    if "mx" in text:
        scale = found.scales().contiguous()
    if "nv" in text:
        parts["global_scale"] = 1 / found.tensors["global_scale"]  # stored as a divisor there
    codes = quantize(weight, scale, None, args(text), **parts)
    assert torch.equal(codes.float(), found.values())
    assert torch.equal(dequantize(codes.float(), scale, None, args(text), **parts), found.dequantize())
    assert torch.equal(fake_quantize(weight, scale, None, args(text), **parts), found.dequantize())


@pytest.mark.parametrize("text", ["rtn-fp8-channel", "rtn-fp8-tensor", "rtn-mxfp4-g32"])
def test_scales_are_those_of_compressed_tensors(text):
    """Computed there in bfloat16, the dtype of the weight; nvfp4 has a global scale of our own choice."""
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = gaussian(400, 64)
    weight[:, :32] *= torch.linspace(0.1, 30, 400).view(-1, 1).bfloat16()
    grouped = weight.view(400, 2, 32) if "mx" in text else weight.view(400, 64)
    low, high = (weight.aminmax() if "tensor" in text else (grouped.amin(-1), grouped.amax(-1)))  # fmt: skip
    expected, _ = calculate_qparams(low, high, args(text))
    assert torch.equal(
        made(weight, text).scales().reshape(-1)[:: 400 if "tensor" in text else 1], expected.float().view(-1)
    )


def test_a_global_scale_of_a_power_of_two_loses_nothing():
    """Its error beside that of compressed-tensors' own choice, on weights of many sizes."""
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

    ratios = []
    for seed in range(6):
        weight = gaussian(64, 256, seed).float() * (1 + seed * 0.13)
        grouped = weight.view(64, 16, 16)
        divisor = generate_gparam(*weight.aminmax())
        scale, _ = calculate_qparams(grouped.amin(-1), grouped.amax(-1), args("rtn-nvfp4-g16"), divisor)
        theirs = fake_quantize(weight, scale, None, args("rtn-nvfp4-g16"), global_scale=divisor)
        ours = made(weight, "rtn-nvfp4-g16").dequantize()
        ratios.append(((ours - weight).square().mean() / (theirs - weight).square().mean()).item())
    assert 0.95 < sum(ratios) / len(ratios) < 1.05, ratios


def test_blocks_of_rows_do_not_show(monkeypatch):
    from autoq.methods import _weights

    weight = gaussian(50, 64)
    whole = [made(weight, text) for text in (*ALL, *MORE)]
    monkeypatch.setattr(_weights, "BLOCK_ELEMENTS", 100)
    for text, expected in zip((*ALL, *MORE), whole, strict=True):
        found = made(weight, text)
        assert all(
            torch.equal(found.tensors[k].view(torch.uint8), t.view(torch.uint8)) for k, t in expected.tensors.items()
        )


def test_a_grid_holds_floats_where_its_axes_do():
    grid = Grid(
        methods=("rtn",),
        bits=(4, 8),
        granularities=(PerGroup(16), PerGroup(32), PerChannel(), PerTensor()),
        zero_points=("none",),
        activations=(None, "a8dyn"),
        formats=("fp8", "mxfp4", "nvfp4"),
    )
    texts = {str(scheme) for scheme in RTN.schemes("rtn", grid)}
    floats = {text for text in texts if "int" not in text}
    grouped = {"rtn-fp8-g16", "rtn-fp8-g32"}
    assert floats == {*ALL, *grouped, "rtn-fp8-channel-a8dyn", "rtn-fp8-tensor-a8dyn"}
    only_four = Grid(("rtn",), (4,), grid.granularities, ("none",), formats=grid.formats)
    assert {str(s) for s in RTN.schemes("rtn", only_four)} & floats == {"rtn-mxfp4-g32", "rtn-nvfp4-g16"}
    asymmetric = Grid(("rtn",), (4,), grid.granularities, ("integer",), formats=grid.formats)
    assert not {str(s) for s in RTN.schemes("rtn", asymmetric)} & floats


def test_every_e2m1_number_has_its_code():
    numbers = torch.cat([magnitudes("e2m1"), -magnitudes("e2m1")])
    assert _floats.encode(numbers, "e2m1").tolist() == [*range(16)]
