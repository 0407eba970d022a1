"""Each objective against a direct computation, and sizes against hand-counted bytes."""

import dataclasses
import math

import pytest
import torch

from autoq import plugins
from autoq.assignment import Assignment
from autoq.kv_cache import Cache, KeyValue
from autoq.layer import Layer, ModelInfo
from autoq.objectives import EnergyObjective, LatencyObjective, Objective, QualityObjective, TableObjective, TokenChunk
from autoq.scheme import Keep, parse_scheme
from autoq.spec import TargetSpec

WORKLOAD = TargetSpec()
LAYERS = (
    Layer("block.0.up", "linear", 8, 64, 2),
    Layer("block.0.down", "linear", 64, 8, 2, has_bias=True),
    Layer("lm_head", "head", 100, 8, 2, tied=("embed",)),
)


def info(task="causal"):
    return ModelInfo("TinyForCausalLM", task, "bfloat16", 100, 128, LAYERS, other_bytes=144)


def chunk(logits, reference_logits, next_token):
    p = reference_logits.softmax(-1)
    return TokenChunk(logits, next_token, p, logits.logsumexp(-1), p.sum(-1), (p * p.log()).sum(-1))


def get(name):
    return plugins.load("objectives", name, Objective)


@pytest.mark.parametrize("name", plugins.names("objectives"))
def test_every_objective_keeps_the_contract(name):
    objective = get(name)
    assert isinstance(objective, QualityObjective | TableObjective | LatencyObjective | EnergyObjective)
    assert objective.unit
    assert objective.direction in ("minimize", "maximize")
    assert plugins.summary("objectives", name).endswith(".")


def test_kl_is_the_textbook_divergence():
    torch.manual_seed(0)
    z, r = torch.randn(5, 100), torch.randn(5, 100)
    expected = torch.nn.functional.kl_div(z.log_softmax(-1), r.log_softmax(-1), reduction="none", log_target=True)
    found = get("kl_nats_per_token").per_token(chunk(z, r, torch.zeros(5, dtype=torch.int64)))
    torch.testing.assert_close(found, expected.sum(-1), rtol=1e-4, atol=1e-5)


def test_kl_of_the_same_model_is_zero_and_ignores_a_shift_of_logits():
    z = torch.randn(4, 100)
    kl = get("kl_nats_per_token")
    nothing = torch.zeros(4, dtype=torch.int64)
    assert kl.per_token(chunk(z, z, nothing)).abs().max() < 1e-5
    assert kl.per_token(chunk(z + 7, z, nothing)).abs().max() < 1e-4


def test_perplexity_is_exp_of_cross_entropy_and_skips_the_last_token():
    z = torch.randn(4, 100)
    target = torch.tensor([3, 1, 4, -1])
    perplexity = get("perplexity")
    nll = perplexity.per_token(chunk(z, z, target))
    assert nll[3].isnan()
    expected = torch.nn.functional.cross_entropy(z[:3], target[:3])
    value, error = perplexity.transform(float(nll[:3].mean()), 0.1)
    assert value == pytest.approx(math.exp(expected), rel=1e-5)
    assert error == pytest.approx(value * 0.1)
    assert perplexity.transform(1e4, 1.0)[0] == math.inf


def test_perplexity_is_refused_for_masked_models():
    assert "masked" in get("perplexity").refuses(info("masked"))
    assert get("perplexity").refuses(info()) is None


def test_cosine_distance():
    h = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    r = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0]])
    found = get("cosine_distance").per_token(TokenChunk(h, torch.full((3,), -1), r))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 2.0]))


def test_size_counts_every_byte():
    size = get("size_bytes")
    kept = 8 * 64 * 2 + 64 * 8 * 2 + 100 * 8 * 2 + 144
    assert size.compute(info(), Assignment({}), WORKLOAD) == kept
    assert size.compute(info(), Assignment({layer.name: Keep() for layer in LAYERS}), WORKLOAD) == kept
    # 8 rows of 64 4-bit codes, one 2-byte scale per row and group of 32, zero points packed per row
    up = 8 * 32 + 8 * 2 * 2 + 8 * 1
    assert size.compute(info(), Assignment({"block.0.up": parse_scheme("rtn-int4-g32")}), WORKLOAD) == kept - 1024 + up


def test_bits_per_weight_counts_scales_and_leaves_a_kept_embedding_out():
    bits = get("bits_per_weight")
    assert bits.compute(info(), Assignment({}), WORKLOAD) == 16
    both = Assignment(
        {"block.0.up": parse_scheme("rtn-int8-channel-sym"), "block.0.down": parse_scheme("rtn-int8-channel-sym")}
    )
    assert bits.compute(info(), both, WORKLOAD) == pytest.approx(8 + 8 * (16 + 128) / 1024)


def test_peak_memory_is_weights_and_the_caches_of_the_whole_batch():
    found = get("peak_memory_bytes")
    caches = (Cache("block.0.attn", 2, 16, 8, 2), Cache("block.1.attn", 2, 16, 8, 2, window=50))
    model = dataclasses.replace(info(), caches=caches)
    workload = TargetSpec(batch_size=3, prompt_tokens=70)
    weights = get("size_bytes").compute(model, Assignment({}), workload)
    # 70 tokens of 2 heads by 16 + 8 numbers, then 50 of them
    assert found.compute(model, Assignment({}), workload) == weights + 3 * (70 + 50) * 2 * 24 * 2
    # keys: 2 groups of 32 4-bit codes with a scale and a zero for each of 32 channels, and 6 tokens as they were;
    # values: 70 tokens of 2 heads, 8 codes with a scale and a zero
    coded = Assignment({"block.0.up": parse_scheme("rtn-int4-g32")}, caches={"block.0.attn": KeyValue(4)})
    saved = weights - get("size_bytes").compute(model, coded, workload)
    own = 32 * (2 * (16 + 4) + 6 * 2) + 70 * 2 * (4 + 4)
    assert found.compute(model, coded, workload) == weights - saved + 3 * (own + 50 * 2 * 24 * 2)
    assert found.refuses(model) is None
    assert "TinyForCausalLM" in found.refuses(info())
