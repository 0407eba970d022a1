"""The exact multiple-choice knapsack against brute force, its bounds and its refusals."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.errors import BadInput
from autoq.search.budget import Solution, frontier, solve


def brute_force(cost, weight, budget):
    """The least cost within the budget by enumeration, or None."""
    fitting = [
        sum(c[j] for c, j in zip(cost, picks, strict=True))
        for picks in itertools.product(*(range(len(c)) for c in cost))
        if math.fsum(w[j] for w, j in zip(weight, picks, strict=True)) <= budget
    ]
    return min(fitting, default=None)


def check(cost, weight, budget, **options):
    """The solution, checked for what must hold always; None where there is none."""
    found = solve(cost, weight, budget, **options)
    if found is None:
        return None
    assert found.weight == math.fsum(w[j] for w, j in zip(weight, found.choices, strict=True)) <= budget
    assert found.cost == math.fsum(c[j] for c, j in zip(cost, found.choices, strict=True))
    assert found.lower_bound <= found.cost
    if found.exact:
        assert found.gap == 0.0
    return found


def agrees(cost, weight, budget):
    best, found = brute_force(cost, weight, budget), check(cost, weight, budget)
    assert (found is None) == (best is None)
    if found is not None:
        assert found.exact
        assert found.cost == pytest.approx(best, rel=1e-9, abs=1e-9)


def instances(costs, weights):
    choices = st.lists(st.tuples(costs, weights), min_size=1, max_size=5)
    return st.lists(choices, min_size=1, max_size=5)


def split(instance):
    return [[c for c, _ in choices] for choices in instance], [[w for _, w in choices] for choices in instance]


def fractions(low, high):
    """Real numbers whose sums are exact: a weight that a sum's rounding swallows is no weight."""
    return st.integers(low * 2**20, high * 2**20).map(lambda n: n / 2**20)


def between(cost, weight, share):
    low, high = sum(map(min, weight)), sum(map(max, weight))
    return low + (high - low) * share


@settings(deadline=None, max_examples=300)
@given(instances(st.integers(-5, 9), st.integers(0, 9)), st.integers(-2, 50))
def test_whole_numbers_with_many_ties(instance, budget):
    agrees(*split(instance), budget)


@settings(deadline=None, max_examples=200)
@given(instances(st.floats(-10, 10), fractions(0, 10)), st.floats(-0.1, 1.1))
def test_real_numbers(instance, share):
    cost, weight = split(instance)
    agrees(cost, weight, between(cost, weight, share))


@settings(deadline=None, max_examples=200)
@given(instances(st.floats(0.0, 1.0), fractions(-5, 5)), st.data())
def test_a_budget_that_one_assignment_meets_to_the_last_digit(instance, data):
    cost, weight = split(instance)
    picks = [data.draw(st.integers(0, len(w) - 1)) for w in weight]
    agrees(cost, weight, math.fsum(w[j] for w, j in zip(weight, picks, strict=True)))


@settings(deadline=None, max_examples=100)
@given(instances(st.integers(0, 3), st.integers(0, 40)), st.floats(0, 1), st.integers(1, 3))
def test_a_tiny_state_limit_stays_feasible_and_tells_the_gap(instance, share, limit):
    cost, weight = split(instance)
    budget = between(cost, weight, share)
    found, best = check(cost, weight, budget, state_limit=limit), brute_force(cost, weight, budget)
    assert found is not None
    assert found.lower_bound <= best + 1e-9 <= found.cost + 2e-9
    if found.exact:
        assert found.cost == best


def test_by_hand():
    cost, weight = [[9.0, 4.0, 0.0], [5.0, 3.0]], [[1, 2, 4], [1, 3]]
    assert solve(cost, weight, 5) == Solution([2, 0], 5.0, 5.0, 5.0, True)
    assert solve(cost, weight, 4) == Solution([1, 0], 9.0, 3.0, 9.0, True)
    assert solve(cost, weight, 7) == Solution([2, 1], 3.0, 7.0, 3.0, True)
    assert solve(cost, weight, 1.99) is None
    assert solve(cost, weight, math.inf) == solve(cost, weight, 7)
    assert solve(cost, weight, -math.inf) is None


