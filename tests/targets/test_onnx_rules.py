"""Which kernel of ONNX Runtime runs what, and by which rule none does."""

from __future__ import annotations

import pytest

from autoq import plugins
from autoq.layer import Layer, ModelInfo
from autoq.methods import Method
from autoq.scheme import parse_scheme
from autoq.spec import ModelSpec
from autoq.targets import Target
from autoq.targets._onnx_rules import kernel_for

LINEAR = Layer("linear", "linear", 384, 384, 4)
NARROW = Layer("narrow", "linear", 8, 20, 4)
TABLE = Layer("table", "embedding", 300, 64, 4)
TIED = Layer("tied", "head", 300, 64, 4, tied=("table",))


@pytest.fixture
def target():
    return plugins.load("targets", "onnxruntime", Target)


@pytest.mark.parametrize(
    ("layer", "scheme", "kernel"),
    [
        (LINEAR, "keep", "float"),
        (LINEAR, "rtn-int4-g32", "nbits-int4-b32"),
        (LINEAR, "rtn-int4-g128-sym", "nbits-int4-b128-sym"),
        (LINEAR, "rtn-int4-g32-a8dyn", "nbits-a8-int4-b32"),
        (LINEAR, "rtn-int8-g64-a8dyn", "nbits-a8-int8-b64"),
        (LINEAR, "rtn-int2-g32-sym-a8dyn", "nbits-a8-int2-b32-sym"),
        (LINEAR, "rtn-int2-channel-sym-a8dyn", "nbits-a8-int2-b128-sym"),
        # A scale for a whole row of 384 = 3 x 128 inputs is repeated.
        (LINEAR, "rtn-int4-channel-sym", "nbits-int4-b128-sym"),
        (LINEAR, "rtn-int4-tensor-sym-a8dyn", "nbits-a8-int4-b128-sym"),
        (LINEAR, "rtn-int4-g48-sym", "nbits-int4-b16-sym"),
        (LINEAR, "rtn-int8-channel-sym", "int8-unpacked"),
        (NARROW, "rtn-int8-g10", "int8-unpacked"),
        (LINEAR, "rtn-int8-channel-sym-a8dyn", "int8-dynamic"),
        (NARROW, "rtn-int8-tensor-sym-a8dyn", "int8-dynamic"),
        (LINEAR, "rtn-int8-channel-sym-a8static", "int8-static"),
        (TABLE, "rtn-int8-channel-sym", "int8-unpacked"),
        (TIED, "rtn-int8-g32", "int8-unpacked"),
    ],
)
def test_kernels(target, layer, scheme, kernel):
    assert str(kernel_for(layer, parse_scheme(scheme))) == kernel
    assert target.refuses(layer, parse_scheme(scheme)) is None


@pytest.mark.parametrize(
    ("layer", "scheme", "rule"),
    [
        (LINEAR, "rtn-int4-g100", "group size 100 does not divide the 384 inputs"),
        (NARROW, "rtn-int4-channel-sym", "multiples of 16 inputs, not by 20 of shape (8, 20)"),
        (LINEAR, "rtn-int4-channel", "zero points shared by 16, 32, 64, 128, 256 inputs, not by 384"),
        (LINEAR, "rtn-int4-g48", "zero points shared by"),
        # With blocks of 16 and 256, 2-bit weights are unpacked at every call.
        (LINEAR, "rtn-int2-g16-sym-a8dyn", "2 bits needs scales shared by multiples of 32 inputs, not by 16"),
        (Layer("wide", "linear", 8, 512, 4), "rtn-int2-g256-a8dyn", "zero points shared by 32, 64, 128 inputs"),
        (LINEAR, "hqq-int4-g64-rz", "real zero point"),
        (LINEAR, "rtn-int2-g32", "choose a8dyn"),
        (LINEAR, "rtn-int3-g32-a8dyn", "there is no 3-bit kernel"),
        (LINEAR, "rtn-int6-channel-sym", "there is no 6-bit kernel"),
        (LINEAR, "rtn-int8-g32-a8static", "per channel or tensor only"),
        (LINEAR, "rtn-int4-channel-sym-a8static", "per channel or tensor only"),
        (LINEAR, "kmeans4-channel", "there is no kernel for kmeans4-channel"),
        (LINEAR, "rtn-fp8-channel", "there is no kernel for rtn-fp8-channel"),
        (LINEAR, "gguf-q8_0", "there is no kernel for gguf-q8_0"),
        (TABLE, "rtn-int4-g32", "rows of an embedding are looked up"),
        (TIED, "rtn-int8-channel-sym-a8dyn", "rows of an embedding are looked up"),
    ],
)
def test_refusals_name_the_rule(target, layer, scheme, rule):
    assert rule in target.refuses(layer, parse_scheme(scheme))


def test_most_of_the_grid_runs_on_an_ordinary_layer(target):
    grid = target.grid()
    schemes = [s for name in grid.methods for s in plugins.load("methods", name, Method).schemes(name, grid)]
    refused = {str(scheme) for scheme in schemes if target.refuses(LINEAR, scheme)}
    assert refused == {"rtn-int4-channel", "rtn-int4-channel-a8dyn", "rtn-int8-channel-a8dyn"}


@pytest.mark.parametrize(
    ("task", "dtype", "rule"),
    [
        ("encoder", "float32", None),
        ("masked", "float32", None),
        ("causal", "float32", None),
        ("seq2seq", "float32", "Model is both"),
        ("encoder", "bfloat16", "set model.dtype: float32"),
    ],
)
def test_models(target, task, dtype, rule):
    found = target.refuses_model(ModelInfo("Model", task, dtype, 10, None, (LINEAR,), 0))
    assert found is None if rule is None else rule in found


def test_the_graph_counts_in_the_size(target):
    info = ModelInfo("Model", "encoder", "float32", 10, None, (LINEAR, NARROW), 100)
    assert target.other_bytes(info, ModelSpec(id="model")) == 100 + 2 * 1500
