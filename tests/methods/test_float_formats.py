"""Elements and block formats beside ml_dtypes, compressed-tensors and an oracle that tries every code."""

from __future__ import annotations

import functools
import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq import plugins
from autoq.methods import Grid, Method, _floats
from autoq.methods._float_weight import DTYPES, magnitudes
from autoq.methods._packing import unpack_rows
from autoq.scheme import FLOAT_FORMATS, PerBlock, PerChannel, PerGroup, PerTensor, parse_scheme

RTN = plugins.load("methods", "rtn", Method)
THEIRS = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
BITS = {"e2m1": 4, "e2m3": 6, "e3m2": 6, "e4m3": 8, "e5m2": 8}
TOPS = {"e2m1": 6.0, "e2m3": 7.5, "e3m2": 28.0, "e4m3": 448.0, "e5m2": 57344.0}
SPECIFIED = ("mxfp8", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2")  # scales as OCP Microscaling v1.0 has them


def made(weight, text):
    return RTN.quantize(weight, parse_scheme(text))


def raw_codes(found) -> torch.Tensor:
    """The codes as whole numbers, (out, in)."""
    codes = found.tensors["codes"].view(torch.uint8)
    return codes if found.scheme.bits == 8 else unpack_rows(codes, found.scheme.bits, found.shape[1])


@functools.cache
def numbers(element) -> dict[int, float]:
    """Code -> number, from ml_dtypes; what is infinite or NaN is left out."""
    every = np.arange(2 ** BITS[element], dtype=np.uint8).view(THEIRS[element]).astype(np.float64)
    return {code: float(number) for code, number in enumerate(every) if math.isfinite(number)}


def nearest(value: Fraction, negative: bool, element: str) -> int:
    """The code whose number lies nearest to `value`; of two the even one, of zeros the one with its sign."""
    sign = 2 ** (BITS[element] - 1)
    own = {code: number for code, number in numbers(element).items() if (code >= sign) == negative}
    return min(own, key=lambda code: (abs(Fraction(own[code]) - value), code % 2))


@pytest.mark.parametrize("element", THEIRS)
def test_elements_have_the_numbers_of_ml_dtypes(element):
    assert max(numbers(element).values()) == TOPS[element]
    if element not in DTYPES:
        half = 2 ** (BITS[element] - 1)
        assert magnitudes(element).tolist() == [numbers(element)[code] for code in range(half)]


@pytest.mark.parametrize("element", THEIRS)
def test_rounding_is_that_of_ml_dtypes(element):
    """Every number, every tie and its neighbours, subnormals, signed zeros, and a million others."""
    own = torch.tensor(sorted(set(numbers(element).values())))
    ties = ((own[1:].double() + own[:-1].double()) / 2).float()
    near = [torch.nextafter(ties, torch.full_like(ties, end)) for end in (-torch.inf, torch.inf)]
    generator = torch.Generator().manual_seed(0)
    octaves = torch.randint(-140, 17, (10**6,), generator=generator).double()
    wide = (torch.randn(10**6, generator=generator).double() * 2**octaves).float()
    values = torch.cat([own, ties, *near, wide, torch.tensor([0.0, -0.0, 1e-45, -1e-45, 1e-38])])
    values = values.clamp(-TOPS[element], TOPS[element])
    expected = values.numpy().astype(THEIRS[element]).view(np.uint8)
    assert np.array_equal(_floats.encode(values, element).view(torch.uint8).numpy(), expected)


@pytest.mark.parametrize("element", THEIRS)
def test_numbers_beyond_the_largest_take_it(element):
    for beyond in (1.0001, 1.06, 1.2, 4.0, 1e30):
        codes = _floats.encode(torch.tensor([TOPS[element] * beyond, -TOPS[element] * beyond]), element)
        assert [numbers(element)[code] for code in codes.view(torch.uint8).tolist()] == [TOPS[element], -TOPS[element]]


def block_by_hand(block: list[float], element: str) -> tuple[int, list[int]]:
    """(scale code, codes) of 32 numbers by the specification's section 6.3, in exact arithmetic."""
    largest = max(abs(Fraction(number)) for number in block)
    exponent = -127
    if largest:
        octave = math.frexp(float(largest))[1] - 1  # floor(log2), exact
        exponent = max(-127, min(127, octave - int(math.log2(TOPS[element]))))
    scale = Fraction(2) ** exponent
    return exponent + 127, [nearest(Fraction(x) / scale, math.copysign(1, x) < 0, element) for x in block]


FLOAT32 = st.floats(width=32, allow_nan=False, allow_infinity=False)
SPECIAL = st.sampled_from(
    [0.0, -0.0, 1e-45, -1e-45, 1.1754944e-38, 2.0**-127, 5e-39, 1.0, -1.9375, 1.96875, 1.75, 0.0625, 2.0**-9, 3.3e38]
).map(lambda number: float(np.float32(number)))
ONE_OCTAVE = st.integers(-(2**12), 2**12).map(lambda number: number / 2**9)


@pytest.mark.parametrize("name", SPECIFIED)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_blocks_are_those_of_the_specification(name, data):
    numbers_ = data.draw(st.sampled_from([FLOAT32, SPECIAL, ONE_OCTAVE, st.one_of(FLOAT32, SPECIAL)]))
    block = data.draw(st.lists(numbers_, min_size=32, max_size=32))
    found = made(torch.tensor([block]), f"rtn-{name}-g32")
    scale, codes = block_by_hand(block, FLOAT_FORMATS[name].element)
    assert found.tensors["scales"].tolist() == [[scale]]
    assert raw_codes(found)[0].tolist() == codes


@pytest.mark.parametrize("name", SPECIFIED)
def test_many_gaussian_blocks_are_those_of_the_specification(name):
    weight = torch.randn(12, 96, generator=torch.Generator().manual_seed(3)) * torch.logspace(-20, 20, 12)[:, None]
    weight[3, 32:64] = 0
    found = made(weight, f"rtn-{name}-g32")
    for row in range(12):
        for group in range(3):
            span = slice(32 * group, 32 * group + 32)
            scale, codes = block_by_hand(weight[row, span].tolist(), FLOAT_FORMATS[name].element)
            assert int(found.tensors["scales"][row, group]) == scale
            assert raw_codes(found)[row, span].tolist() == codes


@pytest.mark.parametrize(
    ("name", "largest", "scale", "number"),
    [
        # floor(log2 1.99) = 0; E4M3's largest octave is 2^8, so 1.99 is 509 steps of 2^-8, and 448 is the most.
        ("mxfp8", 1.99, 127 - 8, 448.0),
        ("mxfp8", 1.75, 127 - 8, 448.0),
        ("mxfp8_e5m2", 1.0, 127 - 15, 32768.0),
        ("mxfp6_e2m3", 7.9, 127, 7.5),
        ("mxfp6_e2m3", 8.0, 128, 4.0),
        ("mxfp6_e3m2", 31.0, 127, 28.0),
        ("mxfp6_e3m2", 0.0, 0, 0.0),
        ("mxfp8", 2.0**-126, 0, 2.0),  # 2^-134 is less than the least scale, 2^-127
        ("mxfp8", 3e38, 254 - 8, 448.0),  # 3e38 is 1.76 * 2^127
    ],
)
def test_scales_by_hand(name, largest, scale, number):
    weight = torch.zeros(1, 32)
    weight[0, 9] = -largest
    found = made(weight, f"rtn-{name}-g32")
    assert found.tensors["scales"].tolist() == [[scale]]
    assert found.values()[0, 9] == -number


def test_six_bits_are_a_bit_stream():
    """E2M3 codes 31 (7.5), 33 (-0.125), 0 and 8 (1.0), the lowest bit first: bytes 0x5f, 0x08, 0x20."""
    weight = torch.zeros(1, 32)
    weight[0, :4] = torch.tensor([7.5, -0.125, 0.0, 1.0])
    found = made(weight, "rtn-mxfp6_e2m3-g32")
    assert found.tensors["codes"].shape == (1, 24)
    assert found.tensors["codes"][0, :4].tolist() == [0x5F, 0x08, 0x20, 0]
    assert torch.equal(found.dequantize(), weight)


def test_fp8_e5m2_and_fp4_by_hand():
    """The largest weight takes the largest code: 114688 = 2 * 57344, and 12 = 2 * 6."""
    found = made(torch.tensor([[114688.0, 5.0, 0.0, -3.5]]), "rtn-fp8_e5m2-channel")
    assert found.tensors["scales"].tolist() == [[2.0]]
    assert found.values().tolist() == [[57344.0, 2.5, 0.0, -1.75]]
    found = made(torch.tensor([[12.0, 5.0, -0.25, 1.0, 0.75, 0.1]]), "rtn-fp4-g3")
    assert found.tensors["scales"].float().tolist() == [[2.0, torch.tensor(1 / 6).bfloat16().item()]]
    assert found.values().tolist() == [[6.0, 2.0, -0.0, 6.0, 4.0, 0.5]]  # 2.5 and 0.125 are ties
    assert raw_codes(found).tolist() == [[7, 4, 8, 7, 6, 1]]


def test_fp8_blocks_by_hand():
    """Blocks of 2x4 on 3x6: the last ones hold one row, two columns, or both."""
    weight = torch.tensor(
        [
            [448.0, 1.0, 2.0, 3.0, 4.5, 1.0],
            [1.0, -896.0, 2.0, 3.0, 4.5, 7.0],
            [0.0, 0.0, 0.0, 0.0, 0.875, -1.75],
        ]
    )
    found = made(weight, "rtn-fp8-b2x4")
    least = 2.0**-126
    assert found.tensors["scales"].float().tolist() == [[2.0, 2.0**-6], [least, 2.0**-8]]
    assert found.scales().tolist() == [[2.0, 2.0, 2.0**-6]] * 2 + [[least, least, 2.0**-8]]
    assert torch.equal(found.dequantize(), weight)
    assert found.nbytes == 18 + 4 * 2 == parse_scheme("rtn-fp8-b2x4").nbytes(3, 6, 2)


@pytest.mark.parametrize("element", ["fp8", "fp8_e5m2"])
@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (576, 64), (1, 5)])
def test_a_block_is_a_tensor_of_its_own(element, shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(5)).bfloat16()
    found = made(weight, f"rtn-{element}-b128x128")
    for top in range(0, shape[0], 128):
        for left in range(0, shape[1], 128):
            part = weight[top : top + 128, left : left + 128]
            alone = made(part, f"rtn-{element}-tensor")
            assert torch.equal(found.dequantize()[top : top + 128, left : left + 128], alone.dequantize())
            assert found.tensors["scales"][top // 128, left // 128] == alone.tensors["scales"]


def test_blocks_are_those_of_compressed_tensors():
    from compressed_tensors.quantization import QuantizationArgs
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    weight = torch.randn(256, 384, generator=torch.Generator().manual_seed(6)).bfloat16()
    args = QuantizationArgs(num_bits=8, type="float", strategy="block", block_structure=[128, 128])
    blocks = weight.view(2, 128, 3, 128)
    scale, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
    found = made(weight, "rtn-fp8-b128x128")
    assert torch.equal(found.tensors["scales"], scale)
    assert torch.equal(fake_quantize(weight.float(), scale.float(), None, args), found.dequantize())


def test_four_bit_codes_are_packed_as_compressed_tensors_packs_them():
    from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8

    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(7))
    weight[0, :4] = torch.tensor([0.0, -0.0, 1e-6, -1e-6])
    for text in ("rtn-nvfp4-g16", "rtn-mxfp4-g32", "rtn-fp4-g32"):
        found = made(weight, text)
        assert torch.equal(pack_fp4_to_uint8(found.values()), found.tensors["codes"])


