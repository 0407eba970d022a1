"""GPTQ against the paper's algorithm, column by column in float64 on the same grid, and against rtn and clip."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.errors import SchemeRefused
from autoq.layer import MOST_HESSIAN_INPUTS, Layer
from autoq.methods.clip import Clip
from autoq.methods.gptq import DAMPING, Gptq
from autoq.methods.rtn import RoundToNearest
from autoq.scheme import Integer, PerChannel, PerGroup, PerTensor, parse_scheme

SCHEMES = ["int4-g16", "int3-g32-sym", "int2-g16", "int4-channel", "int3-channel-sym", "int4-tensor", "int8-g16"]


def inputs(count, columns, seed=0, rank=None):
    """Inputs as a transformer's layers have them: related, of very different sizes, not around zero."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(count, rank or columns, generator=generator) @ torch.randn(
        rank or columns, columns, generator=generator
    )
    shared = torch.randn(count, 4, generator=generator) @ torch.randn(4, columns, generator=generator)
    size = torch.randn(columns, generator=generator).exp()
    return (mixed / columns**0.5 + 2 * shared + torch.randn(columns, generator=generator)) * size


def normal(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03


def moments(x):
    return x.t() @ x / len(x)


def error(weight, quantized, hessian):
    """tr(ΔW H ΔWᵀ) in float64."""
    delta = quantized.dequantize().double() - weight.double()
    return float(((delta @ hessian.double()) * delta).sum())


def rounded(weight, scheme):
    return RoundToNearest().quantize(weight, parse_scheme(str(scheme).replace("gptq", "rtn")))


def clipped(weight, scheme, importance):
    scheme = parse_scheme(str(scheme).replace("gptq", "clip"))
    return Clip().quantize(weight, scheme, {"input_mean_square": importance})


def eliminated(hessian):
    """Each column in turn, greatest input first, with the row of the inverse Hessian that is left of it, float64.

    As equation 3 says: after each column the inverse loses that column's row and column by one step of Gaussian
    elimination.
    """
    hessian = hessian.double()
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=torch.float64)
    inverse = torch.linalg.inv(damped)
    for j in hessian.diagonal().argsort(descending=True, stable=True).tolist():
        yield j, inverse[j]
        inverse = inverse - torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]


def solved_on(grid, weight, scheme, hessian):
    """The error of algorithm 1 without blocks on a grid, or of rtn where that is less; the inverse Hessian itself."""
    scales, zeros = grid.scales().double(), grid.zeros().double()
    size = weight.shape[1] // scales.shape[1]
    work, found = weight.double().clone(), torch.empty_like(weight, dtype=torch.float64)
    for j, row in eliminated(hessian):
        s, z = scales[:, j // size], zeros[:, j // size]
        found[:, j] = ((work[:, j] / s + z).round().clamp(0, 2**scheme.bits - 1) - z) * s
        work -= torch.outer((work[:, j] - found[:, j]) / row[j], row)
    delta, plain = (each.double() - weight.double() for each in (found, rounded(weight, scheme).dequantize()))
    errors = [((each @ hessian.double()) * each).sum(1) for each in (delta, plain)]
    if isinstance(scheme.granularity, PerTensor):  # which all rows choose together
        errors = [each.sum() for each in errors]
    return float(torch.minimum(*errors).sum())


def by_the_paper(weight, scheme, hessian):
    """Its error on clip's grid, errors of each column counted as it does: by one over what is left of the inverse."""
    importance = torch.empty(len(hessian))
    for j, row in eliminated(hessian):
        importance[j] = 1 / row[j]
    return solved_on(clipped(weight, scheme, importance), weight, scheme, hessian)


@pytest.mark.parametrize("text", SCHEMES)
@pytest.mark.parametrize("columns", [96, 224])  # blocks and a part of one
def test_error_is_that_of_the_papers_algorithm(text, columns):
    scheme, weight, hessian = parse_scheme(f"gptq-{text}"), normal(48, columns), moments(inputs(600, columns))
    ours = error(weight, Gptq().quantize(weight, scheme, {"hessian": hessian}), hessian)
    assert ours == pytest.approx(by_the_paper(weight, scheme, hessian), rel=0.01)
    if scheme.bits < 8 and text != "int4-tensor":
        assert ours < 0.8 * error(weight, clipped(weight, scheme, hessian.diagonal()), hessian)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    text=st.sampled_from(SCHEMES),
    rank=st.sampled_from([1, 3, 96]),
    dead=st.sampled_from([0, 5, 96]),
    power=st.sampled_from([-30, 0, 30]),
)
def test_no_row_is_worse_than_rtn(seed, text, rank, dead, power):
    """Whatever the rank, with inputs that were always zero, in any unit; where rows share a grid, in sum."""
    scheme, weight = parse_scheme(f"gptq-{text}"), normal(8, 96, seed)
    x = inputs(40, 96, seed, rank) * 2.0 ** (power / 2)
    x[:, torch.randperm(96, generator=torch.Generator().manual_seed(seed))[:dead]] = 0
    weight[seed % 8] *= 2.0**power
    quantized, plain = Gptq().quantize(weight, scheme, {"hessian": moments(x)}), rounded(weight, scheme)
    deltas = [(each.dequantize() - weight).double() for each in (quantized, plain)]
    own, others = ((x.double() @ delta.t()).square().sum(0) for delta in deltas)
    if text == "int4-tensor":  # all rows have one grid and choose it together
        own, others = own.sum(), others.sum()
    assert (own <= others * (1 + 1e-3)).all()
    if dead == 96:
        assert torch.equal(quantized.codes(), plain.codes())


