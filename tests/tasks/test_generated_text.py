"""BLEU, chrF and ROUGE-L of what models generate, and nDCG of what encoders rank: against the reference packages."""

import json

import numpy as np
import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from scipy.stats import rankdata

from autoq.assignment import Assignment
from autoq.errors import DataRefused, SpecError
from autoq.evaluation import Evaluator
from autoq.objectives import load
from autoq.scheme import Keep, parse_scheme
from autoq.search import setup
from autoq.search.controller import create_study, run_study
from autoq.spec import build_spec
from autoq.store import Store
from autoq.store.dominance import non_dominated
from autoq.study import Study
from autoq.tasks.kinds.ranking import Ranking
from autoq.tasks.runner import judged

SIZE = "size_bytes"
COUNTS = {"search_examples": 40, "report_examples": 60}
PAIRS = st.lists(st.tuples(*[st.text("ab c,.1", min_size=1, max_size=30)] * 2), min_size=1, max_size=12)


def uniform(evaluator, text):
    scheme = parse_scheme(text)
    return Assignment({x.name: scheme if x.kind == "linear" else Keep() for x in evaluator.info.layers})


def by_name(measurements):
    return {m.objective: m for m in measurements}


@given(PAIRS)
@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_corpus_scores_are_those_of_sacrebleu(name, pairs):
    objective = load(name)
    scores = np.array([objective.score({"target": target}, answer) for answer, target in pairs], dtype=np.float64)
    function = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name]
    answers, targets = ([pair[i] for pair in pairs] for i in range(2))
    assert objective.value(scores) == pytest.approx(function(answers, [targets], **_force(name)).score)


def _force(name):
    return {"force": True} if name == "bleu" else {}


def test_bleu_by_hand():
    # 4 of 5, 3 of 4, 2 of 3 and 1 of 2 n-grams, and no brevity penalty
    objective = load("bleu")
    scores = [objective.score({"target": "the cat sat down here"}, "the cat sat down there")]
    expected = 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert objective.value(np.array(scores, dtype=np.float64)) == pytest.approx(expected)


def test_the_error_of_bleu_is_the_bootstraps():
    """sacreBLEU's own resampling, of 1,000 draws, gives half the width of a 95 % interval."""
    rng = np.random.default_rng(0)
    words = [f"w{i}" for i in range(30)]
    targets = [" ".join(rng.choice(words, size=12)) for _ in range(150)]
    answers = [" ".join(w if rng.random() < 0.8 else "x" for w in target.split()) for target in targets]
    objective = load("bleu")
    scores = np.array([objective.score({"target": t}, a) for a, t in zip(answers, targets, strict=True)], dtype=float)
    value, stderr, each = judged(objective, scores)
    theirs = sacrebleu.metrics.BLEU().corpus_score(answers, [targets], n_bootstrap=1000)
    assert value == pytest.approx(theirs.score)
    assert 1.96 * stderr == pytest.approx(theirs._ci, rel=0.15)
    assert np.std(each, ddof=1) / 150**0.5 == pytest.approx(stderr, rel=0.15)


@given(st.text("ab c,.1", max_size=30), st.text("ab c,.1", max_size=30))
def test_rouge_l_is_the_longest_common_subsequence(answer, target):
    found = load("rouge_l").score({"target": target}, answer)[0]
    one, two = (text.replace(",", " ").replace(".", " ").split() for text in (answer, target))
    table = np.zeros((len(one) + 1, len(two) + 1), dtype=int)
    for i, a in enumerate(one):
        for j, b in enumerate(two):
            table[i + 1, j + 1] = table[i, j] + 1 if a == b else max(table[i, j + 1], table[i + 1, j])
    common = table[-1, -1]
    expected = 2 * common / (len(one) + len(two)) if common else 0.0
    assert found == pytest.approx(expected)


