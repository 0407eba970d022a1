"""Fixed point: steps are powers of two, and the best of them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.layer import Layer
from autoq.methods.fixed import FixedPoint
from autoq.scheme import Integer, PerChannel, PerGroup, PerTensor

GRANULARITIES = [PerGroup(12), PerChannel(), PerTensor()]


def rounded(grouped, exponents, bits):
    step = torch.pow(2.0, exponents.double())
    return (grouped / step).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) * step


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(GRANULARITIES),
    size=st.integers(-40, 40),
)
def test_no_power_of_two_is_better(seed, bits, granularity, size):
    """Against all steps from a hundredth of the range to ten times it."""
    weight = torch.randn(6, 36, generator=torch.Generator().manual_seed(seed)) * 2.0**size
    found = FixedPoint().quantize(weight, Integer("fixed", bits, granularity, "none"))
    fraction, _ = torch.frexp(found.scales())
    assert (fraction == 0.5).all()
    shape = {PerTensor(): (1, 1, 216), PerChannel(): (6, 1, 36)}.get(granularity, (6, 3, 12))
    grouped = weight.view(shape).double()
    span = grouped.abs().amax(-1, keepdim=True).log2().ceil() - bits
    errors = [(rounded(grouped, span + e, bits) - grouped).square().sum(-1) for e in range(-6, 5)]
    ours = (found.dequantize().double().view(shape) - grouped).square().sum(-1)
    assert (ours <= torch.stack(errors).amin(0) * (1 + 1e-5)).all()


def test_by_hand():
    """1.75, -2, 0.5, 0.25 in 4 bits: 2^-2 holds them all exactly, and 2^-1 would not."""
    found = FixedPoint().quantize(torch.tensor([[1.75, -2.0, 0.5, 0.25]]), Integer("fixed", 4, PerChannel(), "none"))
    assert found.scales().tolist() == [[0.25]]
    assert found.codes().tolist() == [[15, 0, 10, 9]]


@pytest.mark.parametrize("extreme", [1e-45, 1e-38, 3.3e38])
def test_steps_stay_where_numbers_are_normal(extreme):
    found = FixedPoint().quantize(
        torch.tensor([[extreme, -extreme, 0.0, 0.0]]), Integer("fixed", 2, PerChannel(), "none")
    )
    assert 2.0**-126 <= float(found.scales()) <= 2.0**126
    assert found.dequantize().isfinite().all()


def test_what_it_refuses():
    layer = Layer("x", "linear", 64, 64, 2)
    for zero in ("integer", "real"):
        assert FixedPoint().refuses(layer, Integer("fixed", 4, PerGroup(64), zero)) is not None
    assert FixedPoint().refuses(Layer("x", "embedding", 64, 64, 2), Integer("fixed", 4, PerGroup(64), "none")) is None
