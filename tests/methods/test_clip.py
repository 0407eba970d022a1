"""Clipping against brute force, and never worse than rtn by its own measure."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.errors import SchemeRefused
from autoq.layer import Layer
from autoq.methods._uniform import encode, minmax_grid
from autoq.methods.clip import RATIOS, Clip
from autoq.methods.rtn import RoundToNearest
from autoq.scheme import Integer, PerChannel, PerGroup, PerTensor

GRANULARITIES = [PerGroup(12), PerChannel(), PerTensor()]


def heavy(rows, columns, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.randn(rows, columns, generator=generator).exp()


def costs(weight, dequantized, squares, granularity):
    """The weighted squared error of each group, of each row, or of all, in float64."""
    each = (dequantized.double() - weight.double()).square() * squares.double()
    if granularity == PerTensor():
        return each.sum().view(1)
    return each.view(len(weight), -1, granularity.size if isinstance(granularity, PerGroup) else weight.shape[1]).sum(
        -1
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    bits=st.integers(2, 8),
    granularity=st.sampled_from(GRANULARITIES),
    zero=st.sampled_from(["none", "integer"]),
    dead=st.booleans(),
)
def test_never_worse_than_rtn_group_by_group(seed, bits, granularity, zero, dead):
    weight = heavy(6, 36, seed)
    squares = torch.rand(36, generator=torch.Generator().manual_seed(seed)).pow(4)
    if dead:
        squares.zero_()
    found = Clip().quantize(weight, Integer("clip", bits, granularity, zero), {"input_mean_square": squares})
    plain = RoundToNearest().quantize(weight, Integer("rtn", bits, granularity, zero))
    ours, theirs = (costs(weight, each.dequantize(), squares, granularity) for each in (found, plain))
    assert (ours <= theirs * (1 + 1e-5)).all()


@pytest.mark.parametrize("zero", ["none", "integer"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("blocks", [1 << 18, 40])
def test_the_best_of_all_ratios_is_found(granularity, zero, blocks, monkeypatch):
    monkeypatch.setattr("autoq.methods._weights.BLOCK_ELEMENTS", blocks)
    weight, squares = heavy(6, 36, 3), torch.linspace(0, 2, 36)
    found = Clip().quantize(weight, Integer("clip", 3, granularity, zero), {"input_mean_square": squares})
    shape = {PerTensor(): (1, 1, 216), PerChannel(): (6, 1, 36)}.get(granularity, (6, 3, 12))
    grouped, all_costs = weight.view(shape), []
    for ratio in RATIOS:
        low, high = grouped.amin(-1, keepdim=True) * ratio, grouped.amax(-1, keepdim=True) * ratio
        scale, origin = minmax_grid(low, high, 3, zero)
        values = (encode(grouped, scale, origin, 3) - origin) * scale
        all_costs.append(costs(weight, values.view(6, 36), squares, granularity))
    best = torch.stack(all_costs).amin(0)
    assert torch.allclose(costs(weight, found.dequantize(), squares, granularity), best, rtol=1e-5)
    assert (torch.stack(all_costs).argmin(0) > 0).any()


def test_an_outlier_whose_input_is_silent_is_clipped_by_hand():
    """Weights 8, 1, 1, 1 in 2 bits without zero points: a step of 8/1.5 rounds each 1 to nothing.

    If nothing is ever read with the 8, the finest of all steps is best: 0.36 · 8/1.5 = 1.92, off by 0.92 each.
    """
    weight, scheme = torch.tensor([[-8.0, 1.0, 1.0, 1.0]]), Integer("clip", 2, PerChannel(), "none")
    silent = Clip().quantize(weight, scheme, {"input_mean_square": torch.tensor([0.0, 1.0, 1.0, 1.0])})
    assert float(silent.scales()) == pytest.approx(RATIOS[-1] * 8 / 1.5, rel=2**-8)
    loud = Clip().quantize(weight, scheme, {"input_mean_square": torch.tensor([1.0, 0.0, 0.0, 0.0])})
    assert abs(float(loud.dequantize()[0, 0]) + 8) < 0.4


def test_what_it_refuses():
    assert "looked up" in Clip().refuses(Layer("x", "embedding", 64, 64, 2), Integer("clip", 4, PerGroup(64)))
    assert "none, integer" in Clip().refuses(Layer("x", "linear", 64, 64, 2), Integer("clip", 4, PerGroup(64), "real"))
    with pytest.raises(SchemeRefused, match="statistics of the layer's inputs"):
        Clip().quantize(heavy(4, 32, 0), Integer("clip", 4, PerGroup(16)))
