"""Seeds: different, spread, best at their budgets, within the limit."""

import numpy as np
import pytest

from autoq.layer import Layer, ModelInfo
from autoq.scheme import parse_scheme
from autoq.search import seeds
from autoq.search.prior import Additive
from autoq.search.space import SearchSpace, Variable
from autoq.targets import CostTable

SCHEMES = tuple(parse_scheme(f"rtn-int{bits}-g64") for bits in (2, 3, 4, 6, 8))


@pytest.fixture
def setting():
    rng = np.random.default_rng(0)
    layers = tuple(Layer(f"l{i}", "linear", int(64 * rng.integers(1, 5)), 128, 2) for i in range(12))
    info = ModelInfo("Tiny", "causal", "bfloat16", 10, 10, layers, 0)
    space = SearchSpace(info, tuple(Variable(layer.name, (layer,), SCHEMES) for layer in layers))
    scale = rng.lognormal(size=len(layers))
    loss = {layer.name: {str(s): scale[i] * 4.0**-s.bits for s in SCHEMES} for i, layer in enumerate(layers)}
    time = {layer.name: {str(s): layer.parameters * (9 - s.bits) for s in SCHEMES} for layer in layers}
    return space, loss, CostTable("cpu", {"latency_decode_ms": 1.0}, {"latency_decode_ms": time})


def size(space, indices):
    return sum(v.members[0].nbytes(v.choices[i]) for v, i in zip(space.variables, indices, strict=True))


def proposals(space, loss, costs, latencies, count, **limits):
    """Seeds by size, of a model that has a thousand bytes beside its layers; `limits` are without them."""
    parts = {v.name: np.array([v.members[0].nbytes(s) for s in v.choices], dtype=np.float64) for v in space.variables}
    table = Additive(
        1000.0, parts, *(limits.get(end, none) + 1000.0 for end, none in (("low", -np.inf), ("high", np.inf)))
    )
    return seeds.proposals(space, loss, [table], costs, latencies, count)


def predicted(space, loss, indices):
    return sum(loss[v.name][str(v.choices[i])] for v, i in zip(space.variables, indices, strict=True))


def test_seeds_are_different_and_span_the_sizes(setting):
    space, loss, _ = setting
    found = proposals(space, loss, None, [], 10)
    assert len({tuple(seed) for seed in found}) == 10
    sizes = sorted(size(space, seed) for seed in found)
    low, high = size(space, [0] * 12), size(space, [4] * 12)
    assert sizes[0] == low
    assert sizes[-1] == high
    assert max(np.diff(sizes)) < 0.3 * (high - low)


def test_no_seed_is_beaten_by_another_of_the_same_kind(setting):
    space, loss, _ = setting
    points = sorted((size(space, s), predicted(space, loss, s)) for s in proposals(space, loss, None, [], 12))
    losses = [value for _, value in points]
    assert losses == sorted(losses, reverse=True)


def test_a_prefix_of_the_seeds_is_spread_too(setting):
    space, loss, _ = setting
    found = proposals(space, loss, None, [], 16)[:4]
    sizes = [size(space, seed) for seed in found]
    low, high = size(space, [0] * 12), size(space, [4] * 12)
    assert max(sizes) - min(sizes) > 0.5 * (high - low)


def test_latency_seeds_reach_the_fast_end(setting):
    """Here wide is fast, so size and latency pull apart and the seeds must cover both ends."""
    space, loss, costs = setting
    found = proposals(space, loss, costs, ["latency_decode_ms"], 18)
    times = [costs.predict("latency_decode_ms", space.assignment(seed)) for seed in found]
    fastest = costs.predict("latency_decode_ms", space.assignment([4] * 12))
    assert min(times) == fastest
    assert min(size(space, seed) for seed in found) == size(space, [0] * 12)


def test_the_size_limit_holds_and_seeds_reach_it(setting):
    """A tight limit leaves as many seeds as a wide one: they are spread below it, not cut off at it."""
    space, loss, costs = setting
    low, high = size(space, [0] * 12), size(space, [4] * 12)
    for share in (0.1, 0.5):
        limit = low + share * (high - low)
        found = proposals(space, loss, None, [], 12, high=limit)
        sizes = [size(space, seed) for seed in found]
        assert len(found) >= 10
        assert max(sizes) <= limit
        assert max(sizes) > low + 0.8 * (limit - low)
    with_latency = proposals(space, loss, costs, ["latency_decode_ms"], 12, high=limit)
    assert len(with_latency) >= 10
    assert all(size(space, seed) <= limit for seed in with_latency)


def test_a_limit_that_only_the_lightest_keeps_gives_the_lightest(setting):
    space, loss, _ = setting
    assert proposals(space, loss, None, [], 5, high=size(space, [0] * 12)) == [[0] * 12]


def test_a_least_size_is_kept_too(setting):
    space, loss, costs = setting
    low, high = size(space, [0] * 12), size(space, [4] * 12)
    least, most = low + 0.6 * (high - low), low + 0.8 * (high - low)
    for latencies, limits in [([], {}), ([], {"high": most}), (["latency_decode_ms"], {})]:
        found = proposals(space, loss, costs, latencies, 12, low=least, **limits)
        sizes = [size(space, seed) for seed in found]
        assert len(found) >= 9
        assert min(sizes) >= least
        assert max(sizes) <= limits.get("high", high)