def test_generated_texts_are_judged_as_they_are(speller, study_tree):
    names = ["bleu", "chrf", "rouge_l"]
    task = {**COUNTS, "new_tokens": 20}
    evaluator = Evaluator(build_spec(study_tree(speller, task, [*names, SIZE])))
    assignment = uniform(evaluator, "rtn-int2-channel")
    found = by_name(evaluator.measure(assignment, "search"))
    rows = evaluator._tasks._examples["mine", "text"].search
    tokenizer, answers = evaluator.model.tokenizer, []
    with evaluator.swapped(assignment), torch.no_grad():
        for row in rows:  # one by one, without a cache
            ids, said = torch.tensor([tokenizer(row["source"])["input_ids"]]), [0]
            while len(said) < 21 and said[-1] != 2:
                logits = evaluator.model.model(input_ids=ids, decoder_input_ids=torch.tensor([said])).logits
                said.append(int(logits[0, -1].argmax()))
            answers.append(tokenizer.decode(said, skip_special_tokens=True).strip())
    targets = [row["target"] for row in rows]
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(answers, [targets]).score)
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(answers, [targets]).score)
    scorer = RougeScorer(["rougeL"])
    rouge = [scorer.score(t, a)["rougeL"].fmeasure for a, t in zip(answers, targets, strict=True)]
    assert found["rouge_l"].value == pytest.approx(np.mean(rouge))
    assert found["rouge_l"].stderr == pytest.approx(np.std(rouge, ddof=1) / len(rows) ** 0.5)
    assert found["bleu"].stderr > 0
    whole = by_name(evaluator.measure(Assignment({}), "search"))
    for name in names:
        assert whole[name].value > found[name].value, name


def test_a_causal_model_goes_on_from_its_prompt(chooser, study_tree, tmp_path, write_rows):
    rows = map(json.loads, (chooser / "examples.jsonl").read_text().splitlines())
    pairs = [{"source": row["prompt"], "target": row["choices"][row["answer"]]} for row in rows]
    file = write_rows(tmp_path / "pairs.jsonl", pairs)
    task = {"source": str(file), "search_examples": 60, "report_examples": 60, "new_tokens": 1}
    evaluator = Evaluator(build_spec(study_tree(chooser, task, ["rouge_l", SIZE])))
    (found,) = evaluator.measure(Assignment({}), "search")
    assert found.value > 0.7  # one letter: it is right or wrong
    assert set(found.per_token[:, 0]) <= {0.0, 1.0}


def test_what_is_too_long_to_generate_is_refused(chooser, study_tree, tmp_path, write_rows):
    file = write_rows(tmp_path / "pairs.jsonl", [{"source": c * 100, "target": "x"} for c in "ab"])
    task = {"source": str(file), "search_examples": 1, "report_examples": 1, "new_tokens": 40}
    evaluator = Evaluator(build_spec(study_tree(chooser, task, ["bleu", SIZE])))
    with pytest.raises(DataRefused, match=r"tasks\.mine: sources of up to 100 tokens and new_tokens 40 need 140"):
        evaluator.describe()


def test_a_missing_package_is_named(speller, study_tree, monkeypatch):
    monkeypatch.setattr(load("bleu"), "packages", ("no_such_package",), raising=False)
    with pytest.raises(SpecError, match=r"bleu: no_such_package is not installed: pip install 'autoq\[tasks\]'"):
        setup.pose(build_spec(study_tree(speller, COUNTS, ["bleu"])))


def test_ndcg_by_hand():
    # Ranked 3, 0, 2 where 3, 2, 0 is best: discounts 1, 0.6309, 0.5.
    found = load("ndcg").score({"relevance": [0, 2, 3]}, [0.5, 0.1, 0.9])[0]
    assert found == pytest.approx((3 + 2 * 0.5) / (3 + 2 * 0.63092975))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.floats(-1, 1)), min_size=2, max_size=30).filter(
        lambda pairs: any(grade for grade, _ in pairs)
    )
)
def test_ndcg_is_that_of_its_definition(pairs):
    grades, cosines = zip(*pairs, strict=True)
    places = rankdata([-c for c in cosines], method="ordinal")
    dcg = sum(g / np.log2(p + 1) for g, p in zip(grades, places, strict=True) if p <= 10)
    best = sum(g / np.log2(i + 2) for i, g in enumerate(sorted(grades, reverse=True)[:10]))
    found = load("ndcg").score({"relevance": list(grades)}, list(cosines))[0]
    assert found == pytest.approx(dcg / best)
    assert 0 <= found <= 1 + 1e-12


