"""GGUF types: bytes and numbers against the package gguf, importance against what it is for."""

from __future__ import annotations

import subprocess
import sys

import gguf
import libgguf
import numpy as np
import pytest
import torch

from autoq import plugins
from autoq.errors import SchemeRefused
from autoq.layer import Layer
from autoq.methods import Grid, Method
from autoq.scheme import GGUF_TYPES, Gguf, Integer, PerChannel

METHOD = plugins.load("methods", "gguf", Method)
LINEAR = Layer("x", "linear", 24, 512, dtype_bytes=2)
BLOCKS = [kind for kind in GGUF_TYPES if kind not in ("f16", "bf16")]
IMPORTANT = [kind for kind in BLOCKS if kind not in ("q8_0", "mxfp4")]
# The types that the package gguf can make, too. ggml's own code is written out there a second time, in numpy.
MADE_TWICE = ["q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "mxfp4", "f16", "bf16"]


def weight(shape=(24, 512), seed=0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.03
    values[1, 3] = 1.0  # an outlier
    return values


def number(kind):
    return gguf.GGMLQuantizationType[kind.upper()]


def inputs(columns=512):
    """Inputs (tokens, in) of which a few are far larger than the rest, as a transformer's are."""
    scale = torch.ones(columns)
    scale[::37] = 30.0
    return torch.randn((96, columns), generator=torch.Generator().manual_seed(1)) * scale


def statistics():
    return measured(inputs())


def measured(x):
    return {"input_mean_square": x.square().mean(0)}


@pytest.mark.parametrize("kind", MADE_TWICE)
def test_bytes_are_those_of_the_package_gguf(kind):
    w = weight()
    found = METHOD.quantize(w, Gguf(kind)).tensors["blocks"].numpy()
    expected = gguf.quants.quantize(w.numpy(), number(kind)).view(np.uint8)
    assert np.array_equal(found, expected.reshape(found.shape))


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_numbers_are_those_of_the_package_gguf(kind):
    quantized = METHOD.quantize(weight(), Gguf(kind))
    blocks = quantized.tensors["blocks"].numpy()
    assert blocks.shape == (24, quantized.scheme.nbytes(1, 512, 2))
    stored = blocks.view(np.float16) if kind == "f16" else blocks
    expected = gguf.quants.dequantize(stored, number(kind)).reshape(24, 512)
    assert np.array_equal(quantized.dequantize().numpy(), expected)
    assert quantized.dequantize(torch.bfloat16).equal(torch.from_numpy(expected).bfloat16())


def test_sizes_are_those_of_the_package_gguf():
    for kind, sizes in GGUF_TYPES.items():
        assert gguf.GGML_QUANT_SIZES[number(kind)] == sizes


def test_q8_0_by_hand():
    """d = 127/127 = 1, so codes are the numbers themselves, ties away from zero."""
    row = torch.zeros(1, 32)
    row[0, :4] = torch.tensor([127.0, -3.0, 2.5, -2.5])
    quantized = METHOD.quantize(row, Gguf("q8_0"))
    block = quantized.tensors["blocks"].numpy()
    assert block[0, :2].view(np.float16) == 1.0
    assert block[0, 2:6].view(np.int8).tolist() == [127, -3, 3, -3]
    assert quantized.dequantize()[0, :4].tolist() == [127.0, -3.0, 3.0, -3.0]


@pytest.mark.parametrize("kind", IMPORTANT)
def test_importance_lowers_the_error_of_the_output(kind):
    """The error of W x over the very inputs that were weighed, not that of W."""
    w = weight(seed=2)
    plain = METHOD.quantize(w, Gguf(kind)).dequantize() - w
    weighed = METHOD.quantize(w, Gguf(kind, importance=True), statistics()).dequantize() - w
    assert (inputs() @ weighed.t()).square().mean() < 0.97 * (inputs() @ plain.t()).square().mean()


@pytest.mark.parametrize("kind", IMPORTANT)
def test_importance_is_the_second_moment_of_each_input(kind):
    w, x = weight(), inputs()
    moments = x.square().mean(0)
    expected = libgguf.quantize_rows(w.numpy(), number(kind), imatrix=moments.numpy())
    scheme = Gguf(kind, importance=True)
    # What else there is serves the curvature proxy: its inputs are weighted by gradients.
    given = {**statistics(), "inputs": x.flip(1), "input_square": torch.eye(512)}
    assert np.array_equal(METHOD.quantize(w, scheme, given).tensors["blocks"].numpy(), expected)


@pytest.mark.parametrize("kind", IMPORTANT)
def test_inputs_that_were_silent_still_count_a_little(kind):
    """ggml alone gives the weights of such a block any codes, as far off as the block is wide."""
    x = inputs()
    x[:, 256:] = 0
    w = weight()
    error = METHOD.quantize(w, Gguf(kind, importance=True), measured(x)).dequantize() - w
    silent, heard = error[:, 256:].square().mean(), error[:, :256].square().mean()
    assert silent < 2 * heard


def test_the_number_of_threads_does_not_show(monkeypatch):
    w = weight((25, 512))
    whole = {kind: METHOD.quantize(w, Gguf(kind)).tensors["blocks"] for kind in BLOCKS}
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    for kind, expected in whole.items():
        assert torch.equal(METHOD.quantize(w, Gguf(kind)).tensors["blocks"], expected)


EXTREMES = [0.0, 1.0, -1.0, 1e-45, -1e-40, 2e-38, 1e-20, 1e-6, 3e4, 65504.0, -65504.0]


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_no_weight_is_too_strange(kind):
    """Constant, one outlier, subnormal, as large as halves go: finite numbers, or a refusal that says why."""
    generator = np.random.default_rng(0)
    for _ in range(30):
        w = torch.full((3, 256), float(generator.choice(EXTREMES)))
        w[1, 5] = float(generator.choice(EXTREMES))
        w[2] = torch.from_numpy(generator.choice(EXTREMES, 256))
        schemes = [Gguf(kind)] + ([Gguf(kind, importance=True)] if kind in IMPORTANT else [])
        for scheme in schemes:
            try:
                quantized = METHOD.quantize(w, scheme, measured(inputs(256)))
            except SchemeRefused:
                assert scheme.importance and kind in ("q4_1", "q5_1")  # whose scale is refitted without a bound
                continue
            assert quantized.dequantize().isfinite().all(), (scheme, w)


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_zeros_stay_zero(kind):
    assert (METHOD.quantize(torch.zeros(2, 256), Gguf(kind)).dequantize() == 0).all()


@pytest.mark.parametrize("kind", GGUF_TYPES)
def test_weights_beyond_halves_are_refused_where_scales_are_halves(kind):
    w = weight((2, 256)) * 1e6
    if kind in ("bf16", "mxfp4"):
        assert METHOD.quantize(w, Gguf(kind)).dequantize().isfinite().all()
        return
    with pytest.raises(SchemeRefused, match=f"^gguf-{kind} has scales in half precision, and the weight reaches 1e"):
        METHOD.quantize(w, Gguf(kind))


@pytest.mark.parametrize(
    ("layer", "scheme", "reason"),
    [
        (LINEAR, Gguf("q8_0", importance=True), "q8_0 takes no importance matrix"),
        (LINEAR, Gguf("bf16", importance=True), "bf16 takes no importance matrix"),
        (Layer("x", "linear", 4, 576, 2), Gguf("q4_k"), "blocks of 256 do not divide the 576 inputs of shape (4, 576)"),
        (
            Layer("x", "embedding", 4, 512, 2),
            Gguf("q4_k", importance=True),
            "an embedding has no inputs whose importance could be measured",
        ),
        (LINEAR, Integer("gguf", 4, PerChannel()), "gguf makes llama.cpp's types only"),
    ],
)
def test_refusals_name_the_rule(layer, scheme, reason):
    assert METHOD.refuses(layer, scheme) == reason


def test_an_embedding_may_be_quantized_and_a_tied_head_has_inputs():
    assert METHOD.refuses(Layer("x", "embedding", 4, 512, 2), Gguf("q4_k")) is None
    assert METHOD.refuses(Layer("x", "head", 4, 512, 2, tied=("y",)), Gguf("q4_k", importance=True)) is None


def test_importance_needs_inputs():
    scheme = Gguf("q4_0", importance=True)
    assert METHOD.uses_statistics(scheme)
    assert not METHOD.uses_statistics(Gguf("q4_0"))
    with pytest.raises(SchemeRefused, match=r"^gguf-q4_0-im is made from statistics of the layer's inputs"):
        METHOD.quantize(weight(), scheme)
    with pytest.raises(SchemeRefused, match="all inputs of the layer were zero"):
        METHOD.quantize(weight(), scheme, measured(torch.zeros(4, 512)))


def test_schemes_are_the_types_of_these_widths():
    grid = Grid(("gguf",), (4, 16), (PerChannel(),), ("none",))
    four = ["q4_k", "q4_1", "q4_0", "iq4_nl", "iq4_xs", "mxfp4"]
    expected = ["gguf-f16", "gguf-bf16"]
    for kind in four:
        expected += [f"gguf-{kind}"] + ([f"gguf-{kind}-im"] if kind != "mxfp4" else [])
    assert [str(scheme) for scheme in METHOD.schemes("gguf", grid)] == expected


def test_no_type_needs_an_importance_matrix():
    """A new type that ggml cannot make without one must be refused without one."""
    assert not any(libgguf.quantize_requires_imatrix(number(kind)) for kind in GGUF_TYPES)


def test_the_first_weight_of_a_process_survives_many_threads():
    """ggml builds the tables of these types when it first needs them."""
    program = """
import torch
from autoq import plugins
from autoq.methods import Method
from autoq.scheme import parse_scheme

torch.set_num_threads(4)
for kind in ("iq3_xxs", "iq3_s"):
    plugins.load("methods", "gguf", Method).quantize(torch.ones(40, 256), parse_scheme(f"gguf-{kind}"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
