"""Weight clustering: beside the exact optimum, which dynamic programming finds for small rows."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from autoq import plugins
from autoq.methods import Method, _codebook
from autoq.scheme import parse_scheme

KMEANS, RTN = (plugins.load("methods", name, Method) for name in ("kmeans", "rtn"))


def optimum(row: np.ndarray, clusters: int) -> float:
    """The least squared error of any clustering, O(k n²)."""
    x = np.sort(row)
    sums, squares = np.r_[0, x.cumsum()], np.r_[0, (x * x).cumsum()]
    ends = np.arange(len(x) + 1)
    size = ends[None, :] - ends[:, None]
    cost = (squares[None] - squares[:, None]) - (sums[None] - sums[:, None]) ** 2 / np.maximum(size, 1)
    cost = np.where(size > 0, cost, np.where(size == 0, 0, np.inf))
    best = cost[0]
    for _ in range(clusters - 1):
        best = (best[:, None] + cost).min(0)
    return float(best[-1])


def rows(kind: str) -> torch.Tensor:
    torch.manual_seed(11)
    return {
        "normal": lambda: torch.randn(40, 64),
        "heavy-tailed": lambda: torch.distributions.StudentT(3.0).sample((40, 64)),
        "uniform": lambda: torch.rand(40, 64),
        "one outlier": lambda: torch.cat([torch.randn(40, 63) * 0.01, torch.ones(40, 1)], 1),
        "long": lambda: torch.randn(10, 256),
    }[kind]()


def errors(method, weight, text) -> torch.Tensor:
    return (method.quantize(weight, parse_scheme(text)).dequantize() - weight).double().square().sum(-1)


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "uniform", "one outlier", "long"])
@pytest.mark.parametrize(("bits", "slack"), [(2, 1.03), (3, 1.06), (4, 1.08)])
def test_near_the_exact_optimum(kind, bits, slack):
    weight = rows(kind)
    best = sum(optimum(row, 2**bits) for row in weight.double().numpy())
    assert best <= float(errors(KMEANS, weight, f"kmeans{bits}-channel").sum()) <= best * slack


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed", "uniform", "one outlier", "long"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6])
def test_no_row_is_worse_than_rtn(kind, bits):
    weight = rows(kind)
    assert (
        errors(KMEANS, weight, f"kmeans{bits}-channel") <= errors(RTN, weight, f"rtn-int{bits}-channel") + 1e-12
    ).all()


def test_eight_bits_are_not_worse_than_rtn():
    """Centroids have bfloat16's precision, steps of rtn are exact multiples: the hardest case for a codebook."""
    weight = torch.randn(8, 1024, generator=torch.Generator().manual_seed(0))
    assert (errors(KMEANS, weight, "kmeans8-channel") < errors(RTN, weight, "rtn-int8-channel")).all()


@pytest.mark.parametrize("distinct", [1, 2, 3, 7, 15, 16])
def test_as_many_values_as_centroids_come_back_exactly(distinct):
    torch.manual_seed(distinct)
    values = torch.randn(distinct).bfloat16().float() * torch.logspace(-3, 3, distinct).bfloat16().float()
    values = values.bfloat16().float()
    weight = values[torch.randint(0, distinct, (6, 80))]
    for text in ("kmeans4-channel", "kmeans4-g40", "kmeans4-tensor"):
        assert torch.equal(KMEANS.quantize(weight, parse_scheme(text)).dequantize(), weight), text


def test_more_centroids_than_weights_are_refused():
    weight = torch.randn(4, 8)
    with pytest.raises(Exception, match="16 centroids for 8 weights of shape"):
        KMEANS.quantize(weight, parse_scheme("kmeans4-channel"))


def test_a_sample_of_a_large_tensor_is_enough(monkeypatch):
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    weight[5, 5] = 30.0
    whole = errors(KMEANS, weight, "kmeans4-tensor").sum()
    monkeypatch.setattr(_codebook, "SAMPLE", 4096)
    part = errors(KMEANS, weight, "kmeans4-tensor").sum()
    assert part < whole * 1.05
    assert abs(KMEANS.quantize(weight, parse_scheme("kmeans4-tensor")).dequantize()[5, 5] - 30.0) < 0.2
