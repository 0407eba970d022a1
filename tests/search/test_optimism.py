"""Optimism: what selection adds to the difference of two texts, and how sure that is."""

import math
from types import SimpleNamespace

import numpy as np
import pytest

from autoq.measurement import Measurement
from autoq.objectives.kl_nats_per_token import KLNatsPerToken
from autoq.objectives.perplexity import Perplexity
from autoq.search.optimism import optimism

KL = "kl_nats_per_token"


class Store:
    """Trials with values per token: number -> {part: (windows, tokens)}; below 100 are baselines, 0 is unquantized."""

    def __init__(self, values, transform=lambda mean: mean, kept=True):
        self.values, self.kept = values, kept
        self.all = []
        for number, parts in values.items():
            measurements = {
                (KL, part): Measurement(KL, transform(float(np.nanmean(v))), "nats/token", "measured", part)
                for part, v in parts.items()
            }
            self.all.append(
                SimpleNamespace(
                    number=number,
                    baseline=None if number >= 100 else f"uniform-{number}" if number else "unquantized",
                    on_frontier=True,
                    parent=None,
                    measurements=measurements,
                    values=lambda names, part, m=measurements: tuple(m[name, part].value for name in names),
                )
            )

    def trials(self, study_id, states, after, limit):
        assert states == ["complete"]
        return [trial for trial in self.all if after is None or trial.number > after][:limit]

    def token_values(self, study_id, number, name, part):
        return self.values[number][part].astype("f4") if self.kept else None


def flat(search, report):
    return {"search": np.full((2, 128), search), "report": np.full((4, 128), report)}


def test_the_ratio_is_what_the_baselines_do_not_show():
    # the report text is 1.1 times as hard for baselines, 1.21 and 1.44 times for what was selected
    store = Store(
        {0: flat(1e-6, 9e-6), 1: flat(0.5, 0.55), 2: flat(2.0, 2.2), 101: flat(0.1, 0.121), 102: flat(0.2, 0.288)}
    )
    found = optimism(store, 1, KL, KLNatsPerToken())
    assert found["ratio"] == pytest.approx(math.sqrt(1.21 * 1.44) / 1.1)
    assert found["frontier"] == {"101": pytest.approx(1.21), "102": pytest.approx(1.44)}
    assert found["baselines"] == {"1": pytest.approx(1.1), "2": pytest.approx(1.1)}
    # flat text has no other draws
    assert found["stderr"] == pytest.approx(0.0, abs=1e-6)


def study(rng, points, selected, text_noise=0.5, own_noise=0.3):
    """Points of equal true loss 0.1 on two texts; the `selected` best by the search part are the frontier."""
    shapes = {"search": (24, 256), "report": (48, 256)}
    hard = {part: rng.gamma(1 / text_noise, text_noise, shape) for part, shape in shapes.items()}

    def draw():
        return {p: 0.1 * hard[p] * rng.gamma(1 / own_noise**2, own_noise**2, s) for p, s in shapes.items()}

    tried = sorted((draw() for _ in range(points)), key=lambda parts: parts["search"].mean())
    baselines = {number: draw() for number in range(1, 4)}
    return Store(baselines | {100 + i: parts for i, parts in enumerate(tried[:selected])})


def test_without_selection_the_error_covers_one():
    rng = np.random.default_rng(0)
    found = [optimism(study(rng, 4, 4), 1, KL, KLNatsPerToken()) for _ in range(200)]
    outside = np.mean([abs(each["ratio"] - 1) > 2 * each["stderr"] for each in found])
    assert 0.01 < outside < 0.10  # 0.05 for a normal distribution


def test_selection_is_found():
    rng = np.random.default_rng(0)
    found = [optimism(study(rng, 40, 4, own_noise=2.0), 1, KL, KLNatsPerToken()) for _ in range(20)]
    # by chance 1 of 40 would be
    assert np.mean([each["ratio"] > 1 + 2 * each["stderr"] for each in found]) > 0.3
    assert np.mean([each["ratio"] for each in found]) > 1.05


def test_the_text_alone_is_no_optimism():
    """One text is half as hard as the other, for all alike: no ratio but 1, and no doubt about it."""
    rng = np.random.default_rng(0)
    search, report = rng.exponential(0.5, (4, 256)), rng.exponential(1.0, (8, 256))
    store = Store({n: {"search": search * s, "report": report * s} for n, s in ((1, 1.0), (101, 0.2), (102, 3.0))})
    found = optimism(store, 1, KL, KLNatsPerToken())
    assert (found["ratio"], found["stderr"]) == (pytest.approx(1.0, rel=1e-5), pytest.approx(0.0, abs=1e-5))


def test_the_error_knows_the_objective():
    """Perplexity is exp of the mean: its log moves as the mean does, not as the mean's log."""
    rng = np.random.default_rng(0)
    values = {n: {p: rng.normal(3.0, 1.0, (64, 256)) for p in ("search", "report")} for n in (1, 101)}
    found = optimism(Store(values, math.exp), 1, KL, Perplexity())
    expected = math.sqrt(4 / 16384)  # two texts, two points, each a mean of 16384 values of variance 1
    assert found["stderr"] / found["ratio"] == pytest.approx(expected, rel=0.2)


def test_without_values_the_scatter_is_the_error():
    ratios = {1: 1.0, 2: 1.2, 101: 1.1, 102: 1.3, 103: 1.5}
    store = Store({number: flat(0.1, 0.1 * ratio) for number, ratio in ratios.items()}, kept=False)
    found = optimism(store, 1, KL, KLNatsPerToken())
    logs = {number: math.log(ratio) for number, ratio in ratios.items()}
    groups = [logs[1], logs[2]], [logs[101], logs[102], logs[103]]
    pooled = sum(np.var(group) * len(group) for group in groups) / 3
    assert found["stderr"] == pytest.approx(found["ratio"] * math.sqrt(pooled * (1 / 2 + 1 / 3)))
    few = Store({n: flat(0.1, 0.2) for n in (1, 101)}, kept=False)
    assert optimism(few, 1, KL, KLNatsPerToken())["stderr"] is None


def test_nothing_to_compare_is_nothing():
    assert optimism(Store({1: flat(0.1, 0.2)}), 1, KL, KLNatsPerToken()) is None
    assert optimism(Store({1: flat(0.0, 0.0), 101: flat(0.1, 0.2)}), 1, KL, KLNatsPerToken()) is None