def test_of_equal_choices_the_first_is_taken():
    assert solve([[1.0, 1.0], [2.0, 2.0, 2.0]], [[3, 3], [1, 1, 1]], 10).choices == [0, 0]


def test_no_variables_cost_and_weigh_nothing():
    assert solve([], [], 0.0) == Solution([], 0.0, 0.0, 0.0, True)
    assert solve([], [], -1.0) is None


def test_an_infinite_cost_forbids_a_choice():
    assert solve([[math.inf, 1.0], [0.0, 2.0]], [[0, 5], [5, 1]], 6).choices == [1, 1]
    assert solve([[math.inf, 1.0], [0.0, 2.0]], [[0, 5], [5, 1]], 5) is None
    assert solve([[math.inf]], [[0]], 5) is None


@pytest.mark.parametrize(
    ("cost", "weight", "budget", "message"),
    [
        ([[1.0, math.nan]], [[1, 2]], 3, r"variable 0: a cost is nan"),
        ([[1.0], [-math.inf]], [[1], [2]], 3, r"variable 1: a cost is -inf"),
        ([[1.0]], [[math.inf]], 3, r"variable 0: a weight is inf; it must be finite"),
        ([[]], [[]], 3, r"variable 0: .* equal, positive length"),
        ([[1.0, 2.0]], [[1]], 3, r"variable 0: cost \(2,\) and weight \(1,\)"),
        ([[1.0]], [[1], [2]], 3, r"cost has 1 variables and weight has 2"),
        ([[1.0]], [[1]], math.nan, r"the budget is nan"),
    ],
)
def test_what_is_refused(cost, weight, budget, message):
    with pytest.raises(BadInput, match=message):
        solve(cost, weight, budget)


def test_odd_budgets_of_even_weights_are_proved_too():
    """No total is odd, which the relaxation alone cannot know."""
    rng = np.random.default_rng(3)
    weight = [2.0 * rng.integers(1, 1000, 4) for _ in range(30)]
    cost = [4000.0 - w for w in weight]
    found = check(cost, weight, 2 * int(between(cost, weight, 0.4) / 2) + 1)
    assert found.exact


def model(n, choices, seed):
    """Layers of a few shapes at 2 to 8 bits: costs fall like 4^-bits, scaled by the layer's sensitivity."""
    rng = np.random.default_rng(seed)
    bits = np.linspace(2, 8, choices)
    weight = [np.round(p * bits / 8) for p in rng.choice([576 * 576, 576 * 192, 576 * 1536], n)]
    cost = [s * 4.0**-bits * rng.lognormal(0, 0.2, choices) for s in rng.lognormal(0, 1.5, n)]
    return cost, weight


def test_whole_models_are_solved_exactly():
    for n, choices in ((210, 12), (500, 20)):
        for seed, share in enumerate((0.05, 0.3, 0.6, 0.95)):
            cost, weight = model(n, choices, seed)
            found = check(cost, weight, between(cost, weight, share))
            assert found.exact


def test_a_frontier_is_the_single_solutions_and_falls_with_the_budget():
    cost, weight = model(60, 6, 0)
    budgets = [between(cost, weight, share) for share in (-0.1, 0.0, 0.2, 0.5, 0.9, 1.0, 2.0)]
    found = frontier(cost, weight, budgets)
    assert found == [solve(cost, weight, budget) for budget in budgets]
    assert found[0] is None
    costs = [solution.cost for solution in found[1:]]
    assert costs == sorted(costs, reverse=True)
    assert found[-1].cost == pytest.approx(sum(c.min() for c in cost))
