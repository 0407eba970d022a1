"""Pareto dominance against its definition and against brute force."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoq.store.dominance import dominates, non_dominated, update

STREAMS = st.integers(1, 4).flatmap(
    lambda count: st.tuples(
        st.lists(st.sampled_from(["minimize", "maximize"]), min_size=count, max_size=count),
        st.lists(st.tuples(*[st.integers(-2, 2).map(float)] * count), max_size=40),
    )
)


def brute_force(points, directions):
    return [i for i, a in enumerate(points) if not any(dominates(b, a, directions) for b in points)]


def test_dominance_is_nowhere_worse_and_somewhere_better():
    both = ("minimize", "maximize")
    assert dominates((1, 5), (2, 5), both)
    assert dominates((1, 6), (2, 5), both)
    assert not dominates((1, 4), (2, 5), both), "better in one, worse in the other"
    assert not dominates((1, 5), (1, 5), both), "equal points do not dominate each other"
    assert not dominates((2, 5), (1, 5), both)


def test_a_new_point_joins_is_refused_or_replaces():
    both = ("minimize", "minimize")
    frontier = {"a": (1.0, 3.0), "b": (2.0, 2.0), "c": (3.0, 1.0)}
    assert update(frontier, {"d": (2.5, 2.5)}, both) == ([], [])
    assert update(frontier, {"d": (2.0, 2.0)}, both) == (["d"], [])
    assert update(frontier, {"d": (0.0, 4.0)}, both) == (["d"], [])
    assert update(frontier, {"d": (1.5, 1.0)}, both) == (["d"], ["b", "c"])
    assert update({}, {"d": (9.0, 9.0)}, both) == (["d"], [])
    # What joins and leaves again in the same step was never there.
    assert update(frontier, {"d": (2.0, 1.5), "e": (1.5, 1.0)}, both) == (["e"], ["b", "c"])


def test_a_wrong_length_or_direction_is_a_mistake_of_ours():
    with pytest.raises(AssertionError):
        dominates((1.0,), (1.0, 2.0), ("minimize",))
    with pytest.raises(KeyError):
        dominates((1.0,), (2.0,), ("smaller",))


@given(STREAMS)
def test_all_at_once_equals_brute_force(stream):
    directions, points = stream
    assert non_dominated(points, directions) == brute_force(points, directions)


@given(STREAMS, st.integers(1, 7))
def test_step_by_step_equals_all_at_once(stream, size):
    directions, points = stream
    frontier, keys = {}, range(len(points))
    for start in keys[::size]:
        new = {key: points[key] for key in keys[start : start + size]}
        added, removed = update(frontier, new, directions)
        assert set(added) <= set(new)
        assert set(removed) <= set(frontier)
        frontier = {k: p for k, p in {**frontier, **{k: new[k] for k in added}}.items() if k not in removed}
    assert sorted(frontier) == non_dominated(points, directions)


@given(STREAMS)
def test_turning_an_objective_around_with_its_values_changes_nothing(stream):
    directions, points = stream
    turned = [{"minimize": "maximize", "maximize": "minimize"}[d] for d in directions]
    assert non_dominated([tuple(-v for v in p) for p in points], turned) == non_dominated(points, directions)


def test_many_points_with_a_small_frontier():
    draw = random.Random(0)
    points = [(draw.random(), draw.random(), draw.random()) for _ in range(5000)]
    kept = non_dominated(points, ["minimize"] * 3)
    assert kept == sorted(kept)
    assert 20 < len(kept) < 120
    some = draw.sample(sorted(set(range(5000)) - set(kept)), 50)
    assert all(any(dominates(points[k], points[i], ["minimize"] * 3) for k in kept) for i in some)
