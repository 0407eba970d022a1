"""Similarity of pairs of texts: the correlation against SciPy's, cosines against a direct computation."""

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.stats import spearmanr

from autoq.assignment import Assignment
from autoq.errors import DataRefused, SpecError
from autoq.evaluation import Evaluator
from autoq.objectives import load
from autoq.scheme import Keep, parse_scheme
from autoq.search import setup
from autoq.spec import build_spec
from autoq.tasks.kinds.pairs import Pairs
from autoq.tasks.runner import judged

SCORES = arrays.arrays(np.float64, st.tuples(st.integers(2, 40), st.just(2)), elements=st.integers(0, 6).map(float))
SIZE = "size_bytes"


@given(SCORES)
def test_the_correlation_is_that_of_scipy_ties_included(scores):
    assume(all(len(set(column)) > 1 for column in scores.T))
    assert load("spearman").value(scores) == pytest.approx(spearmanr(*scores.T)[0], abs=1e-12)


def test_by_hand():
    # Ranks 1, 2, 3, 4 and 2, 1, 3, 4: 1 - 6 · 2 / (4 · 15).
    value = load("spearman").value
    assert value(np.array([[0, 0.2], [1, 0.1], [2, 0.5], [5, 0.9]])) == pytest.approx(0.8)
    assert value(np.array([[0, 0.9], [5, 0.1]])) == pytest.approx(-1)
    assert value(np.array([[3, 0.9], [3, 0.1]])) == 0, "of equal scores nothing can be told"


@given(SCORES)
def test_only_the_order_counts(scores):
    value = load("spearman").value
    assert value(np.column_stack([np.exp(scores[:, 0]), scores[:, 1] ** 3])) == pytest.approx(value(scores), abs=1e-12)
    assert -1 - 1e-12 <= value(scores) <= 1 + 1e-12


def test_the_error_is_the_scatter_of_new_samples():
    rng = np.random.default_rng(0)

    def sample(count=200):
        gold = rng.integers(0, 6, size=count).astype(np.float64)
        return np.column_stack([gold, gold + 2 * rng.normal(size=count)])

    scatter = np.std([load("spearman").value(sample()) for _ in range(300)])
    told = np.mean([judged(load("spearman"), sample())[1] for _ in range(5)])
    assert told == pytest.approx(scatter, rel=0.2)


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"first": "", "second": "b", "score": 1}, "first must be text"),
        ({"first": "a", "second": 3, "score": 1}, "second must be text"),
        ({"first": "a", "second": "b", "score": "high"}, r"score must be a number \(got 'high'\)"),
        ({"first": "a", "second": "b", "score": float("nan")}, "score must be a number"),
        ({"first": "a", "second": "b", "score": True}, "score must be a number"),
    ],
)
def test_pairs_without_a_score_are_refused(row, fragment):
    with pytest.raises(ValueError, match=fragment):
        Pairs().check(row, None)


@pytest.fixture(scope="module")
def rows(searcher):
    """Pairs of words and how many letters they have in common: what the encoder of the folder was trained for."""
    rng = np.random.default_rng(0)
    texts = ["".join(rng.permutation(list("abcdefghijkl"))[:5]) for _ in range(120)]
    queries = ["".join(rng.permutation(list(rng.choice(texts).upper()))[:3]) for _ in texts]
    return [
        {"first": one, "second": two, "score": str(len({*one.lower()} & {*two}))}  # as a CSV file has it
        for one, two in zip(queries, texts, strict=True)
    ]


def test_pairs_are_judged_by_the_cosine_of_their_mean_states(searcher, study_tree, rows, tmp_path, write_rows):
    task = {"source": str(write_rows(tmp_path / "pairs.jsonl", rows)), "search_examples": 40, "report_examples": 60}
    evaluator = Evaluator(build_spec(study_tree(searcher, task, ["spearman", SIZE])))
    scheme = parse_scheme("rtn-int2-channel")
    assignment = Assignment({x.name: scheme if x.kind == "linear" else Keep() for x in evaluator.info.layers})
    (found,) = evaluator.measure(assignment, "report")
    (whole,) = evaluator.measure(Assignment({}), "report")
    cosines, gold = [], []
    with evaluator.swapped(assignment), torch.no_grad():
        for row in evaluator._tasks._examples["mine", "pairs"].report:
            one, two = (
                evaluator.model.model(
                    input_ids=torch.tensor([evaluator.model.tokenizer(row[name])["input_ids"]])
                ).last_hidden_state[0].mean(0)
                for name in ("first", "second")
            )  # fmt: skip
            cosines.append(float(torch.cosine_similarity(one, two, dim=0)))
            gold.append(row["score"])
    assert found.value == pytest.approx(spearmanr(gold, cosines)[0], abs=1e-3)
    assert (found.n, found.unit) == (60, "rho")
    assert 0.01 < found.stderr < 0.3
    assert whole.value > max(found.value, 0.3)


def test_what_a_file_lacks_is_said_in_one_line(searcher, study_tree, rows, tmp_path, write_rows):
    for bad, fragment in (
        ({"first": "a", "second": "b"}, "has no column 'score'"),
        ({**rows[0], "score": "x"}, "score"),
    ):
        task = {"source": str(write_rows(tmp_path / "pairs.jsonl", [*rows, bad])), "search_examples": 4}
        evaluator = Evaluator(build_spec(study_tree(searcher, task, ["spearman", SIZE])))
        with pytest.raises(DataRefused, match=fragment):
            evaluator.describe()


def test_models_that_are_no_encoders_are_refused_by_name(chooser, study_tree):
    with pytest.raises(SpecError, match=r"spearman.*it needs a encoder model, and LlamaForCausalLM is causal"):
        setup.pose(build_spec(study_tree(chooser, {}, ["spearman", SIZE])))
