"""The report's timings: sweeps, their mean and an error that tells how far they disagree."""

import math

import pytest

from autoq.measurement import Measurement
from autoq.search.reporting import combined


def latency(value, stderr=1.0):
    return Measurement("latency_decode_ms", value, "ms", "measured", "report", stderr=stderr, detail={"threads": 2})


def test_one_sweep_is_taken_as_it_is():
    found = combined([20.0], latency(20.0))
    assert (found.value, found.stderr) == (20.0, 1.0)
    assert found.detail == {"threads": 2, "sweeps": [20.0]}


def test_sweeps_that_agree_make_the_error_smaller():
    found = combined([20.0, 20.0], latency(20.0))
    assert (found.value, found.stderr) == (20.0, pytest.approx(math.sqrt(0.5)))


def test_sweeps_that_disagree_make_it_larger():
    found = combined([18.0, 24.0], latency(24.0))
    assert found.value == 21.0
    # the error of the mean of two values six apart is three
    assert found.stderr == pytest.approx(math.hypot(math.sqrt(0.5), 3.0))
    assert found.detail["sweeps"] == [18.0, 24.0]