@pytest.mark.parametrize(
    ("row", "fragment"),
    [
        ({"query": "", "documents": ["a", "b"], "relevance": [1, 0]}, "query must be text"),
        ({"query": "q", "documents": ["a"], "relevance": [1]}, "two texts or more"),
        ({"query": "q", "documents": ["a", "b"], "relevance": [1]}, "a grade from 0 to 100 for each of 2 documents"),
        ({"query": "q", "documents": ["a", "b"], "relevance": [0, 0]}, "one of them above 0"),
        ({"query": "q", "documents": ["a", "b"], "relevance": [-1, 1]}, "a grade from 0 to 100"),
    ],
)
def test_queries_without_an_answer_are_refused(row, fragment):
    with pytest.raises(ValueError, match=fragment):
        Ranking().check(row, None)


def test_documents_are_ranked_by_cosine(searcher, study_tree):
    evaluator = Evaluator(build_spec(study_tree(searcher, COUNTS, ["ndcg", SIZE])))
    scheme = parse_scheme("rtn-int2-channel")
    assignment = Assignment({x.name: scheme for x in evaluator.info.layers})  # embeddings too
    (found,) = evaluator.measure(assignment, "report")
    objective, expected = load("ndcg"), []
    with evaluator.swapped(assignment), torch.no_grad():
        for row in evaluator._tasks._examples["mine", "ranking"].report:
            query, *documents = (
                evaluator.model.model(
                    input_ids=torch.tensor([evaluator.model.tokenizer(text)["input_ids"]])
                ).last_hidden_state[0].mean(0)
                for text in (row["query"], *row["documents"])
            )  # fmt: skip
            cosines = [float(torch.cosine_similarity(query, document, dim=0)) for document in documents]
            expected.append(objective.score(row, cosines)[0])
    assert found.value == pytest.approx(np.mean(expected), abs=1e-6)
    assert found.n == 60
    (whole,) = evaluator.measure(Assignment({}), "report")
    assert whole.value > found.value


@pytest.mark.parametrize(
    ("made", "quality", "report"), [("speller", "bleu", "chrf"), ("searcher", "ndcg", "cosine_distance")]
)
def test_from_examples_to_a_pick(request, study_tree, tmp_path, made, quality, report):
    more = {"report": [report], "space": {"kinds": ["linear", "embedding"], "methods": ["rtn"], "bits": [2, 3, 4, 8]}}
    tree = study_tree(request.getfixturevalue(made), {**COUNTS, "new_tokens": 20}, [quality, SIZE], **more)
    store = Store.open(f"sqlite:///{tmp_path}/autoq.db")
    study = create_study(store, build_spec(tree))
    run_study(store, study.id)
    complete = store.trials(study.id, states=["complete"])
    values = [t.values([quality, SIZE]) for t in complete]
    frontier = store.frontier(study.id)
    assert {t.number for t in frontier} == {complete[i].number for i in non_dominated(values, ["maximize", "minimize"])}
    by_baseline = {t.baseline: t for t in complete if t.baseline}
    whole, coarse = (by_baseline[name] for name in ("unquantized", "uniform-int2"))
    assert whole.values([quality])[0] > coarse.values([quality])[0]
    assert (report, "report") in whole.measurements
    assert (report, "search") not in whole.measurements
    best = max(frontier, key=lambda t: t.values([quality])[0])
    assert Study(store, study.id).pick(best=quality).number == best.number
