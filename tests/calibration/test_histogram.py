"""The histogram that widens as values come."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoq.calibration.histogram import BINS, MIN_EXPONENT, Histogram
from autoq.errors import NotFinite

VALUES = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=30)


def of(*portions):
    made = Histogram()
    for values in portions:
        made.add(torch.tensor(values))
    return made


@given(VALUES, VALUES, VALUES)
def test_order_and_portions_make_no_difference(a, b, c):
    once, apart, other = of([*a, *b, *c]), of(a, b, c), of(c, a, b)
    assert once.exponent == apart.exponent == other.exponent
    assert torch.equal(once.sums, apart.sums)
    assert torch.equal(once.sums, other.sums)


@given(VALUES)
def test_every_value_lies_in_its_bin(values):
    """By floors of exact quotients, one value at a time."""
    made = of(values)
    assert int(made.sums.sum()) == len(values)
    expected = torch.zeros(BINS, dtype=torch.int64)
    for value in torch.tensor(values, dtype=torch.float64).tolist():
        expected[math.floor(math.ldexp(value, 13 - made.exponent)) + BINS // 2] += 1
    assert torch.equal(made.sums, expected)
    largest = max(map(abs, values), default=0.0)
    assert largest < 2.0**made.exponent
    assert made.exponent == MIN_EXPONENT or largest >= 2.0 ** (made.exponent - 1)


def test_bins_by_hand():
    made = of([0.0, 1.0, -1.0, 1.99])
    assert (made.exponent, made.width) == (1, 4 / BINS)
    places = made.sums.nonzero().flatten()
    assert places.tolist() == [BINS // 4, BINS // 2, 3 * BINS // 4, BINS - 41]
    assert made.edges[places[:3]].tolist() == [-1.0, 0.0, 1.0]
    assert made.centres[places[1]] == 2 / BINS
    assert made.magnitudes.nonzero().flatten().tolist() == [0, BINS // 4 - 1, BINS // 4, BINS // 2 - 41]


def test_weights_move_with_their_values():
    made = Histogram()
    made.add(torch.tensor([1.5, -1.5]), torch.tensor([2.0, 3.0]))
    made.add(torch.tensor([1000.0]), torch.tensor([0.5]))
    assert made.sums[made.sums > 0].tolist() == [3.0, 2.0, 0.5]
    assert made.exponent == 10


def test_nothing_and_zeros():
    assert of([]).exponent == of([0.0, 0.0]).exponent == MIN_EXPONENT
    assert int(of([0.0, 0.0]).sums[BINS // 2]) == 2


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_and_changes_nothing(value):
    made = of([1.0])
    with pytest.raises(NotFinite, match="NaN or infinite"):
        made.add(torch.tensor([0.0, value]))
    assert int(made.sums.sum()) == 1
