"""Clustering by curvature: by hand, beside the exact weighted optimum, and never worse than without."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq import plugins
from autoq.errors import SchemeRefused
from autoq.layer import Layer
from autoq.methods import Method, _clusters
from autoq.scheme import parse_scheme

WEIGHTED, PLAIN = (plugins.load("methods", name, Method) for name in ("wkmeans", "kmeans"))


def made(weight, text, importance):
    return WEIGHTED.quantize(weight, parse_scheme(f"w{text}"), {"input_mean_square": importance})


def plain(weight, text):
    return PLAIN.quantize(weight, parse_scheme(text))


def errors(quantized, weight, importance):
    """Each row's error, weighed by its inputs."""
    return ((quantized.dequantize().double() - weight.double()).square() * importance.double()).sum(-1)


def importances(kind, inputs):
    generator = torch.Generator().manual_seed(4)
    return {
        "log-normal": lambda: (1.5 * torch.randn(inputs, generator=generator)).exp(),
        "one huge": lambda: torch.ones(inputs).index_fill(0, torch.tensor([3]), 1e4),
        "some zero": lambda: torch.rand(inputs, generator=generator) * (torch.arange(inputs) % 3 > 0),
        "tiny": lambda: 1e-30 * torch.rand(inputs, generator=generator),
    }[kind]()


KINDS = ("log-normal", "one huge", "some zero", "tiny")


def optimum(row, importance, clusters):
    """The least weighted error of any clustering, O(k n²)."""
    order = np.argsort(row)
    x, a = row[order], importance[order]
    masses, sums, squares = (np.r_[0, numbers.cumsum()] for numbers in (a, a * x, a * x * x))
    mass = masses[None] - masses[:, None]
    cost = (squares[None] - squares[:, None]) - (sums[None] - sums[:, None]) ** 2 / np.where(mass > 0, mass, 1)
    ends = np.arange(len(x) + 1)
    cost = np.where(ends[None, :] > ends[:, None], cost, np.where(np.eye(len(ends)) > 0, 0, np.inf))
    best = cost[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + cost).min(0)
    return float(best[-1])


def test_by_hand():
    """Four centroids for five weights: 3 and 3.5 share one, three quarters of whose mean are 3's."""
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0, 3.5]])
    found = made(weight, "kmeans2-channel", torch.tensor([1.0, 1.0, 1.0, 3.0, 1.0]))
    assert found.codebook().tolist() == [[[0.0, 1.0, 2.0, 3.125]]]
    assert plain(weight, "kmeans2-channel").codebook().tolist() == [[[0.0, 1.0, 2.0, 3.25]]]


def test_what_counts_for_little_gives_up_its_centroid():
    """0 and 1 lie as far apart as the rest, and share a centroid once their inputs are small."""
    weight = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0]])
    found = made(weight, "kmeans2-channel", torch.tensor([0.01, 0.01, 1.0, 1.0, 1.0]))
    assert found.codebook().tolist() == [[[0.5, 2.0, 3.0, 4.0]]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "slack"), [(2, 1.05), (3, 1.1), (4, 1.12)])
def test_near_the_exact_optimum(kind, bits, slack):
    weight = torch.randn(40, 64, generator=torch.Generator().manual_seed(11))
    importance = importances(kind, 64)
    counted = importance.clamp(min=1e-6 * float(importance.mean()))
    best = sum(optimum(row, counted.double().numpy(), 2**bits) for row in weight.double().numpy())
    found = float(errors(made(weight, f"kmeans{bits}-channel", importance), weight, counted).sum())
    # Centroids are bfloat16, which one weight of a huge input feels.
    rounding = float((counted.double() * weight.double().square()).sum()) * 2.0**-17
    assert best * (1 - 1e-6) <= found <= best * slack + rounding


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", ["kmeans2-channel", "kmeans4-channel", "kmeans3-g32", "kmeans4-g64", "kmeans4-tensor"])
def test_never_worse_than_without_by_its_own_measure(kind, text):
    for seed in range(3):
        weight = torch.randn(24, 192, generator=torch.Generator().manual_seed(seed)).bfloat16() * 0.02
        importance = importances(kind, 192)
        counted = importance.clamp(min=1e-6 * float(importance.mean()))
        ours = errors(made(weight, text, importance), weight, counted)
        theirs = errors(plain(weight, text), weight, counted)
        if "tensor" in text:
            ours, theirs = ours.sum(), theirs.sum()
        assert (ours <= theirs * (1 + 1e-9)).all()
        assert ours.sum() < theirs.sum() or kind == "tiny"


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_never_worse_whatever_the_weights(data):
    number = st.one_of(st.integers(-4, 4).map(float), st.floats(-8, 8, width=32))
    weight = torch.tensor([data.draw(st.lists(number, min_size=12, max_size=12)) for _ in range(2)])
    importance = torch.tensor(data.draw(st.lists(st.floats(0, 100, width=32), min_size=12, max_size=12)))
    if importance.max() == 0:
        importance[0] = 1
    counted = importance.clamp(min=1e-6 * float(importance.mean()))
    ours = errors(made(weight, "kmeans2-channel", importance), weight, counted)
    theirs = errors(plain(weight, "kmeans2-channel"), weight, counted)
    scale = (counted.double() * weight.double().square()).sum(-1)
    assert (ours <= theirs + 1e-12 * scale).all()


@pytest.mark.parametrize("size", [1.0, 3.7, 1e-20, 1e20])
@pytest.mark.parametrize("text", ["kmeans4-channel", "kmeans3-g32", "kmeans4-tensor"])
def test_inputs_of_equal_size_change_nothing(text, size):
    weight = torch.randn(24, 192, generator=torch.Generator().manual_seed(1)).bfloat16()
    one, other = made(weight, text, torch.full((192,), size)), plain(weight, text)
    assert all(torch.equal(one.tensors[key], tensor) for key, tensor in other.tensors.items())


def test_only_ratios_count():
    weight, importance = torch.randn(8, 96, generator=torch.Generator().manual_seed(2)), importances("log-normal", 96)
    one, other = (made(weight, "kmeans4-channel", importance * factor) for factor in (1, 2.0**40))
    assert all(torch.equal(one.tensors[key], tensor) for key, tensor in other.tensors.items())


def test_the_order_of_rows_is_stable_with_signed_zeros_and_ties():
    rows = torch.tensor([[1.0, -0.0, -2.5, 0.0, 1.0, -1e-45, 3e38, -3e38]])
    assert _clusters._order(rows).tolist() == [[7, 2, 5, 1, 3, 0, 4, 6]]
    weight = torch.randn(5, 300, generator=torch.Generator().manual_seed(3))
    assert torch.equal(_clusters._order(weight), torch.sort(weight, stable=True).indices)


def test_inputs_must_have_been_seen():
    weight, scheme = torch.randn(4, 32), parse_scheme("wkmeans2-channel")
    for statistics in (None, {}, {"input_range": torch.zeros(2)}):
        with pytest.raises(SchemeRefused, match=r"wkmeans2-channel is made from statistics of the layer's inputs"):
            WEIGHTED.quantize(weight, scheme, statistics)
    with pytest.raises(SchemeRefused, match="all inputs of the layer were zero"):
        made(weight, "kmeans2-channel", torch.zeros(32))
    assert "embedding has no inputs" in WEIGHTED.refuses(Layer("e", "embedding", 100, 32, 2), scheme)
