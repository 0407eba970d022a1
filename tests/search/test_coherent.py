"""The knapsack with a coherent term against trying everything, and its quick form against the exact one."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.search import budget as exact
from autoq.search.coherent import knapsack, quick, solve


def total(table, choices):
    return float(table[np.arange(len(table)), choices].sum())


def draw(seed, layers, width=4):
    """Losses that fall fourfold with each choice, directions of the size of their roots, sizes that rise."""
    rng = np.random.default_rng(seed)
    cost = rng.lognormal(0, 1, (layers, 1)) * 4.0 ** -np.arange(width) * rng.uniform(0.8, 1.25, (layers, width))
    direction = np.sqrt(cost) * rng.normal(0.6, 0.6, (layers, width))
    size = rng.integers(1, 9, (layers, 1)) * (2.0 + np.arange(width))
    low, high = size.min(1).sum(), size.max(1).sum()
    return cost, direction, size, np.full(layers, width), float(low + rng.uniform(0, 1) * (high - low))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), layers=st.integers(1, 5), weight=st.floats(0.01, 3.0))
def test_a_budget_is_never_exceeded_and_the_gap_is_small(seed, layers, weight):
    cost, direction, size, counts, budget = draw(seed, layers)

    def loss(choices):
        return total(cost, choices) + 0.5 * weight * total(direction, choices) ** 2

    found = solve(cost, direction, weight, size, counts, budget)
    assert total(size, found) <= budget + 1e-9
    every = map(np.array, itertools.product(range(4), repeat=layers))
    least = min(loss(choices) for choices in every if total(size, choices) <= budget)
    assert loss(found) <= 1.25 * least + 1e-12


def test_most_small_problems_are_solved_exactly():
    gaps = []
    for seed in range(40):
        cost, direction, size, counts, budget = draw(seed, 5)
        every = np.array(list(itertools.product(range(4), repeat=5)))
        rows = np.arange(5)
        loss = cost[rows, every].sum(1) + 0.5 * direction[rows, every].sum(1) ** 2
        least = loss[size[rows, every].sum(1) <= budget].min()
        found = solve(cost, direction, 1.0, size, counts, budget)
        gaps.append((total(cost, found) + 0.5 * total(direction, found) ** 2) / least - 1)
    assert np.mean(np.array(gaps) < 1e-9) >= 0.9
    assert max(gaps) < 0.1


def test_the_coherent_term_is_what_is_gained():
    """Two groups push the loss the same way and against each other; additive losses alone see no difference."""
    cost, size = np.tile([1.0, 0.0], (6, 1)), np.tile([1.0, 2.0], (6, 1))
    direction = np.tile([1.0, 0.0], (6, 1)) * np.array([1, 1, 1, -1, -1, -1])[:, None]
    found = solve(cost, direction, 1.0, size, [2] * 6, 8.0)
    assert total(size, found) == 8.0
    assert total(direction, found) == 0.0


@pytest.mark.parametrize("weight", [0.0, -1.0])
def test_without_a_coherent_term_it_is_the_knapsack(weight):
    for seed in range(10):
        cost, direction, size, counts, budget = draw(seed, 6)
        found = solve(cost, direction, weight, size, counts, budget)
        best = exact.solve(list(cost), list(size), budget)
        assert total(cost, found) == pytest.approx(best.cost, rel=1e-12)


def test_what_nothing_fits_gets_the_lightest_and_forbidden_choices_are_never_taken():
    cost, direction, size, _, _ = draw(3, 5)
    cost[:, 3], size[:, 3], direction[:, 3] = np.inf, np.inf, 0.0
    assert knapsack(cost, size, [3] * 5, 0.0).tolist() == [0] * 5
    assert solve(cost, direction, 1.0, size, [3] * 5, 0.0).tolist() == [0] * 5
    assert max(solve(cost, direction, 1.0, size, [3] * 5, 1e9)) <= 2


@pytest.mark.parametrize("layers", [100, 240])
def test_the_quick_knapsack_is_within_a_hair_of_the_exact_one(layers):
    gaps = []
    for seed in range(12):
        cost, _, size, counts, budget = draw(seed, layers, 6)
        size[:, 2:] += np.where(np.arange(layers) % 3 == 0, 0.5, 0.0)[:, None]
        found = quick(cost, size, counts, budget)
        assert total(size, found) <= budget * (1 + 1e-9)
        gaps.append(total(cost, found) / exact.solve(list(cost), list(size), budget).cost - 1)
    assert np.mean(gaps) < 1e-3
    assert max(gaps) < 5e-3


def test_the_quick_knapsack_at_both_ends_and_with_forbidden_choices():
    cost, _, size, counts, _ = draw(1, 120)
    cost[::2, 3], size[::2, 3] = np.inf, np.inf
    counts = np.where(np.arange(120) % 2 == 0, 3, 4)
    assert quick(cost, size, counts, 0.0).tolist() == [0] * 120
    assert quick(cost, size, counts, 1e9).tolist() == cost.argmin(1).tolist()
    within = 0.5 * (total(size, [0] * 120) + total(size, cost.argmin(1)))
    found = quick(cost, size, counts, within)
    assert (found < counts).all()
    assert total(size, found) <= within