def test_the_second_column_makes_up_for_the_first_by_hand():
    """Two inputs that are always equal: what counts is the sum of both weights.

    Levels 0, 1, 2, 3 (2 bits, s = 1, z = 0). 1.4 and 0.4 round to 1 and 0, a sum of 1 for 1.8. H is [[1, 1], [1, 1]],
    so 0.4 of error in the first makes the second 0.4 + 0.4/1.075, which rounds to 1: a sum of 2. The third
    column, unrelated to both, makes the range 0 … 3, of which giving up some would not pay.
    """
    weight = torch.tensor([[1.4, 0.4, 3.0, 0.0]])
    hessian = torch.zeros(4, 4)
    hessian[:2, :2] = hessian[2, 2] = 1
    found = Gptq().quantize(weight, Integer("gptq", 2, PerChannel()), {"hessian": hessian})
    assert found.codes().tolist() == [[1, 1, 3, 0]]
    assert rounded(weight, "gptq-int2-channel").codes().tolist() == [[1, 0, 3, 0]]


def test_columns_go_by_the_size_of_their_inputs():
    """The greater input is rounded first, wherever it stands: the smaller one makes up for it.

    With x₂ = 2 x₁ the error in 0.4 · 2 is made up by w₁, in steps of half the size: 1.4 + 0.8/1.225 → 2.
    """
    weight = torch.tensor([[1.4, 0.4, 3.0, 0.0]])
    hessian = torch.zeros(4, 4)
    hessian[:2, :2] = torch.tensor([[1.0, 2.0], [2.0, 4.0]])
    hessian[2, 2] = 4
    found = Gptq().quantize(weight, Integer("gptq", 2, PerChannel()), {"hessian": hessian})
    assert found.codes().tolist() == [[2, 0, 3, 0]]


def test_related_inputs_help_and_others_change_nothing():
    weight, scheme = normal(16, 64), Integer("gptq", 3, PerGroup(16))
    alone = torch.rand(64, generator=torch.Generator().manual_seed(2)).diag()
    damped = alone.diagonal() + DAMPING * alone.diagonal().mean()
    assert torch.equal(
        Gptq().quantize(weight, scheme, {"hessian": alone}).codes(), clipped(weight, scheme, damped).codes()
    )


def test_grids_count_what_others_cannot_make_up_for():
    """The greatest of inputs that come and go together does not decide the grid of its group: others make up for it."""
    generator = torch.Generator().manual_seed(3)
    share = torch.full((64,), 0.5)
    share[[1, 40]] = 20.0
    x = torch.randn(400, 64, generator=generator) + (5 + torch.randn(400, 1, generator=generator)) * share
    weight, hessian, scheme = normal(32, 64), moments(x), parse_scheme("gptq-int3-g32")
    own = error(weight, Gptq().quantize(weight, scheme, {"hessian": hessian}), hessian)
    assert own < 0.9 * solved_on(clipped(weight, scheme, hessian.diagonal()), weight, scheme, hessian)


def test_inputs_as_they_were_say_the_same_as_their_second_moments():
    weight, scheme, x = normal(16, 96), Integer("gptq", 3, PerGroup(32)), inputs(40, 96).bfloat16()
    hessian = moments(x.double()).float()
    rows = Gptq().quantize(weight, scheme, {"input_rows": x})
    matrix = Gptq().quantize(weight, scheme, {"hessian": hessian})
    assert error(weight, rows, hessian) == pytest.approx(error(weight, matrix, hessian), rel=1e-3)


def test_more_rows_than_are_done_at_once(monkeypatch):
    weight, statistics = normal(37, 64), {"hessian": moments(inputs(100, 64))}
    for scheme in (Integer("gptq", 3, PerGroup(16)), Integer("gptq", 3, PerTensor(), "none")):
        whole = Gptq().quantize(weight, scheme, statistics)
        monkeypatch.setattr("autoq.methods.gptq._ROWS", 8)
        parts = Gptq().quantize(weight, scheme, statistics)
        monkeypatch.undo()
        assert error(weight, parts, statistics["hessian"]) == pytest.approx(
            error(weight, whole, statistics["hessian"]), rel=1e-3
        )


def test_a_hessian_that_is_none_still_ends():
    """Not positive semi-definite, as damaged statistics may be: damping grows until it can be used."""
    hessian = torch.full((32, 32), -3.0).fill_diagonal_(1.0)
    weight = normal(4, 32)
    found = Gptq().quantize(weight, Integer("gptq", 4, PerGroup(16)), {"hessian": hessian})
    assert found.dequantize().isfinite().all()


def test_what_it_refuses():
    wide = Layer("x", "linear", 2, 2 * MOST_HESSIAN_INPUTS, dtype_bytes=2)
    assert "16384" in Gptq().refuses(wide, Integer("gptq", 4, PerGroup(64)))
    table = Layer("x", "embedding", 64, 64, dtype_bytes=2)
    assert "looked up" in Gptq().refuses(table, Integer("gptq", 4, PerGroup(64)))
    with pytest.raises(SchemeRefused, match="statistics of the layer's inputs"):
        Gptq().quantize(normal(4, 32), Integer("gptq", 4, PerGroup(16)))