@pytest.mark.parametrize("name", FLOAT_FORMATS)
def test_more_exact_elements_are_more_exact(name):
    """On Gaussian weights, mean squared errors as shares: what each format's mantissa promises, loosely."""
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(8))
    granularity = FLOAT_FORMATS[name].group or 32
    error = (made(weight, f"rtn-{name}-g{granularity}").dequantize() - weight).square().mean().item()
    mantissa = int(FLOAT_FORMATS[name].element[3])
    # Uniform rounding errors of a 2^-m step in each octave: 2^-2m/12 of the octave's square, about half the square.
    assert 0.1 < error / (4.0**-mantissa / 12 / 2) < 3, error


def test_a_grid_holds_blocks_for_floats_alone():
    grid = Grid(("rtn",), (4, 6, 8), (PerGroup(32), PerChannel(), PerTensor()), ("none",), (None, "a8dyn"))
    formats = Grid(**{**vars(grid), "formats": tuple(FLOAT_FORMATS), "blocks": (PerBlock(128, 128),)})
    more = {str(scheme) for scheme in RTN.schemes("rtn", formats)} - {str(s) for s in RTN.schemes("rtn", grid)}
    plain = {f"rtn-{name}-{where}" for name in ("fp8", "fp8_e5m2", "fp4") for where in ("g32", "channel", "tensor")}
    blocks = {"rtn-fp8-b128x128", "rtn-fp8_e5m2-b128x128"}
    own = {f"rtn-{name}-g32" for name in FLOAT_FORMATS if name.startswith("mx")}
    assert more == {*plain, *blocks, *own, "rtn-fp8-channel-a8dyn", "rtn-fp8-tensor-a8dyn"}
