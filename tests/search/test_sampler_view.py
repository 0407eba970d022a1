"""A sampler's own predictions beside what was measured."""

from types import SimpleNamespace

import pytest

from autoq.measurement import Measurement
from autoq.search.sampler_view import PREDICTED, sampler_view

KL = "kl_nats_per_token"


def trial(predicted, measured, origin="sampler", state="complete", estimate=None):
    detail = {} if estimate is None else {"estimate": estimate}
    attrs = {} if predicted is None else {PREDICTED: predicted}
    found = {(KL, "search"): Measurement(KL, measured, "nats/token", "measured", "search", detail=detail)}
    return SimpleNamespace(origin=origin, state=state, sampler_attrs=attrs, measurements=found)


def test_ranks_and_ratio_of_finished_proposals():
    trials = [
        *(trial(x, 1.2 * x) for x in (0.1, 0.15, 0.2, 0.25, 0.3, 0.5, 0.6)),
        trial(0.4, 9.0, state="stopped", estimate=0.46),
        *(trial(None, 9.0), trial(0.3, 0.01, origin="seed"), trial(0.3, 0.01, state="failed")),
    ]
    view = sampler_view(trials, KL)
    assert view.to_json() == {"trials": 8, "spearman": pytest.approx(1.0), "median_ratio": pytest.approx(1.2)}
    assert str(view) == "sampler's own predictions: rank correlation 1.00, measured / predicted 1.20 (8 trials)"


def test_few_have_no_rank():
    view = sampler_view([trial(0.1 * i, 0.1 * i) for i in range(1, 8)], KL)
    assert (view.trials, view.spearman, view.median_ratio) == (7, None, pytest.approx(1.0))


def test_two_say_nothing_and_equal_ones_have_no_rank():
    assert sampler_view([trial(0.1, 0.1), trial(0.2, 0.1)], KL) is None
    view = sampler_view([trial(0.1, 0.02 * x) for x in range(1, 10)], KL)
    assert (view.spearman, view.median_ratio) == (None, pytest.approx(1.0))
    assert str(view) == "sampler's own predictions: measured / predicted 1.00 (9 trials)"
    assert sampler_view([trial(0.0, 0.1)] * 3, KL) is None
