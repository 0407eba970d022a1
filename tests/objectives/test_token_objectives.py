"""Distances between distributions and shares of right tokens: against SciPy, explicit sums, and by hand."""

import math

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.distance import jensenshannon

from autoq import plugins
from autoq.layer import ModelInfo
from autoq.objectives import Objective, TokenChunk

LOGITS = arrays.arrays(np.float32, (6, 9), elements=st.floats(-60, 60, width=32))
SHARES = ("next_token_accuracy", "top1_agreement")


def get(name):
    return plugins.load("objectives", name, Objective)


def chunk(logits, reference_logits, next_token=None):
    """What the evaluator makes of logits (t, v): the reference rounded to bfloat16, its top choice not."""
    z, r = torch.as_tensor(logits), torch.as_tensor(reference_logits)
    p = r.softmax(-1).to(torch.bfloat16)
    mass = p.float().sum(-1)
    share = p.float() / mass.unsqueeze(-1)
    target = torch.full((len(z),), -1) if next_token is None else torch.as_tensor(next_token)
    return TokenChunk(z, target, p, z.logsumexp(-1), mass, -torch.special.entr(share).sum(-1), r.argmax(-1))


def js(logits, reference_logits):
    return get("js_nats_per_token").per_token(chunk(logits, reference_logits)).double().numpy()


def test_js_is_that_of_scipy():
    rng = np.random.default_rng(0)
    z, r = rng.normal(size=(2, 40, 50)).astype(np.float32) * 3
    p = chunk(z, r).reference.double().numpy()
    q = torch.tensor(z).double().softmax(-1).numpy()
    expected = [jensenshannon(a, b, base=math.e) ** 2 for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(js(z, r), expected, rtol=1e-5, atol=1e-7)


@given(LOGITS, LOGITS)
def test_js_is_between_zero_and_ln_2(z, r):
    found = js(z, r)
    assert (found >= -1e-6).all()
    assert (found <= math.log(2) + 1e-6).all()


@given(LOGITS, LOGITS)
def test_js_is_symmetric(z, r):
    # The reference is rounded and the candidate is not, so both sides are first made what rounding leaves alone.
    z, r = (torch.tensor(x).softmax(-1).to(torch.bfloat16).float().clamp(min=1e-30).log() for x in (z, r))
    np.testing.assert_allclose(js(z, r), js(r, z), atol=5e-3)


@given(LOGITS, LOGITS)
def test_js_is_at_most_a_quarter_of_the_sum_of_both_kl(z, r):
    """Lin 1991, theorem 2, with the Jeffreys divergence J = KL(p‖q) + KL(q‖p): JS ≤ J / 4."""
    q = torch.tensor(z).double().log_softmax(-1)
    p = chunk(z, r).reference.double()
    p = (p / p.sum(-1, keepdim=True)).clamp(min=1e-300).log()
    jeffreys = ((p.exp() - q.exp()) * (p - q)).sum(-1).numpy()
    assert (js(z, r) <= jeffreys / 4 + 1e-5).all()


def test_js_of_equal_models_is_zero_and_of_disjoint_ones_ln_2():
    z = torch.randn(5, 300, generator=torch.Generator().manual_seed(0))
    assert js(z, z).max() < 1e-5
    assert js(z + 7, z) == pytest.approx(js(z, z), abs=1e-6)
    certain = torch.full((1, 4), -500.0)
    one, other = certain.clone(), certain.clone()
    one[0, 0] = other[0, 3] = 500.0
    assert js(one, other) == pytest.approx(math.log(2))


def test_js_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4), m = (3/8, 5/8)
    expected = 0.5 * (0.5 * math.log(4 / 3) + 0.5 * math.log(4 / 5) + 0.25 * math.log(2 / 3) + 0.75 * math.log(6 / 5))
    assert js(np.log([[0.25, 0.75]]).astype(np.float32), np.zeros((1, 2), np.float32)) == pytest.approx(
        expected, rel=1e-5
    )


@given(LOGITS, arrays.arrays(np.int64, 6, elements=st.integers(-1, 8)))
def test_accuracy_counts_one_by_one(z, target):
    found = get("next_token_accuracy").per_token(chunk(z, z, target)).numpy()
    for row, wanted, value in zip(z, target, found, strict=True):
        if wanted < 0:
            assert math.isnan(value)
        else:
            best = next(i for i in range(len(row)) if row[i] == max(row))  # the first of equals
            assert value == (best == wanted)


def test_shares_by_hand():
    z = torch.tensor([[0.0, 2.0, 1.0], [3.0, 3.0, 0.0], [0.0, 0.0, 1.0], [5.0, 1.0, 0.0]])
    r = torch.tensor([[0.0, 1.0, 0.9999], [0.0, 3.0, 0.0], [0.0, 0.0, 9.0], [0.0, 1.0, 0.0]])
    made = chunk(z, r, [1, 1, 2, -1])
    assert get("next_token_accuracy").per_token(made)[:3].tolist() == [1.0, 0.0, 1.0]
    # The reference's first choice is exact, although 1.0 and 0.9999 are one probability in bfloat16.
    assert made.reference[0, 1] == made.reference[0, 2]
    assert get("top1_agreement").per_token(made).tolist() == [1.0, 0.0, 1.0, 0.0]


@given(LOGITS)
def test_a_model_agrees_with_itself(z):
    assert get("top1_agreement").per_token(chunk(z, z)).tolist() == [1.0] * len(z)


@pytest.mark.parametrize("name", SHARES)
def test_shares_are_to_be_maximized(name):
    assert get(name).direction == "maximize"


@pytest.mark.parametrize(
    ("name", "tasks"),
    [
        ("js_nats_per_token", {"causal", "masked", "seq2seq"}),
        ("top1_agreement", {"causal", "masked", "seq2seq"}),
        ("next_token_accuracy", {"causal", "seq2seq"}),
    ],
)
def test_tasks_without_meaning_are_refused(name, tasks):
    for task in ("causal", "masked", "seq2seq", "encoder"):
        rule = get(name).refuses(ModelInfo("Tiny", task, "bfloat16", 10, None, (), 0))
        assert (rule is None) == (task in tasks)
        assert rule is None or f"Tiny is {task}" in rule
