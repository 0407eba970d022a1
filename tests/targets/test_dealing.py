"""Latency tables from whole models: the algebra, on made-up times with a known interaction."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq import plugins
from autoq.assignment import Assignment
from autoq.layer import Layer
from autoq.scheme import Keep, parse_scheme
from autoq.spec import TargetSpec
from autoq.targets import Target
from autoq.targets import _dealing as dealing
from autoq.targets import _torch_cpu_costs as costs
from autoq.targets import _torch_cpu_timing as timing

PREFILL, DECODE = timing.PREFILL, timing.DECODE
KERNELS = ("keep", "a", "b", "c")


def made_up(own: list[tuple[str, ...]], layers: int = 5):
    """A kind for each tuple of quantized kernels, with so many layers."""
    found = []
    for number, kernels in enumerate(own):
        names = [Layer(f"{number}.{index}", "linear", 8, 8, 2, False, ()) for index in range(layers)]
        found.append(
            dealing.Kind(tuple(names), ("keep", *kernels), {k: [f"{k} {n.name}" for n in names] for k in kernels})
        )
    return found


own_kernels = st.lists(
    st.lists(st.sampled_from("abc"), unique=True).map(lambda k: tuple(sorted(k))), min_size=1, max_size=4
)


@given(own_kernels, st.integers(1, 4))
def test_leaders_give_each_kind_all_its_kernels_and_each_layer_its_own_weight(own, layers):
    kinds = made_up(own, layers)
    dealt = dealing.leaders(kinds)
    assert len(dealt) == max(1, len(set().union(*own)))
    for kind in kinds:
        met = {deal[layer.name][0] for deal in dealt for layer in kind.layers}
        assert met == (set(kind.kernels[1:]) or {"keep"})
    for deal in dealt:
        assert set(deal) == {layer.name for kind in kinds for layer in kind.layers}
        assert all(
            weight == (None if kernel == "keep" else f"{kernel} {name}") for name, (kernel, weight) in deal.items()
        )


@settings(max_examples=60)
@given(
    st.lists(st.sampled_from([("a", "b", "c"), ("a", "b"), ("b", "c"), ("c",), ()]), min_size=1, max_size=5),
    st.lists(st.floats(-0.4, 0.4), min_size=3, max_size=3),
    st.integers(0, 99),
)
def test_models_that_were_timed_and_mixtures_of_them_are_predicted(own, shares, seed):
    """Whatever a kernel does to what runs beside it, in proportion to its layers, is found in whole models."""
    kinds, dice = made_up([*own, ("a", "b", "c")]), random.Random(seed)
    beside = dict(zip("abc", shares, strict=True), keep=0.0)
    spent = {(i, k): dice.uniform(0.2, 2) for i, kind in enumerate(kinds) for k in kind.kernels}
    unquantized = 10 + sum(5 * spent[i, "keep"] for i in range(len(kinds)))
    kind_of = {layer.name: i for i, kind in enumerate(kinds) for layer in kind.layers}

    def whole(deal, share):
        return unquantized + sum(
            spent[kind_of[n], k] - spent[kind_of[n], "keep"] + share[k] * spent[kind_of[n], "keep"]
            for n, k in deal.items()
        )

    dealt = dealing.leaders(kinds)
    taken = [whole({n: k for n, (k, _) in deal.items()}, beside) for deal in dealt]
    found = dealing.around(kinds, dealt, spent, taken, unquantized) | {"keep": 0.0}
    for deal, took in zip(dealt, taken, strict=True):
        assert whole({n: k for n, (k, _) in deal.items()}, found) == pytest.approx(took, abs=0.02 * unquantized)
    mixed = {layer.name: dice.choice(kind.kernels) for kind in kinds for layer in kind.layers}
    assert whole(mixed, found) == pytest.approx(whole(mixed, beside), abs=0.03 * unquantized)


def test_one_model_by_hand():
    """Five layers of 2 ms in a model of 20 run in 1 ms and take another 3 ms off the rest: 0.3 of their 10 ms."""
    kinds = made_up([("a",)])
    (deal,) = dealing.leaders(kinds)
    spent = {(0, "keep"): 2.0, (0, "a"): 1.0}
    assert dealing.around(kinds, [deal], spent, [12.0], 20.0) == {"a": pytest.approx(-0.3, abs=0.001)}
    assert dealing.around(kinds, [deal], spent, [15.0], 20.0) == {"a": pytest.approx(0.0, abs=1e-9)}


def test_a_kernel_that_hardly_matters_has_the_share_of_the_others():
    """`c` runs a hundredth of the model, and what noise makes of that is not believed."""
    kinds = made_up([("a", "b"), ("a", "b", "c")])
    spent = {(0, "keep"): 2.0, (0, "a"): 1.0, (0, "b"): 1.5} | {(1, k): 0.02 for k in KERNELS}
    dealt = dealing.leaders(kinds)
    share = -0.2
    taken = [20.0 + sum(spent[int(n[0]), k] - (1 - share) * spent[int(n[0]), "keep"] for n, (k, _) in deal.items())
             for deal in dealt]  # fmt: skip
    taken[2] += 0.1  # the model that `c` leads came out 0.5 % too slow
    assert dealing.around(kinds, dealt, spent, taken, 20.0)["c"] == pytest.approx(-0.2, abs=0.05)


def test_no_kernel_at_all():
    kinds = made_up([()])
    assert [kernel for kernel, _ in dealing.leaders(kinds)[0].values()] == ["keep"] * 5
    assert dealing.around(kinds, dealing.leaders(kinds), {(0, "keep"): 1.0}, [9.0], 9.0) == {}


SPENT = {"Linear": 4e-5, "Int4Linear": 1e-5, "Int8Linear": 2e-5, "Embedding": 0.0, "Int8Embedding": 0.0}
BESIDE = {"Linear": 0.0, "Int4Linear": -0.3, "Int8Linear": -0.1, "Embedding": 0.0, "Int8Embedding": 0.0}


class FakeSession:
    """A machine on which everything is known: a layer takes `SPENT` of its kernel for each of its weights, and
    takes `BESIDE` of what it takes as it is off the rest of the model."""

    REST = 3.0
    phases = (PREFILL, DECODE)

    def __init__(self, model, workload):
        self.slow = itertools.cycle((1.0, 3.0, 1.5))  # a busy machine

    def parts(self, forwards):
        """Layer -> what it takes, and what its company does to the rest."""
        layers, rest = {}, self.REST
        for name, pairs in forwards.items():
            layers[name] = 0.0
            for module, forward in pairs:
                kernel = type(forward.__self__).__name__
                layers[name] += SPENT[kernel] * module.weight.numel()
                rest += BESIDE[kernel] * SPENT["Linear"] * module.weight.numel()
        return layers, rest

    def in_place(self, forwards, rounds, slow):
        layers, rest = self.parts(forwards)
        whole = rest + sum(layers.values())
        return timing.InPlace(
            {p: {n: [ms * slow] * rounds for n, ms in layers.items()} for p in self.phases},
            {p: [whole * slow] * rounds for p in self.phases},
        )


@pytest.fixture
def known_times(monkeypatch):
    sessions = []

    def session(model, workload):
        sessions.append(FakeSession(model, workload))
        return sessions[-1]

    def time_layers(session, forwards, kept, rounds):
        slow = next(session.slow)
        return timing.LayerTurns(session.in_place(forwards, rounds, slow), session.in_place(kept, rounds, slow))

    def time_in_turns(session, forwards):
        model = fixture["model"]
        kept = {n.name: [(m, m.forward) for m in model.modules_of(n)] for n in model.info.layers}
        whole = session.in_place(kept, 2, 1.0).whole
        samples = {p: timing.Samples(values, values) for p, values in whole.items()}
        return timing.Turns(samples, samples, {p: [1.0, 1.0] for p in whole})

    fixture: dict = {"sessions": sessions}
    monkeypatch.setattr(costs, "Session", session)
    monkeypatch.setattr(costs, "time_layers", time_layers)
    monkeypatch.setattr(costs, "time_in_turns", time_in_turns)
    return fixture


@pytest.mark.parametrize("kept", [0.0, 0.3])
def test_a_table_finds_what_the_layers_do_to_the_rest_of_the_model(tiny, quantize, known_times, kept):
    model = known_times["model"] = tiny("llama")
    target = plugins.load("targets", "torch_cpu", Target)
    texts = {
        layer.name: [
            t for t in ("rtn-int4-g64", "rtn-int8-channel-sym") if target.refuses(layer, parse_scheme(t)) is None
        ]
        for layer in model.info.layers
    }
    choices = {name: [quantize(model.weight(name), text) for text in own] for name, own in texts.items()}
    table = target.cost_table(model, choices, TargetSpec(prompt_tokens=24, threads=1))
    assert max(table.detail["drift"].values()) == pytest.approx(2.0)
    session, dice = known_times["sessions"][0], random.Random(1)
    names = {"rtn-int4-g64": "Int4Linear", "rtn-int8-channel-sym": "Int8Linear", "keep": "Linear"}
    for share in (0.0, 0.2, 0.5, 0.8, 1.0):
        assignment, took = {}, session.REST
        for layer in model.info.layers:
            text = "keep" if dice.random() < kept else texts[layer.name][-1 if dice.random() < share else 0]
            assignment[layer.name] = Keep() if text == "keep" else parse_scheme(text)
            kernel = names[text]
            took += layer.parameters * (SPENT[kernel] + BESIDE[kernel] * SPENT["Linear"])
        for phase in session.phases:
            assert min(ms for entry in table.layer_ms[phase].values() for ms in entry.values()) >= 0
            assert table.predict(phase, Assignment(assignment)) == pytest.approx(took, rel=0.01)
