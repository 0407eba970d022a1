"""AWQ against its own definition, and what ships with it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.layer import Layer
from autoq.methods._inputs import LEAST, input_scales
from autoq.methods.awq import EXPONENTS, Awq
from autoq.methods.rtn import RoundToNearest
from autoq.scheme import Integer, PerChannel, PerGroup, PerTensor

GRANULARITIES = [PerGroup(12), PerChannel(), PerTensor()]


def case(rows, columns, seed, spread=1.5):
    """A weight, and the second moments of inputs of very different sizes that share four directions."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(200, columns, generator=generator) + torch.randn(200, 4, generator=generator) @ torch.randn(
        4, columns, generator=generator
    )
    x *= (spread * torch.randn(columns, generator=generator)).exp()
    return torch.randn(rows, columns, generator=generator) * 0.03, x.t() @ x / 200


def error(weight, values, hessian):
    delta = values.double() - weight.double()
    return float(((delta @ hessian.double()) * delta).sum())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(GRANULARITIES),
    zero=st.sampled_from(["none", "integer"]),
    dead=st.sampled_from([0, 5, 36]),
)
def test_never_worse_than_rtn(seed, bits, granularity, zero, dead):
    weight, hessian = case(6, 36, seed)
    hessian[:dead] = 0
    hessian[:, :dead] = 0
    found = Awq().quantize(weight, Integer("awq", bits, granularity, zero), {"hessian": hessian})
    plain = RoundToNearest().quantize(weight, Integer("rtn", bits, granularity, zero))
    assert error(weight, found.dequantize(), hessian) <= error(weight, plain.dequantize(), hessian) * (1 + 1e-3)


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_no_exponent_is_better(granularity):
    """Each candidate is made by rtn, of the scaled weight, on its own."""
    weight, hessian = case(8, 36, 2)
    found = Awq().quantize(weight, Integer("awq", 3, granularity), {"hessian": hessian})
    errors = []
    for exponent in EXPONENTS:
        scales = input_scales(hessian.diagonal().sqrt() ** exponent)
        quantized = RoundToNearest().quantize(weight * scales, Integer("rtn", 3, granularity))
        errors.append(error(weight, quantized.dequantize() / scales, hessian))
    assert error(weight, found.dequantize(), hessian) <= min(errors) * (1 + 1e-3)
    assert granularity == PerTensor() or min(errors) < 0.7 * errors[0]


def test_scales_ship_and_are_taken_out_again_by_hand():
    """One input is 16 times the other in size: it gets the finer steps.

    The largest scale is 1; the kernel's product of codes with x over the scales is that of the weight with x.
    """
    weight, scheme = torch.tensor([[1.0, 0.7], [-0.6, 0.3]]), Integer("awq", 4, PerChannel())
    hessian = torch.tensor([[256.0, 0.0], [0.0, 1.0]])
    found = Awq().quantize(weight, scheme, {"hessian": hessian})
    scales = found.input_scales()
    assert found.tensors["input_scales"].dtype == torch.bfloat16
    assert float(scales[0]) == 1.0
    assert float(scales[1]) in {float(input_scales(torch.tensor([16.0**a, 1.0]))[1]) for a in EXPONENTS}
    plain = RoundToNearest().quantize(weight, Integer("rtn", 4, PerChannel()))
    assert found.nbytes == plain.nbytes + 2 * 2
    x = torch.tensor([3.0, 0.25])
    by_kernel = ((found.codes().float() - found.zeros()) * found.scales()) @ (x / scales)
    assert torch.allclose(by_kernel, found.dequantize() @ x, rtol=1e-5)


def test_inputs_that_were_never_there_have_scales_of_the_middle():
    scales = input_scales(torch.tensor([4.0, 1.0, 0.0]))
    assert scales.tolist() == [1.0, 0.25, 0.5]
    assert input_scales(torch.zeros(3)).tolist() == [1.0, 1.0, 1.0]
    assert input_scales(torch.tensor([1e30, 1e-8])).tolist() == [1.0, LEAST]


def test_what_it_refuses():
    assert "looked up" in Awq().refuses(Layer("x", "embedding", 64, 64, 2), Integer("awq", 4, PerGroup(64)))
    assert "none, integer" in Awq().refuses(Layer("x", "linear", 64, 64, 2), Integer("awq", 4, PerGroup(64), "real"))
