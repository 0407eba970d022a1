"""Predicted against measured latencies, as one line per objective."""

import pytest
from scipy.stats import spearmanr

from autoq.display.compare import foretold
from autoq.measurement import Measurement
from autoq.search.sampler_view import spearman


class Trial:
    """The part of a trial that is looked at."""

    def __init__(self, predicted, measured):
        detail = {} if predicted is None else {"predicted_ms": predicted}
        name = "latency_decode_ms"
        self.measurements = {(name, "report"): Measurement(name, measured, "ms", "measured", "report", detail=detail)}


def test_the_median_error_and_the_ranks():
    (found,) = foretold([Trial(10, 10), Trial(22, 20), Trial(27, 30), Trial(None, 5)])
    assert found.count == 3
    assert found.median_error == pytest.approx(0.1)
    assert found.rank_correlation == pytest.approx(1)
    assert str(found) == "latency_decode_ms: predicted within 10.0% (median of 3 timed), rank correlation 1.00"


def test_two_trials_say_nothing():
    assert foretold([Trial(1, 1), Trial(2, 2)]) == []


def test_ranks_share_ties_and_have_no_meaning_without_order():
    a, b = [1.0, 2.0, 2.0, 5.0, 3.0], [2.0, 1.0, 4.0, 4.0, 3.0]
    assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic)
    assert spearman([1.0, 1.0], [1.0, 2.0]) is None
