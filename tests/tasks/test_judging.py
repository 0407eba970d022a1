"""Values and standard errors of labelled examples: against formulas, counting, and each other."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoq.objectives import load
from autoq.statistics import bootstrap_stderr, mean_and_stderr, pseudo_values
from autoq.tasks.runner import judged

PAIRS = arrays.arrays(np.float64, st.tuples(st.integers(2, 40), st.just(2)), elements=st.integers(0, 4).map(float))


@given(PAIRS)
def test_f1_counts_one_by_one(scores):
    wanted = []
    for c in {*scores[:, 0], *scores[:, 1]}:
        tp = sum(t == f == c for t, f in scores)
        fp = sum(f == c != t for t, f in scores)
        fn = sum(t == c != f for t, f in scores)
        wanted.append(2 * tp / (2 * tp + fp + fn))
    assert load("f1").value(scores) == pytest.approx(np.mean(wanted))


def test_f1_by_hand():
    # Class 0: TP 2, FP 1, FN 1; class 1: TP 1, FP 1, FN 1.
    scores = np.array([[0, 0], [0, 0], [0, 1], [1, 1], [1, 0]], dtype=np.float64)
    assert load("f1").value(scores) == pytest.approx((4 / 6 + 2 / 4) / 2)


def test_accuracy_and_its_error_by_hand():
    objective = load("accuracy:any")
    scores = np.array([objective.score({"label": 1}, answer) for answer in (1, 1, 0, 1)])
    value, stderr, each = judged(objective, scores)
    assert value == 0.75
    assert stderr == pytest.approx(np.std([1, 1, 0, 1], ddof=1) / 2)
    assert each.tolist() == [1, 1, 0, 1]


def test_of_equally_likely_choices_the_first_counts():
    objective = load("multiple_choice_accuracy")
    assert objective.score({"answer": 1}, [-3.0, -1.0, -1.0]) == [1.0]
    assert objective.score({"answer": 2}, [-3.0, -1.0, -1.0]) == [0.0]


@given(arrays.arrays(np.float64, st.tuples(st.integers(2, 30), st.just(1)), elements=st.floats(-9, 9)))
def test_pseudo_values_of_a_mean_are_the_values(rows):
    found = pseudo_values(lambda x: float(x.mean()), rows)
    np.testing.assert_allclose(found, rows[:, 0], atol=1e-9)


def test_bootstrap_jackknife_and_formula_agree_on_a_mean():
    rows = np.random.default_rng(1).normal(size=(200, 1))
    expected = mean_and_stderr(rows)[1]
    assert expected == pytest.approx(rows.std(ddof=1) / 200**0.5)
    assert bootstrap_stderr(lambda x: float(x.mean()), rows) == pytest.approx(expected, rel=0.1)


def test_the_errors_of_f1_are_the_scatter_of_new_samples():
    """Not a mean over examples: the truth is what F1 does from sample to sample of one population."""
    rng, value = np.random.default_rng(2), load("f1").value

    def sample(count):
        true = rng.choice(3, size=count, p=[0.6, 0.3, 0.1])
        found = np.where(rng.random(count) < 0.7, true, rng.integers(3, size=count))
        return np.column_stack([true, found]).astype(np.float64)

    scatter = np.std([value(sample(300)) for _ in range(400)])
    several = [sample(300) for _ in range(8)]
    bootstrap = np.mean([bootstrap_stderr(value, rows) for rows in several])
    jackknife = np.mean([np.std(pseudo_values(value, rows), ddof=1) / 300**0.5 for rows in several])
    assert bootstrap == pytest.approx(scatter, rel=0.15)
    assert jackknife == pytest.approx(scatter, rel=0.15)


def test_pairs_tell_more_than_two_errors():
    """Two models that differ in few answers: the error of their difference is far below that of either."""
    rng, value = np.random.default_rng(3), load("f1").value
    true = rng.integers(3, size=400)
    one = np.where(rng.random(400) < 0.8, true, 0)
    other = one.copy()
    other[:8] = (true[:8] + 1) % 3
    a, b = (np.column_stack([true, found]).astype(np.float64) for found in (one, other))
    paired = np.std(pseudo_values(value, a) - pseudo_values(value, b), ddof=1) / 20
    assert paired < 0.5 * bootstrap_stderr(value, a)
    assert value(a) - value(b) > 2 * paired


def test_a_single_example_has_no_error():
    assert judged(load("accuracy"), np.array([[1.0]]))[1] is None
    assert judged(load("f1"), np.array([[1.0, 1.0]]))[:2] == (1.0, None)
