"""Tokens that are hidden from a masked language model: which, how they are judged, and who is refused."""

import shutil

import numpy as np
import pytest
import torch

from autoq.assignment import Assignment
from autoq.errors import DataRefused, SpecError
from autoq.evaluation import Evaluator
from autoq.scheme import Keep, parse_scheme
from autoq.search import setup
from autoq.spec import build_spec

NAME = "masked_token_accuracy"
MASK = 3
DATA = {f"{part}_tokens": 512 for part in ("calibration", "search", "report")} | {"window_tokens": 64}


@pytest.fixture(scope="module")
def tree(trained_models, trained_model_dir, tiny_models, tmp_path_factory):
    """A spec as plain data: a BERT that was trained on hidden bytes, and the text that it was trained on."""
    folder = tmp_path_factory.mktemp("masked")
    shutil.copytree(trained_model_dir("bert"), folder / "model")
    tokenizer = tiny_models.tokenizer()
    tokenizer.mask_token = "<unk>"  # what hid them in training
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(trained_models.documentation())
    return {
        "model": {"id": str(folder / "model"), "dtype": "float32"},
        "data": {**DATA, "source": str(folder / "text.txt")},
        "target": {"name": "generic"},
        "space": {"schemes": ["keep", "rtn-int2-channel"]},
        "objectives": [NAME, "size_bytes"],
        "workers": {"cpus": 1},
    }


@pytest.fixture(scope="module")
def evaluator(tree):
    return Evaluator(build_spec(tree))


def uniform(evaluator):
    scheme = parse_scheme("rtn-int2-channel")
    return Assignment({x.name: scheme if x.kind == "linear" else Keep() for x in evaluator.info.layers})


def hidden_in(evaluator, part):
    """Of each window its ids, which places were hidden, and what was there."""
    _, shares = evaluator._tasks._ready(*evaluator._tasks._objectives[NAME], part)
    return [window for share in shares for window in share]


@pytest.mark.parametrize("part", ["search", "report"])
def test_the_value_is_the_share_of_hidden_tokens_that_are_found(evaluator, part):
    assignment = uniform(evaluator)
    (found,) = evaluator.measure(assignment, part)
    windows, shares = getattr(evaluator.parts, part), []
    prepared = hidden_in(evaluator, part)
    assert len(prepared) == len(windows) == 8
    with evaluator.swapped(assignment), torch.no_grad():
        for window, (ids, places, true) in zip(windows, prepared, strict=True):
            hidden = window.clone()
            hidden[places] = MASK
            assert torch.equal(hidden, ids)
            assert torch.equal(window[places], true)
            assert len(set(places.tolist())) == round(0.15 * 64)
            best = evaluator.model.model(input_ids=hidden.unsqueeze(0)).logits[0].argmax(-1)
            shares.append(float((best == window)[places].double().mean()))
    assert found.value == pytest.approx(np.mean(shares))
    assert found.stderr == pytest.approx(np.std(shares, ddof=1) / 8**0.5), "of windows, not of tokens"
    assert (found.n, found.unit) == (8, "share")
    np.testing.assert_allclose(found.per_token[:, 0], shares, rtol=1e-6)


@pytest.mark.parametrize(("known", "value"), [(8, 1.0), (4, 0.5), (0, 0.0)])
def test_who_knows_every_token_of_some_windows_finds_that_share(evaluator, monkeypatch, known, value):
    asked = iter(enumerate(evaluator.parts.search))

    def outputs(ids):
        index, window = next(asked)
        assert (ids[0] != window).sum() > 0, "tokens are hidden from it"
        said = window if index < known else torch.full_like(window, MASK)
        return torch.nn.functional.one_hot(said, 300).float().unsqueeze(0)

    monkeypatch.setattr(evaluator.model, "outputs", outputs)
    (found,) = evaluator.measure(Assignment({}), "search")
    assert found.value == value


def test_a_trained_model_finds_more_than_chance(evaluator):
    (found,) = evaluator.measure(Assignment({}), "report")
    assert found.value > 0.1  # 1 in 300


def test_the_same_tokens_are_hidden_every_time_and_others_with_another_seed(evaluator, tree):
    def places(evaluator, part):
        return [place.tolist() for _, place, _ in hidden_in(evaluator, part)]

    search, report = places(evaluator, "search"), places(evaluator, "report")
    again = Evaluator(build_spec(tree))
    assert (places(again, "search"), places(again, "report")) == (search, report)
    assert len({tuple(each) for each in search + report}) == 16, "each window hides others"
    other = Evaluator(build_spec(tree | {"data": {**tree["data"], "seed": 1}}))
    assert places(other, "search") != search


def test_special_tokens_are_never_hidden(tree, tiny_models, tmp_path):
    shutil.copytree(tree["model"]["id"], tmp_path / "model")
    tokenizer = tiny_models.tokenizer(single="<s> $A </s>")
    tokenizer.mask_token = "<unk>"
    tokenizer.save_pretrained(tmp_path / "model")
    evaluator = Evaluator(build_spec(tree | {"model": {"id": str(tmp_path / "model"), "dtype": "float32"}}))
    for ids, places, true in hidden_in(evaluator, "search"):
        assert (int(ids[0]), int(ids[-1])) == (1, 2)
        assert 0 < int(places.min()) <= int(places.max()) < 63
        assert len(true) == round(0.15 * 62)


def test_a_tokenizer_without_a_mask_is_refused(tree, trained_model_dir):
    evaluator = Evaluator(build_spec(tree | {"model": {"id": str(trained_model_dir("bert")), "dtype": "float32"}}))
    with pytest.raises(DataRefused, match=r"^data: the model's tokenizer has no mask token"):
        evaluator.describe()


def test_causal_models_are_refused_by_name(tree, tiny_model_dir):
    spec = build_spec(tree | {"model": {"id": str(tiny_model_dir("llama")), "dtype": "float32"}})
    with pytest.raises(
        SpecError, match=r"masked_token_accuracy.*it needs a masked model, and LlamaForCausalLM is causal"
    ):
        setup.pose(spec)


def test_it_is_measured_on_no_task(tree):
    more = {"objectives": [f"{NAME}:mine", "size_bytes"], "tasks": {"mine": {"source": "x.jsonl"}}}
    with pytest.raises(SpecError, match=r"masked_token_accuracy:mine: it is measured on the study's text"):
        setup.pose(build_spec(tree | more))
