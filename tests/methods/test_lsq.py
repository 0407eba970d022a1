"""Learned step sizes against brute force over scales, and never worse than clip."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.errors import SchemeRefused
from autoq.layer import MOST_HESSIAN_INPUTS, Layer
from autoq.methods._uniform import encode, stored
from autoq.methods.clip import Clip
from autoq.methods.lsq import LearnedStepSize
from autoq.scheme import Integer, PerChannel, PerGroup, parse_scheme

SCHEMES = ["int4-g16", "int3-g32-sym", "int2-g16", "int3-channel", "int3-tensor", "int2-tensor-sym"]


def inputs(count, columns, seed=0, rank=None):
    """Related inputs of very different sizes, not around zero."""
    generator = torch.Generator().manual_seed(seed)
    rank = rank or columns
    mixed = torch.randn(count, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
    size = torch.randn(columns, generator=generator).exp()
    return (mixed / rank**0.5 + torch.randn(columns, generator=generator)) * size


def normal(rows, columns, seed=1):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.03


def statistics(x):
    hessian = x.t() @ x / len(x)
    return {"hessian": hessian, "input_mean_square": hessian.diagonal()}


def row_errors(weight, dequantized, hessian):
    """(ΔW H ΔWᵀ)_ii in float64."""
    delta = dequantized.double() - weight.double()
    return ((delta @ hessian.double()) * delta).sum(1)


def of_clip(weight, scheme, told):
    return Clip().quantize(weight, parse_scheme(str(scheme).replace("lsq", "clip")), told)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    text=st.sampled_from(SCHEMES),
    rank=st.sampled_from([1, 3, 64]),
    dead=st.sampled_from([0, 5, 64]),
    power=st.sampled_from([-30, 0, 30]),
)
def test_no_row_is_worse_than_clip_and_every_code_is_the_nearest(seed, text, rank, dead, power):
    scheme, weight = parse_scheme(f"lsq-{text}"), normal(8, 64, seed)
    x = inputs(40, 64, seed, rank) * 2.0 ** (power / 2)
    x[:, torch.randperm(64, generator=torch.Generator().manual_seed(seed))[:dead]] = 0
    weight[seed % 8] *= 2.0 ** (power // 2)
    told = statistics(x)
    quantized, plain = LearnedStepSize().quantize(weight, scheme, told), of_clip(weight, scheme, told)
    found, other = (row_errors(weight, each.dequantize(), told["hessian"]) for each in (quantized, plain))
    if "tensor" in text:
        found, other = found.sum(), other.sum()
    assert (found <= other * (1 + 1e-4)).all()
    size = 64 // quantized.scales().shape[1]
    scale, zero = (each.repeat_interleave(size, 1) for each in (quantized.scales(), quantized.zeros()))
    assert torch.equal(quantized.codes().float(), encode(weight, scale, zero, scheme.bits))
    assert torch.equal(quantized.zeros(), plain.zeros())


def test_one_scale_is_as_good_as_the_best_of_all():
    """A scale per row, and every bfloat16 scale from a quarter of clip's to twice it tried."""
    weight, told = normal(12, 24), statistics(inputs(200, 24))
    scheme = Integer("lsq", 3, PerChannel())
    found = row_errors(weight, LearnedStepSize().quantize(weight, scheme, told).dequantize(), told["hessian"])
    plain = of_clip(weight, scheme, told)
    least = torch.full((12,), torch.inf, dtype=torch.float64)
    for ratio in torch.linspace(0.25, 2, 3000):
        scale = stored(plain.scales() * ratio)
        values = (encode(weight, scale, plain.zeros(), 3) - plain.zeros()) * scale
        least = torch.minimum(least, row_errors(weight, values, told["hessian"]))
    start = row_errors(weight, plain.dequantize(), told["hessian"])
    # What a path downhill can find of it: most of what there is to gain over clip.
    assert (least <= found * (1 + 1e-9)).all()
    assert (start - found).sum() > 0.5 * (start - least).sum() > 0


@pytest.mark.parametrize(("bits", "share"), [(2, 0.9), (3, 0.9)])
def test_scales_that_heed_how_inputs_go_together_are_better_on_inputs_that_were_not_seen(bits, share):
    weight, x = normal(48, 128), inputs(1000, 128)
    scheme = Integer("lsq", bits, PerGroup(32))
    told, unseen = statistics(x[:500]), statistics(x[500:])["hessian"]
    found = LearnedStepSize().quantize(weight, scheme, told).dequantize()
    assert (
        row_errors(weight, found, unseen).sum()
        < share * row_errors(weight, of_clip(weight, scheme, told).dequantize(), unseen).sum()
    )


def test_more_rows_than_are_done_at_once(monkeypatch):
    weight, told = normal(37, 64), statistics(inputs(100, 64))
    for text in ("lsq-int3-g16", "lsq-int3-tensor-sym"):
        whole = LearnedStepSize().quantize(weight, parse_scheme(text), told).dequantize()
        monkeypatch.setattr("autoq.methods.lsq._ROWS", 8)
        parts = LearnedStepSize().quantize(weight, parse_scheme(text), told).dequantize()
        monkeypatch.undo()
        errors = [float(row_errors(weight, each, told["hessian"]).sum()) for each in (whole, parts)]
        assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_what_it_refuses():
    wide = Layer("x", "linear", 2, 2 * MOST_HESSIAN_INPUTS, dtype_bytes=2)
    assert "16384" in LearnedStepSize().refuses(wide, Integer("lsq", 4, PerGroup(64)))
    table = Layer("x", "embedding", 64, 64, dtype_bytes=2)
    assert "looked up" in LearnedStepSize().refuses(table, Integer("lsq", 4, PerGroup(64)))
    with pytest.raises(SchemeRefused, match="zero points of clip"):
        LearnedStepSize().quantize(normal(4, 32), Integer("lsq", 4, PerGroup(16), "real"), statistics(inputs(9, 32)))
