"""The histogram that widens as values come."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from autoq.calibration.histogram import BINS, MIN_EXPONENT, Histogram, sums_by_row
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


EVERY_BFLOAT16 = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@pytest.mark.parametrize("exponent", [MIN_EXPONENT, MIN_EXPONENT + 1, -20, 0, 1, 13, 14, 127, 128])
def test_bits_of_bfloat16_numbers_tell_their_bins_as_arithmetic_does(exponent):
    """All numbers below 2^exponent, with both zeros, and weights that tell the rows apart."""
    small = EVERY_BFLOAT16[EVERY_BFLOAT16.double().abs() < 2.0**exponent]
    rows = small[: len(small) // 2 * 2].view(2, -1)
    weights = torch.tensor([[1.0, 0.5], [1.0, 3.0]])
    largest = float(rows.abs().max())
    sums, found = sums_by_row(rows, weights, largest)
    for own, weight in zip(sums, weights.t(), strict=True):
        expected = Histogram()
        expected.add(rows.float(), weight[:, None].expand(rows.shape))
        assert found == expected.exponent
        assert torch.equal(own, expected.sums.double())


@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=40))
def test_rows_of_bfloat16_and_of_float32_have_one_histogram(codes):
    values = torch.tensor(codes, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    values = values[values.isfinite()].view(-1, 1)
    weights = torch.arange(1.0, 1 + len(values)).view(-1, 1)
    largest = float(values.abs().max()) if len(values) else 0.0
    (own, _), (other, _) = (sums_by_row(x, weights, largest) for x in (values, values.float()))
    assert torch.equal(own, other)
