"""SmoothQuant: the product of two rounded factors, and who is in charge of the scale of an input."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.layer import Layer
from autoq.methods.awq import input_scales
from autoq.methods.rtn import RoundToNearest
from autoq.methods.smooth import EXPONENTS, Smooth
from autoq.scheme import Integer, PerChannel, PerGroup
from autoq.targets._torch_cpu_kernels import dynamic_activation


def case(seed, spread):
    """Inputs (300, 48) with outliers in a few channels, as after a norm, and a weight."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(300, 48, generator=generator)
    x[:, torch.randperm(48, generator=generator)[:3]] *= spread
    return torch.randn(16, 48, generator=generator) * 0.05, x


def statistics(x):
    return {"input_mean_square": x.square().mean(0), "input_peak": x.abs().amax(0)}


def product_error(weight, quantized, x):
    """What the kernel's product is off: codes times rounded x over the scales."""
    scales = quantized.input_scales() if quantized.scheme.scales_inputs else torch.ones(x.shape[1])
    seen = dynamic_activation(x / scales) * scales
    return float((seen @ quantized.dequantize().t() - x @ weight.t()).square().sum())


@pytest.mark.parametrize("spread", [30.0, 100.0])
def test_outliers_of_the_input_cost_less(spread):
    weight, x = case(0, spread)
    plain = RoundToNearest().quantize(weight, Integer("rtn", 8, PerChannel(), "none", "a8dyn"))
    found = Smooth().quantize(weight, Integer("smooth", 8, PerChannel(), "none", "a8dyn"), statistics(x))
    assert product_error(weight, found, x) < 0.3 * product_error(weight, plain, x)
    assert found.nbytes == plain.nbytes + 2 * 48


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), spread=st.sampled_from([0.0, 1.0, 5.0, 300.0]), bits=st.sampled_from([4, 8]))
def test_predicted_error_is_at_most_that_without_scales(seed, spread, bits):
    weight, x = case(seed, spread)

    def predicted(quantized, scales):
        values, told = quantized.dequantize().double(), statistics(x)
        step = 2 * float((told["input_peak"] / scales).max()) / 255
        off = (values - weight).square().sum(0) @ told["input_mean_square"].double()
        return float(off + values.square().sum(0) @ scales.double().square() * step**2 / 12)

    plain = RoundToNearest().quantize(weight, Integer("rtn", bits, PerChannel(), "none", "a8dyn"))
    found = Smooth().quantize(weight, Integer("smooth", bits, PerChannel(), "none", "a8dyn"), statistics(x))
    assert predicted(found, found.input_scales()) <= predicted(plain, torch.ones(48)) * (1 + 1e-3)


def test_scales_are_the_papers():
    """With one of its exponents: peaks 100 and 1, columns of 0.5 and 2: s = (100^α / 0.5^(1-α), 1 / 2^(1-α))."""
    weight, x = torch.tensor([[0.5, -2.0], [-0.25, 1.0]]), torch.tensor([[100.0, 1.0], [-20.0, 0.3]])
    found = Smooth().quantize(weight, Integer("smooth", 8, PerChannel(), "none", "a8dyn"), statistics(x))
    candidates = [input_scales(torch.tensor([100**a / 0.5 ** (1 - a), 1 / 2 ** (1 - a)])).tolist() for a in EXPONENTS]
    assert found.input_scales().tolist() in candidates


def test_what_it_refuses():
    layer = Layer("x", "linear", 64, 64, 2)
    for activation in (None, "a8static"):
        assert "a8dyn" in Smooth().refuses(layer, Integer("smooth", 8, PerChannel(), "none", activation))
    assert "none, integer" in Smooth().refuses(layer, Integer("smooth", 8, PerGroup(16), "real", "a8dyn"))
