"""What every observer promises, whichever it is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq import plugins
from autoq.calibration.histogram import Histogram
from autoq.calibration.observers import AFFINE_INT8, FP8, SYMMETRIC_INT8, input_range
from autoq.errors import SchemeRefused
from autoq.scheme import OBSERVERS, Float, Integer, PerChannel

ALL_LEVELS = [SYMMETRIC_INT8, AFFINE_INT8, FP8]
VALUES = st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=30)


def statistics_of(values):
    x = torch.as_tensor(values, dtype=torch.float32)
    inputs = Histogram()
    inputs.add(x)
    bounds = torch.tensor([min(0.0, float(x.min())), max(0.0, float(x.max()))])
    return {"input_range": bounds, "input_counts": inputs.sums, "input_exponent": torch.tensor([inputs.exponent])}


def scheme(activation, levels=SYMMETRIC_INT8):
    return (
        Float("rtn", "fp8", PerChannel(), activation)
        if levels is FP8
        else Integer("rtn", 8, PerChannel(), "none", activation)
    )


def chosen(activation, values, levels):
    return input_range(scheme(activation, levels), statistics_of(values), levels).tolist()


def test_every_observer_has_a_text_form():
    assert sorted(OBSERVERS.values()) == list(plugins.names("calibration.observers"))


@pytest.mark.parametrize("levels", ALL_LEVELS, ids=["symmetric", "affine", "fp8"])
@pytest.mark.parametrize("activation", OBSERVERS)
class TestObserver:
    @settings(max_examples=25, deadline=None)
    @given(values=VALUES)
    def test_the_range_lies_within_the_inputs_and_holds_0(self, activation, levels, values):
        low, high = chosen(activation, values, levels)
        bounds = torch.tensor([*values, 0.0])
        assert float(bounds.min()) <= low <= 0 <= high <= float(bounds.max())
        assert (low < 0 or high > 0) == bool(bounds.any())

    @settings(max_examples=25, deadline=None)
    @given(values=VALUES)
    def test_the_same_inputs_have_the_same_range(self, activation, levels, values):
        assert chosen(activation, values, levels) == chosen(activation, list(reversed(values)), levels)

    @settings(max_examples=25, deadline=None)
    @given(values=VALUES, power=st.integers(-20, 20))
    def test_a_power_of_two_scales_the_range(self, activation, levels, values, power):
        x = torch.tensor(values)
        x = torch.where(x.abs() < 1e-20, 0.0, x)  # below 2^-100 there is but one bin
        low, high = chosen(activation, x, levels)
        assert chosen(activation, x * 2.0**power, levels) == [low * 2.0**power, high * 2.0**power]

    def test_zeros_have_no_range(self, activation, levels):
        assert chosen(activation, [0.0] * 5, levels) == [0, 0]

    @pytest.mark.parametrize("value", [1.0, -0.3, 1e-35, 3e38])
    def test_equal_inputs_are_not_cut_off(self, activation, levels, value):
        """A percentile's or a threshold's bin may hold them all: then its far edge is beyond them."""
        low, high = chosen(activation, [value] * 100, levels)
        assert (low if value < 0 else high) == pytest.approx(value)
        assert (high if value < 0 else low) == 0

    @pytest.mark.parametrize("sign", [-1, 1])
    def test_one_sided_inputs_have_a_one_sided_range(self, activation, levels, sign):
        x = sign * torch.randn(20_000, generator=torch.Generator().manual_seed(0)).abs()
        low, high = chosen(activation, x, levels)
        assert (high if sign < 0 else low) == 0
        assert 2.0 < (-low if sign < 0 else high) <= float(x.abs().max())

    def test_a_layer_without_statistics_is_refused(self, activation, levels):
        with pytest.raises(SchemeRefused, match="have no range; choose a8dyn"):
            input_range(scheme(activation, levels), {}, levels)
