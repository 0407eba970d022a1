"""One layer at a time in ONNX Runtime: it computes what the dequantized weights and quantized inputs say."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper

from autoq.calibration.histogram import Histogram
from autoq.calibration.observers import AFFINE_INT8, input_range
from autoq.errors import AutoQError, KernelMismatch, SchemeRefused
from autoq.layer import Layer
from autoq.scheme import OBSERVERS, parse_scheme
from autoq.targets import _onnx_activations as activations
from autoq.targets import _onnx_graph as graphs
from autoq.targets import _onnx_session as sessions
from autoq.targets._onnx_rules import kernel_for

LAYER = Layer("proj", "linear", 24, 96, 4)
TABLE = Layer("table", "embedding", 40, 64, 4)
TIED = Layer("head", "head", 40, 64, 4, tied=("table",))
WEIGHT_ONLY = [
    "keep",
    *("rtn-int4-g16", "rtn-int4-g32", "rtn-int4-g32-sym", "rtn-int4-g96-sym", "rtn-int4-channel-sym"),
    *("rtn-int4-tensor-sym", "rtn-int8-channel-sym", "rtn-int8-channel", "rtn-int8-g32", "rtn-int8-tensor"),
]
DYNAMIC = [
    *("rtn-int2-g32-a8dyn", "rtn-int2-g32-sym-a8dyn", "rtn-int4-g32-a8dyn", "rtn-int4-channel-sym-a8dyn"),
    *("rtn-int8-g32-a8dyn", "rtn-int8-g16-sym-a8dyn", "rtn-int8-channel-sym-a8dyn", "rtn-int8-tensor-sym-a8dyn"),
    *("rtn-int8-channel-sym-a8static", "rtn-int8-tensor-sym-a8static"),
]
BOUNDS = (-2.5, 3.0)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def run(out, x):
    (found,) = sessions.open_session(graphs.alone(out, x), 1).run(None, {"x": x.numpy()})
    return torch.from_numpy(found)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("text", [*WEIGHT_ONLY, *DYNAMIC])
def test_a_linear_layer_computes_what_it_says(quantize, text):
    weight = quantize(random(24, 96), text)
    out, x = graphs.Writer(), random(2, 7, 96, seed=1)
    graphs.LayerWriter(out, LAYER, weight, BOUNDS).multiply("x", None, "y", "proj")
    function = activations.activation(weight.scheme, {"input_range": torch.tensor(BOUNDS)})
    assert (function is not None) == (text in DYNAMIC)
    exact = F.linear(x, weight.dequantize())
    expected = exact if function is None else F.linear(function(x), weight.dequantize())
    assert relative(run(out, x), expected) < (1e-6 if function is None else 1e-4)
    if function is not None:
        # What the input's rounding does is far larger: the emulation is not a matter of tolerance.
        assert relative(expected, exact) > 2e-3


@pytest.mark.parametrize("text", [*WEIGHT_ONLY, *DYNAMIC])
def test_what_is_stored_is_what_ships(quantize, text):
    weight = quantize(random(24, 96), text)
    out = graphs.Writer()
    graphs.LayerWriter(out, LAYER, weight, BOUNDS).multiply("x", None, "y", "proj")
    parts = ("weight", "codes", "scales", "zeros")
    stored = sum(len(c.raw_data) for name, c in out.constants.items() if name.partition(".")[2] in parts)
    assert stored == weight.nbytes


@pytest.mark.parametrize("text", [t for t in WEIGHT_ONLY if "int8" in t or t == "keep"])
def test_a_tied_head_and_table_share_their_codes(quantize, text):
    weight = quantize(random(40, 64), text)
    assert relative(_looked_up(weight, TABLE), F.embedding(_ids(), weight.dequantize())) < 1e-6
    out = graphs.Writer()
    writer = graphs.LayerWriter(out, TIED, weight)
    writer.look_up("x", 2, "rows", "table")
    before = set(out.constants)
    writer.multiply("rows", None, "y", "head")
    assert all(name.endswith(".shape") for name in set(out.constants) - before)
    rows = F.embedding(_ids(), weight.dequantize())
    assert relative(run(out, _ids()), F.linear(rows, weight.dequantize())) < 1e-6


def _ids():
    return torch.randint(40, (2, 5), generator=torch.Generator().manual_seed(2))


def _looked_up(weight, layer):
    out = graphs.Writer()
    graphs.LayerWriter(out, layer, weight).look_up("x", 2, "y", layer.name)
    return run(out, _ids())


def test_a_bias_is_added(quantize):
    weight = quantize(random(24, 96), "rtn-int4-g32")
    out, x, bias = graphs.Writer(), random(3, 96), random(24)
    out.constant("bias", lambda: bias)
    graphs.LayerWriter(out, LAYER, weight).multiply("x", "bias", "y", "proj")
    assert relative(run(out, x), F.linear(x, weight.dequantize(), bias)) < 1e-6


class _OneLayer:
    """What the check of kernels asks of a model."""

    class info:
        @staticmethod
        def layer(_):
            return LAYER


def test_the_check_finds_weights_that_are_not_what_runs(quantize, monkeypatch):
    weight = quantize(random(24, 96), "rtn-int4-g32")
    sessions.check_kernels(_OneLayer, {"proj": weight})
    dequantize = type(weight).dequantize
    monkeypatch.setattr(type(weight), "dequantize", lambda self, dtype: dequantize(self, dtype).roll(1, 0))
    with pytest.raises(KernelMismatch, match=r"layer proj under rtn-int4-g32: ONNX Runtime's nbits-int4-b32 is off"):
        sessions.check_kernels(_OneLayer, {"proj": weight})


def test_a_scheme_without_a_kernel_is_refused_by_name(quantize):
    with pytest.raises(SchemeRefused, match="cannot run rtn-int3-g32 on layer proj: there is no 3-bit kernel"):
        graphs.kernel_of(LAYER, quantize(random(24, 96), "rtn-int3-g32"))


def test_the_runtime_s_own_refusal_is_one_line():
    broken = helper.make_model(helper.make_graph([helper.make_node("NoSuchOperator", ["x"], ["y"])], "g", [], []))
    with pytest.raises(AutoQError, match="ONNX Runtime does not load the model: ") as caught:
        sessions.open_session(broken, 1)
    assert "\n" not in str(caught.value)


# -- the runtime's own operators as the oracle of activations ------------------------------------------


def _operator(nodes, x, constants=()):
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "g", [info("x", TensorProto.FLOAT, x.shape)], [info("y", TensorProto.FLOAT, x.shape)], constants
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


INPUTS = {
    "normal": random(5, 64),
    "positive": random(5, 64).abs() + 1,
    "negative": -random(5, 64).abs() - 1,
    "outlier": torch.cat([random(4, 64), torch.full((1, 64), 300.0)]),
    "zeros": torch.zeros(2, 64),
    "ties": torch.arange(-32, 32).float().expand(3, 64) / 2,
}


@pytest.mark.parametrize("name", INPUTS)
def test_dynamic_inputs_are_those_of_dynamicquantizelinear(name):
    x = INPUTS[name]
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["x8", "s", "z"]),
        helper.make_node("DequantizeLinear", ["x8", "s", "z"], ["y"]),
    ]
    assert torch.equal(activations.dynamic(x), _operator(nodes, x))


@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("bounds", [(-2.5, 3.0), (0.0, 1.7), (-4.0, 0.0), (0.0, 0.0), (1.0, 2.0)])
def test_calibrated_inputs_are_those_of_quantizelinear(name, bounds):
    x = INPUTS[name]
    step, zero = activations.static_grid(*bounds)
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, [], [np.float32(step)]),
        helper.make_tensor("z", TensorProto.UINT8, [], [zero]),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["x8"]),
        helper.make_node("DequantizeLinear", ["x8", "s", "z"], ["y"]),
    ]
    assert torch.equal(activations.static(*bounds)(x), _operator(nodes, x, constants))


def test_a_layer_that_was_not_calibrated_is_refused():
    with pytest.raises(SchemeRefused, match="its inputs have no range; choose a8dyn"):
        activations.activation(parse_scheme("rtn-int8-channel-sym-a8static"), {})


@pytest.mark.parametrize("name", OBSERVERS)
def test_what_is_written_is_the_observer_s_range(name):
    x = random(64, 96) ** 3
    counts = Histogram()
    counts.add(x)
    statistics = {
        "input_range": torch.stack([x.min(), x.max()]),
        "input_counts": counts.sums,
        "input_exponent": torch.tensor([counts.exponent]),
    }
    scheme = parse_scheme(f"rtn-int8-channel-sym-{name}")
    assert str(kernel_for(LAYER, scheme)) == "int8-static"
    low, high = activations.bounds_of(scheme, statistics)
    assert (low, high) == tuple(input_range(scheme, statistics, AFFINE_INT8).tolist())
    assert torch.equal(activations.activation(scheme, statistics)(x), activations.static(low, high)(x))


def test_blocks_have_a_range_each():
    x = torch.zeros(1, 32)
    x[0, :16], x[0, 16:] = 127.0, 0.1
    x[0, 0], x[0, 16] = 0.4, 0.05  # the first rounds to nothing, the second to 64/127 of 0.1
    found = activations.per_block(x, 16)
    assert found[0, 0] == 0.0
    assert found[0, 16] == pytest.approx(0.1 * 64 / 127)
    assert torch.equal(found[0, 1:16], x[0, 1:16])
    assert torch.equal(activations.per_block(torch.zeros(2, 32), 16), torch.zeros(2, 32))


def test_a_channel_s_blocks_follow_from_the_input_s_width():
    function = activations.activation(parse_scheme("rtn-int4-channel-sym-a8dyn"), None)
    x = random(3, 96)
    assert torch.equal(function(x), activations.per_block(x, 32))


@pytest.mark.parametrize(("sets", "exact"), [((), "1"), (("avx2", "avx512f"), "1"), (("avx2", "avx_vnni"), None)])
def test_processors_that_saturate_are_told_not_to(monkeypatch, sets, exact):
    monkeypatch.setattr(sessions.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sessions.device, "instruction_sets", lambda: sets)
    entries = {}

    class Options:
        def add_session_config_entry(self, key, value):
            entries[key] = value

    monkeypatch.setattr(sessions.onnxruntime, "SessionOptions", Options)
    sessions._options(1, None)
    assert entries.get("session.x64quantprecision") == exact
