"""The latency table of llama.cpp: which files are timed, and what least squares make of their times."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest

from autoq.layer import Layer
from autoq.spec import TargetSpec
from autoq.targets._llama_cpp_costs import KEEP, _Kind, _Timed, deals, fit, shares
from autoq.targets._torch_cpu_timing import DECODE, PREFILL

WIDE = ("q4_0", "q8_0", "f16", KEEP)
LONG = ("q2_k", "q4_0", "q6_k", "q8_0", "f16", KEEP)
UP = [Layer(f"{i}.up", "linear", 512, 192, 4) for i in range(6)]
DOWN = [Layer(f"{i}.down", "linear", 192, 512, 4) for i in range(6)]
HEAD = Layer("head", "head", 2000, 192, 4, tied=("embedding",))
KINDS = [_Kind(tuple(UP), WIDE), _Kind(tuple(DOWN), LONG), _Kind((HEAD,), WIDE)]
LAYERS = [*UP, *DOWN, HEAD]


class TestFiles:
    def test_each_kind_meets_each_of_its_types(self):
        for kind in KINDS:
            met = {deal[kind.layers[0].name] for deal in deals(KINDS)}
            assert met == set(kind.types)

    def test_first_all_layers_are_of_one_type_or_of_the_nearest_in_size(self):
        first = deals(KINDS)[0]
        assert Counter(first.values()) == {"q2_k": 6, "q4_0": 7}

    def test_none_is_timed_twice_and_the_unquantized_one_not_at_all(self):
        found = deals(KINDS)
        assert len({tuple(sorted(deal.items())) for deal in found}) == len(found) <= 2 * len(LONG)
        assert dict.fromkeys((layer.name for layer in LAYERS), KEEP) not in found

    def test_a_model_that_is_only_kept_needs_none(self):
        assert deals([_Kind(tuple(UP), (KEEP,))]) == []


class TestShares:
    def test_the_whole_is_one_and_linears_share_by_weights(self):
        for phase in (PREFILL, DECODE):
            share = shares(LAYERS, phase, TargetSpec(name="llama-cpp", prompt_tokens=64))
            assert sum(share.values()) == pytest.approx(1)
            assert share["0.up"] == share["3.down"]
        assert share["head"] / share["0.up"] == pytest.approx(2000 / 512)

    def test_a_head_computes_one_position_and_a_lookup_nothing(self):
        layers = [UP[0], HEAD, Layer("embedding", "embedding", 2000, 192, 4)]
        share = shares(layers, PREFILL, TargetSpec(name="llama-cpp", prompt_tokens=100))
        assert share["head"] / share["0.up"] == pytest.approx(2000 / 512 / 100)
        assert share["embedding"] == 0


class TestFit:
    """Against a machine made up: a rate for each type, and kinds that are off it by up to a tenth."""

    def world(self, seed: int):
        rng = random.Random(seed)
        rate = {"q2_k": -0.6, "q4_0": -0.7, "q6_k": -0.5, "q8_0": -0.4, "f16": -0.3}
        own = {(i, t): rate[t] + rng.uniform(-0.1, 0.1) for i, k in enumerate(KINDS) for t in k.types if t != KEEP}
        share = shares(LAYERS, DECODE, TargetSpec(name="llama-cpp"))
        index = {layer.name: i for i, kind in enumerate(KINDS) for layer in kind.layers}

        def ratio(deal):
            return 1 + sum(share[name] * own.get((index[name], kind), 0.0) for name, kind in deal.items())

        return share, index, ratio

    @pytest.mark.parametrize("seed", range(3))
    def test_predicts_mixed_files_that_were_never_timed(self, seed):
        share, index, ratio = self.world(seed)
        noise = np.random.default_rng(seed)
        files = deals(KINDS)
        observed = [ratio(deal) * (1 + noise.normal(0, 0.01)) for deal in files]
        found, left = fit(KINDS, files, observed, share)
        assert left < 0.02
        rng, errors = random.Random(seed), []
        for _ in range(50):
            deal = {layer.name: rng.choice(kind.types) for kind in KINDS for layer in kind.layers}
            predicted = 1 + sum(share[name] * found.get((index[name], kind), 0.0) for name, kind in deal.items())
            errors.append(abs(predicted / ratio(deal) - 1))
        assert np.median(errors) < 0.02
        assert max(errors) < 0.06

    def test_without_noise_the_timed_files_are_met(self):
        share, _, ratio = self.world(0)
        files = deals(KINDS)
        _, left = fit(KINDS, files, [ratio(deal) for deal in files], share)
        assert left < 0.005

    def test_nothing_timed_nothing_differs(self):
        kinds = [_Kind(tuple(UP), (KEEP,))]
        assert fit(kinds, [], [], shares(UP, DECODE, TargetSpec(name="llama-cpp"))) == ({}, 0.0)


def test_a_machine_that_slows_down_slows_both():
    drift = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6]
    timed = _Timed({DECODE: [6 * d for d in drift]}, {DECODE: [10 * d for d in drift]})
    assert timed.ratios(DECODE)[2:-2] == pytest.approx([0.6] * 3)
