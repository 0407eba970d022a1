"""The hypervolume against brute force, in any order, and what a study's curve is made of."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.dashboards.columns import Trials
from autoq.dashboards.study_view import View
from autoq.dashboards.volume import SAMPLES, Curve, Volume, sparkline

REFERENCE = 4.0


def brute_force(points, dimensions):
    """Inclusion and exclusion over all subsets of the boxes between a point and the reference."""
    inside = [point for point in points if all(value < REFERENCE for value in point)]
    total = 0.0
    for count in range(1, len(inside) + 1):
        for chosen in itertools.combinations(inside, count):
            corner = [max(values) for values in zip(*chosen, strict=True)]
            total += (-1) ** (count + 1) * math.prod(REFERENCE - value for value in corner)
    return total


def of(points, dimensions):
    volume = Volume([REFERENCE] * dimensions, [0.0] * dimensions)
    for point in points:
        volume.add(point)
    return volume.total


# Small whole numbers make ties, duplicates and points on the reference common.
coordinate = st.one_of(st.integers(0, 5).map(float), st.floats(0, 5, allow_subnormal=False))
sets = st.integers(1, 3).flatmap(
    lambda d: st.tuples(st.just(d), st.lists(st.tuples(*[coordinate] * d), min_size=0, max_size=8))
)


@settings(deadline=None)
@given(sets)
def test_is_what_brute_force_says(case):
    dimensions, points = case
    assert of(points, dimensions) == pytest.approx(brute_force(points, dimensions), rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(sets, st.randoms(use_true_random=False))
def test_the_order_does_not_matter(case, rng: random.Random):
    dimensions, points = case
    shuffled = list(points)
    rng.shuffle(shuffled)
    assert of(shuffled, dimensions) == pytest.approx(of(points, dimensions), rel=1e-9, abs=1e-9)


@settings(deadline=None)
@given(sets)
def test_never_falls(case):
    dimensions, points = case
    volume = Volume([REFERENCE] * dimensions)
    totals = [volume.add(point) for point in points]
    assert all(b >= a - 1e-9 for a, b in itertools.pairwise(totals))


def test_by_hand():
    assert of([(1.0, 3.0), (3.0, 1.0)], 2) == 3 + 3 - 1
    assert of([(1.0, 3.0), (3.0, 1.0), (2.0, 2.0)], 2) == 6
    assert of([(0.0, 0.0, 3.0), (3.0, 3.0, 0.0)], 3) == 16 + 4 - 1
    assert of([(1.0,), (2.0,), (0.5,)], 1) == 3.5
    assert of([(4.0, 0.0), (5.0, -1.0)], 2) == 0


@pytest.mark.parametrize("seed", range(3))
def test_three_objectives_against_slices_of_two(seed):
    """300 points: the volume is the sum over slices of the third coordinate of areas of the first two."""
    points = np.random.default_rng(seed).random((300, 3)) * 4
    points /= np.linalg.norm(points, axis=1, keepdims=True) / 3
    edges = np.unique(np.append(points[:, 2], REFERENCE))
    sliced = sum(
        (high - low) * of(points[points[:, 2] <= low][:, :2].tolist(), 2) for low, high in itertools.pairwise(edges)
    )
    assert of(points.tolist(), 3) == pytest.approx(sliced, rel=1e-9)


def test_an_estimate_is_within_its_error():
    points = np.random.default_rng(1).random((6, 4)) * 3
    volume = Volume([REFERENCE] * 4, [0.0] * 4)
    for point in points:
        volume.add(point)
    assert volume.estimated
    assert volume.stderr is not None
    assert abs(volume.total - brute_force(points.tolist(), 4)) < 4 * volume.stderr
    assert volume.stderr < 0.5 * REFERENCE**4 / math.sqrt(SAMPLES) + 1e-9
    assert of(points.tolist(), 4) == volume.total


def test_a_curve_goes_on_where_it_ended(maker):
    """Trial by trial it is what it is of all trials at once; a new worst baseline begins it anew."""
    study = maker.study()
    values = [(0.5, 9e7), (0.1, 2e8), (0.3, 1.2e8), (0.2, 1.1e8), (0.25, 1.0e8), (0.05, 3e8)]
    view, objectives = View(maker.store, study), maker.store.study(study).objectives
    for number, value in enumerate(values):
        maker.trial(study, number, value, baseline=f"uniform-int{number}" if number < 2 else None)
        curve = view.refresh().volume()
        assert view.volume() is curve
        whole = Curve.of(objectives, view.trials)
        assert curve.totals == pytest.approx(whole.totals)
        assert curve.numbers == list(range(number + 1))
        assert curve.share.tolist() == pytest.approx(whole.share.tolist())
        assert 0 <= curve.share.max() <= 1
    maker.trial(study, 6, (2.0, 1e8), baseline="uniform-int2")
    assert view.refresh().volume() is not curve
    assert view.volume().reference.tolist() == pytest.approx([2.0 + 0.19, 2e8 + 0.1 * 1.1e8])


def test_infeasible_trials_count_nothing(maker):
    study = maker.study()
    maker.trial(study, 0, (0.5, 1e8), baseline="a")
    maker.trial(study, 1, (0.1, 2e8), baseline="b")
    before = View(maker.store, study).refresh().volume().totals[-1]
    maker.trial(study, 2, (0.01, 1e7), feasible=False)
    curve = View(maker.store, study).refresh().volume()
    assert curve.totals[-1] == before
    assert len(curve.totals) == 3


def test_more_is_better_where_it_is(views: Callable[[str], View]):
    share = views("maximized").volume().share
    assert (np.diff(share) >= 0).all()
    assert 0.5 < share[-1] <= 1


def test_nothing_has_no_volume():
    assert Curve.of(_two(), Trials.of()).totals == []
    assert Curve.of(_two(), Trials.of()).share.tolist() == []


def _two():
    from autoq.store import StudyObjective

    return [
        StudyObjective("kl_nats_per_token", "nats/token", "minimize"),
        StudyObjective("size_bytes", "bytes", "minimize"),
    ]


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), max_size=200))
def test_sparkline_is_short_and_inside_its_box(values):
    made = sparkline(values)
    assert len(made["values"]) == min(60, len(values))
    assert bool(made["path"]) == bool(values)
    if len(values) > 1:
        assert made["values"][-1] == float(f"{values[-1]:.6g}")
        for step in made["path"][1:].split("L"):
            x, y = map(float, step.split(","))
            assert 1 <= x <= 119
            assert 1 <= y <= 23
