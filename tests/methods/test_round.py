"""Learned rounding against all roundings that there are, against AdaRound's own relaxation, and against gptq."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.errors import SchemeRefused
from autoq.layer import MOST_HESSIAN_INPUTS, Layer
from autoq.methods.gptq import Gptq
from autoq.methods.round import SHRINKAGE, Round
from autoq.scheme import Integer, PerChannel, PerGroup, PerTensor, parse_scheme

SCHEMES = ["int4-g16", "int3-g32-sym", "int2-g16", "int3-channel-sym", "int4-g16-rz", "int3-tensor", "int2-g8"]


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


def statistics(hessian):
    return {"hessian": hessian, "input_mean_square": hessian.diagonal()}


def shrunk(hessian):
    """What is made small, in float64: H + λ diag(H), H's diagonal of mean 1, and 1 where no input ever was."""
    scaled = hessian.double() / hessian.double().diagonal().mean()
    diagonal = scaled.diagonal()
    return scaled + torch.where(diagonal == 0, 1.0, SHRINKAGE * diagonal).diag()


def row_errors(weight, dequantized, hessian):
    """(ΔW H ΔWᵀ)_ii in float64."""
    delta = dequantized.double() - weight.double()
    return ((delta @ hessian.double()) * delta).sum(1)


def of_gptq(weight, scheme, hessian):
    return Gptq().quantize(weight, parse_scheme(str(scheme).replace("round", "gptq")), statistics(hessian))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    text=st.sampled_from(SCHEMES),
    rank=st.sampled_from([1, 3, 64]),
    dead=st.sampled_from([0, 5, 64]),
    power=st.sampled_from([-30, 0, 30]),
)
def test_no_row_is_worse_than_gptq(seed, text, rank, dead, power):
    """By the error that gptq makes small, whatever the rank and the unit; where rows share a grid, in sum."""
    scheme, weight = parse_scheme(f"round-{text}"), normal(8, 64, seed)
    x = inputs(40, 64, seed, rank) * 2.0 ** (power / 2)
    x[:, torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:dead]] = 0
    weight[seed % 8] *= 2.0 ** (power // 2)
    hessian = moments(x)
    found = row_errors(weight, Round().quantize(weight, scheme, statistics(hessian)).dequantize(), hessian)
    other = row_errors(weight, of_gptq(weight, scheme, hessian).dequantize(), hessian)
    if text == "int3-tensor":
        found, other = found.sum(), other.sum()
    # Errors are those of float32: rows that are nearly exact are so to what their weights' part of it leaves.
    slack = 1e-5 * row_errors(weight, torch.zeros_like(weight), hessian).sum()
    assert (found <= other * (1 + 1e-3) + slack * 1e-3).all()


@pytest.mark.parametrize(("bits", "share"), [(2, 0.85), (3, 0.92), (4, 0.95)])
def test_error_is_below_that_of_gptq_on_inputs_that_neither_saw(bits, share):
    weight, seen, unseen = normal(48, 128), moments(inputs(500, 128)[:250]), moments(inputs(500, 128)[250:])
    scheme = Integer("round", bits, PerGroup(32))
    found = Round().quantize(weight, scheme, statistics(seen)).dequantize()
    other = of_gptq(weight, scheme, seen).dequantize()
    for hessian in (seen, unseen):
        assert row_errors(weight, found, hessian).sum() < share * row_errors(weight, other, hessian).sum()


@pytest.mark.parametrize("bits", [2, 3])
def test_few_roundings_of_all_that_there_are_are_better(bits):
    """Every one of the 4^6 or 8^6 rows of codes on the scales found: ours is among the best, mostly the best."""
    every = torch.tensor(list(itertools.product(range(2**bits), repeat=6)), dtype=torch.float64)
    best, worse = 0, []
    for seed in range(12):
        weight, hessian = normal(1, 6, seed), moments(inputs(30, 6, seed))
        found = Round().quantize(weight, Integer("round", bits, PerGroup(3)), statistics(hessian))
        scale, zero = (each.double().repeat_interleave(3, 1) for each in (found.scales(), found.zeros()))
        delta = (every - zero) * scale - weight.double()
        errors = ((delta @ shrunk(hessian)) * delta).sum(1)
        own = row_errors(weight, found.dequantize(), shrunk(hessian)).item()
        best += own <= errors.min() * (1 + 1e-4)
        worse.append(float((errors < own * (1 - 1e-4)).double().mean()))
    assert best >= 6
    assert max(worse) < 0.005


def adaround(weight, scale, zero, hessian, bits, steps=400):
    """AdaRound: floor(w/s) + h(V), h the rectified sigmoid, and its regularizer, by Adam; (values, error by row)."""
    gamma, zeta = -0.1, 1.1
    base = (weight / scale).floor()
    rest = weight / scale - base
    v = -torch.log((zeta - gamma) / (rest - gamma) - 1)
    v.requires_grad_()
    adam = torch.optim.Adam([v], lr=0.01)
    unit = float(row_errors(weight, torch.zeros_like(weight), hessian).sum())
    for step in range(steps):
        h = (torch.sigmoid(v) * (zeta - gamma) + gamma).clamp(0, 1)
        off = ((base + h + zero).clamp(0, 2**bits - 1) - zero) * scale - weight
        beta = 20 + (2 - 20) * step / steps
        loss = ((off @ hessian.float()) * off).sum() / unit * 1e4
        if step > steps // 5:
            loss = loss + 0.01 * (1 - (2 * h - 1).abs().pow(beta)).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    up = (v.detach() >= 0).float()
    return ((base + up + zero).clamp(0, 2**bits - 1) - zero) * scale


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_error_is_at_most_that_of_adarounds_relaxation(bits):
    """On the very scales that were found, so that rounding alone is compared; both far below the nearest."""
    weight, hessian = normal(16, 48), moments(inputs(200, 48))
    found = Round().quantize(weight, Integer("round", bits, PerGroup(16)), statistics(hessian))
    scale, zero = (each.repeat_interleave(16, 1) for each in (found.scales(), found.zeros()))
    learned = row_errors(weight, adaround(weight, scale, zero, shrunk(hessian), bits), shrunk(hessian)).sum()
    nearest = ((weight / scale + zero).round().clamp(0, 2**bits - 1) - zero) * scale
    own = row_errors(weight, found.dequantize(), shrunk(hessian)).sum()
    assert learned < 0.97 * row_errors(weight, nearest, shrunk(hessian)).sum()
    assert own <= learned


def test_a_scale_is_the_best_for_its_codes_to_what_bfloat16_holds():
    """Least squares per group, all other groups held: no bfloat16 number beside the scale is better."""
    weight, hessian = normal(8, 48), moments(inputs(200, 48))
    found = Round().quantize(weight, Integer("round", 3, PerChannel()), statistics(hessian))
    a = found.codes().double() - found.zeros().double()
    h = shrunk(hessian)
    wanted = ((weight.double() @ h) * a).sum(1) / ((a @ h) * a).sum(1)
    assert torch.allclose(found.scales()[:, 0].double(), wanted, rtol=0.02)
    gained = row_errors(weight, a * wanted[:, None], h) / row_errors(weight, found.dequantize(), h)
    assert gained.min() > 0.9


def test_two_codes_that_make_up_for_each_other_by_hand():
    """Two inputs that are always equal, so that what counts is the sum of both weights: 1.8 for 1.4 and 0.4.

    The third column, unrelated to both, makes the range 0 … 3 on which s = 1 and z = 0. Codes 1 and 1, or 2 and 0,
    have a sum of 2; the nearest, 1 and 0, a sum of 1. The scale then follows: 1.8 for a sum of 2 asks for s = 0.9, the
    3 for 1.
    """
    weight = torch.tensor([[1.4, 0.4, 3.0, 0.0]])
    hessian = torch.zeros(4, 4)
    hessian[:2, :2] = hessian[2, 2] = 1
    found = Round().quantize(weight, Integer("round", 2, PerChannel(), "integer"), statistics(hessian))
    codes, scale = found.codes().tolist()[0], found.scales().item()
    assert sum(codes[:2]) == 2
    a = torch.tensor(codes).double()
    h = shrunk(hessian)
    assert scale == pytest.approx(float((weight.double() @ h @ a) / (a @ h @ a)), rel=0.01)


@pytest.mark.parametrize("text", ["int3-g16", "int3-g128", "int3-g8-sym"])
def test_more_rows_than_are_done_at_once_and_blocks_of_any_width_say_the_same(monkeypatch, text):
    weight, hessian = normal(37, 256), moments(inputs(300, 256))
    scheme = parse_scheme(f"round-{text}")
    whole = Round().quantize(weight, scheme, statistics(hessian)).dequantize()
    for name, value in (("_ROWS", 8), ("_BLOCK", 32)):
        monkeypatch.setattr(f"autoq.methods.round.{name}", value)
        other = Round().quantize(weight, scheme, statistics(hessian)).dequantize()
        monkeypatch.undo()
        found = [float(row_errors(weight, each, hessian).sum()) for each in (whole, other)]
        assert math.isclose(*found, rel_tol=0.03)


def test_a_hessian_that_is_none_still_ends():
    """Not positive semi-definite, as damaged statistics may be."""
    hessian = torch.full((32, 32), -3.0).fill_diagonal_(1.0)
    found = Round().quantize(normal(4, 32), Integer("round", 4, PerGroup(16)), statistics(hessian))
    assert found.dequantize().isfinite().all()


def test_what_it_refuses():
    wide = Layer("x", "linear", 2, 2 * MOST_HESSIAN_INPUTS, dtype_bytes=2)
    assert "16384" in Round().refuses(wide, Integer("round", 4, PerGroup(64)))
    table = Layer("x", "embedding", 64, 64, dtype_bytes=2)
    assert "looked up" in Round().refuses(table, Integer("round", 4, PerGroup(64)))
    with pytest.raises(SchemeRefused, match="statistics of the layer's inputs"):
        Round().quantize(normal(4, 32), Integer("round", 4, PerTensor()))
