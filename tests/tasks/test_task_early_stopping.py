"""Candidates that are given up by their answers to labelled examples: when, what is told, and how often wrongly."""

import numpy as np
import pytest

from autoq.assignment import Assignment
from autoq.evaluation import Evaluator
from autoq.objectives import can_be_compared, load
from autoq.scheme import Keep, parse_scheme
from autoq.search.controller import create_study, run_study
from autoq.spec import build_spec
from autoq.statistics import LEAST_EXAMPLES, Rival, shards
from autoq.store import Store

SIZE = "size_bytes"
TEXTS = {"columns": {"text": "sentence"}, "search_examples": 150, "report_examples": 50}


def uniform(evaluator, text):
    scheme = parse_scheme(text)
    return Assignment({x.name: scheme if x.kind == "linear" else Keep() for x in evaluator.info.layers})


@pytest.fixture(scope="module")
def evaluator(classifier, tmp_path_factory):
    folder = tmp_path_factory.mktemp("stopping")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOQ_CACHE", str(folder))
        tree = {
            "model": {"id": str(classifier), "dtype": "float32"},
            "data": {
                "source": str(classifier / "text.txt"),
                **{f"{part}_tokens": 128 for part in ("calibration", "search", "report")},
                "window_tokens": 16,
            },
            "tasks": {"mine": {"source": str(classifier / "examples.jsonl"), **TEXTS}},
            "target": {"name": "generic"},
            "objectives": ["accuracy", SIZE],
            "constraints": {"f1": {"min": 0.0}},
            "workers": {"cpus": 1},
        }
        yield Evaluator(build_spec(tree))


def test_a_candidate_is_given_up_by_the_examples_that_both_answered(evaluator):
    (whole, _), coarse = evaluator.measure(Assignment({}), "search"), uniform(evaluator, "rtn-int2-channel")
    in_full = {m.objective: m for m in evaluator.measure(coarse, "search")}
    found = {m.objective: m for m in evaluator.measure(coarse, "search", Rival(7, {"accuracy": whole.per_token}, 0.99))}
    measured = found["accuracy"]
    n = measured.n
    assert n in (32, 64, 128)
    assert measured.per_token.shape == (150, 1)
    assert np.isnan(measured.per_token[n:]).all()
    np.testing.assert_array_equal(measured.per_token[:n], in_full["accuracy"].per_token[:n])
    assert measured.value == pytest.approx(float(measured.per_token[:n].mean()))
    assert (measured.detail["rival"], measured.detail["of"]) == (7, 150)
    expected = whole.value * measured.per_token[:n].sum() / whole.per_token[:n].sum()
    assert measured.detail["estimate"] == pytest.approx(expected)
    assert (found["f1"].n, found["f1"].detail["rival"]) == (n, 7), "what is only bounded stops with it"


def test_against_an_equal_or_on_other_examples_all_are_answered(evaluator):
    coarse = uniform(evaluator, "rtn-int2-channel")
    (in_full, _) = evaluator.measure(coarse, "search")
    for values in (in_full.per_token, np.ones((149, 1), dtype=np.float32)):
        (found, _) = evaluator.measure(coarse, "search", Rival(0, {"accuracy": values}, 0.99))
        assert found.n == 150
        assert "rival" not in found.detail


def test_the_report_is_never_cut_short(evaluator):
    perfect = np.ones((50, 1), dtype=np.float32)
    (found, _) = evaluator.measure(
        uniform(evaluator, "rtn-int2-channel"), "report", Rival(0, {"accuracy": perfect}, 0.99)
    )
    assert found.n == 50


def test_equally_good_candidates_are_hardly_ever_given_up():
    """Right and wrong answers of two models with the same chances, held against each other at every look."""
    rng, wrong, runs = np.random.default_rng(0), 0, 1500
    steps = shards(128, 1, LEAST_EXAMPLES)
    assert [step.stop for step in steps] == [32, 64, 128]
    for _ in range(runs):
        hard = rng.random((128, 1))
        ours, theirs = ((rng.random((128, 1)) < 0.3 + 0.6 * hard).astype(np.float64) for _ in range(2))
        rival = Rival(0, {"accuracy": theirs.astype(np.float32)}, 0.99)
        for step in steps[:-1]:
            seen = np.where(np.arange(128)[:, None] < step.stop, ours, np.nan)
            # Wrong is what would not be so on all examples.
            if rival.beats("accuracy", seen, -1.0, len(steps) - 1) and ours.mean() >= theirs.mean():
                wrong += 1
                break
    assert wrong <= 0.01 * runs


def test_only_means_of_one_kind_are_compared():
    kl, accuracy, choices, f1, bleu = map(
        load, ("kl_nats_per_token", "accuracy", "multiple_choice_accuracy", "f1", "bleu")
    )
    assert can_be_compared([kl])
    assert can_be_compared([accuracy, choices])
    assert not can_be_compared([accuracy, kl])
    assert not can_be_compared([f1])
    assert not can_be_compared([accuracy, bleu])


def test_a_study_gives_up_what_is_worse_in_full(classifier, study_tree, tmp_path):
    more = {"sampler": {"name": "tpe", "seeds": 4}, "budget": {"trials": 24}}
    spec = build_spec(study_tree(classifier, TEXTS, ["accuracy", SIZE], **more))
    store = Store.open(f"sqlite:///{tmp_path}/autoq.db")
    study = create_study(store, spec)
    run_study(store, study.id)
    stopped = store.trials(study.id, states=("stopped",), with_assignments=True)
    assert stopped
    evaluator = Evaluator(spec)
    for trial in stopped:
        told = trial.measurements["accuracy", "search"]
        rival = store.trial(study.id, told.detail["rival"])
        (whole,) = evaluator.measure(trial.assignment, "search")
        assert whole.value < rival.values(["accuracy"])[0]
        assert rival.values([SIZE]) <= trial.values([SIZE])
        assert told.n < 150
        assert not trial.on_frontier
