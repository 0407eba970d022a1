"""Scales of inputs: who runs them, and that evaluation does to an input what the kernel does."""

import pytest
import torch

from autoq import plugins
from autoq.assignment import Assignment
from autoq.layer import Layer
from autoq.methods.awq import Awq
from autoq.methods.smooth import Smooth
from autoq.quantized_model import QuantizedModel
from autoq.scheme import parse_scheme
from autoq.spec import StudySpec, TargetSpec
from autoq.targets import load_target
from autoq.targets._torch_cpu_assembly import check, packed_modules
from autoq.targets._torch_cpu_kernels import ScaledInput, dynamic_activation
from autoq.targets._torch_cpu_rules import kernel_for

RUN_BY = {"generic", "torch-cpu"}
LAYER = Layer("x", "linear", 256, 256, dtype_bytes=2)
TIED = Layer("x", "head", 256, 256, dtype_bytes=2, tied=("y",))


@pytest.mark.parametrize("name", plugins.names("targets"))
def test_a_target_runs_scaled_inputs_or_says_in_one_clause_why_not(name):
    device = "edge-npu" if name == "described" else None
    spec = TargetSpec(name=name.replace("_", "-"), **({"device": device} if device else {}))
    target = load_target(spec)
    schemes = ["awq-int4-g64", "awq-int8-channel-sym", "awq-int4-g64-sym"]
    for text in schemes:
        plain = target.refuses(LAYER, parse_scheme(text.replace("awq", "rtn")))
        reason = target.refuses(LAYER, parse_scheme(text))
        if name.replace("_", "-") in RUN_BY:
            assert reason == plain
        else:
            assert reason
            assert "\n" not in reason


def test_what_is_looked_up_has_no_input_to_divide():
    reason = kernel_for(TIED, parse_scheme("awq-int8-channel-sym"))
    assert reason == "rows of an embedding are looked up, and awq needs an input to divide"


class One:
    """A model of one layer."""

    def __init__(self, module):
        self.module = module

    def modules_of(self, _):
        return [self.module]


def made(text, x, weight):
    method = {"awq": Awq, "smooth": Smooth}[text.partition("-")[0]]()
    statistics = {
        "hessian": x.t() @ x / len(x),
        "input_mean_square": x.square().mean(0),
        "input_peak": x.abs().amax(0),
    }
    return method.quantize(weight, parse_scheme(text), statistics)


@pytest.mark.parametrize(
    ("text", "dtype"),
    [
        ("awq-int4-g64", torch.bfloat16),
        ("awq-int8-channel-sym", torch.bfloat16),
        ("smooth-int8-channel-sym-a8dyn", torch.bfloat16),
        ("smooth-int8-channel-sym-a8dyn", torch.float32),
    ],
)
def test_kernels_get_the_input_over_its_scales(text, dtype):
    generator = torch.Generator().manual_seed(0)
    size = torch.randn(256, generator=generator).exp()
    x = torch.randn(100, 256, generator=generator) * size
    module = torch.nn.Linear(256, 256, dtype=dtype).requires_grad_(False)
    module.weight.copy_(torch.randn(256, 256, generator=generator) * 0.05)
    weight = made(text, x, module.weight)
    assert weight.input_scales().min() < 0.9
    layer = Layer("x", "linear", 256, 256, dtype.itemsize)
    kernel = kernel_for(layer, weight.scheme)
    assert str(kernel).endswith("-scaled")
    pairs = packed_modules(One(module), layer, weight, kernel, lambda _: "fbgemm")
    assert isinstance(pairs[0][1], ScaledInput)
    check(layer, weight, kernel, pairs)
    seen = x.to(dtype)
    found = pairs[0][1](seen)
    assert found.dtype == dtype
    scales = weight.input_scales()
    if weight.scheme.activation:
        exact = dynamic_activation(seen.float() / scales) * scales @ weight.dequantize().t()
    else:
        exact = seen.float() @ weight.dequantize().t()
    assert (found.float() - exact - module.bias.float()).norm() < 0.01 * exact.norm()


def test_evaluation_rounds_the_input_over_its_scales(tiny_model_dir):
    """In a whole model: what the layer is given is quant(x / s) s, and its weight the one in original coordinates."""
    spec = StudySpec.model_validate(
        {
            "name": "scaled",
            "model": {"id": str(tiny_model_dir("llama")), "dtype": "float32"},
            "target": {"name": "torch-cpu"},
            "data": {"calibration_tokens": 256, "search_tokens": 256, "report_tokens": 256},
        }
    )
    model = QuantizedModel(spec)
    name = next(layer.name for layer in model.info.layers if layer.kind == "linear")
    scheme = parse_scheme("smooth-int8-channel-sym-a8dyn")
    weight = model.quantized(name, scheme)
    scales = weight.input_scales()
    function = model.activation(name, scheme)
    x = torch.randn(3, 7, len(scales), generator=torch.Generator().manual_seed(0))
    assert torch.equal(function(x), dynamic_activation(x / scales) * scales)
    assert function is model.activation(name, scheme)
    module = model.model.modules_of(model.info.layer(name))[0]
    with model.swapped(Assignment({name: scheme})):
        assert torch.equal(module(x), torch.nn.functional.linear(function(x), weight.dequantize(), module.bias))
