"""Numbers as text."""

import pytest

from autoq.display import numbers
from autoq.measurement import Measurement


@pytest.mark.parametrize(
    ("value", "stderr", "unit", "text"),
    [
        (0.03124, 0.00081, "nats/token", "0.0312 ±0.0008"),
        (0.03124, 0.00013, "nats/token", "0.03124 ±0.00013"),
        (12.345, 0.2, "ms", "12.3 ±0.2"),
        (12.345, 3.4, "ms", "12 ±3"),
        (1234.0, 56.0, "ms", "1234 ±56"),
        (0.5, None, "", "0.5000"),
        (0.09999999, None, "", "0.1000"),
        (0.0, 0.0, "nats/token", "0"),
        (1.5e-7, None, "", "1.500e-07"),
        (1.5e-9, 1e-10, "", "1.500e-09 ±1e-10"),
        (91_234_567.0, None, "bytes", "91.23 MB"),
        (999.0, None, "bytes", "999 B"),
        (8.03e9, None, "bytes", "8.030 GB"),
    ],
)
def test_a_value_has_the_digits_that_its_error_leaves(value, stderr, unit, text):
    assert numbers.with_error(value, stderr, unit) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0s"), (59.4, "59s"), (60, "1m 00s"), (3599, "59m 59s"), (3900, "1h 05m")]
)
def test_durations(seconds, text):
    assert numbers.duration(seconds) == text


def test_a_prediction_is_never_shown_as_a_measurement():
    predicted = Measurement("latency_decode_ms", 12.0, "ms", "predicted", "search")
    measured = Measurement("latency_decode_ms", 12.0, "ms", "measured", "report", 0.1)
    assert numbers.mark(predicted, also_reported=False) == "p"
    assert numbers.mark(measured, also_reported=True) == ""
    assert numbers.full(predicted) == "12.00 ms (predicted)"
    assert numbers.full(measured) == "12.00 ±0.10 ms (measured on the report part)"


def test_a_search_value_is_marked_only_beside_reported_ones():
    searched = Measurement("perplexity", 12.0, "", "measured", "search", 0.1)
    assert numbers.mark(searched, also_reported=True) == "s"
    assert numbers.mark(searched, also_reported=False) == ""
