"""Half-quadratic quantization: beside the authors' own package, and below rtn in the norm it minimizes."""

from __future__ import annotations

import contextlib
import functools
import io
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from autoq import plugins
from autoq.layer import Layer
from autoq.methods import Method
from autoq.methods.hqq import NORM
from autoq.scheme import parse_scheme

RTN, HQQ = (plugins.load("methods", name, Method) for name in ("rtn", "hqq"))


def weights(kind: str) -> torch.Tensor:
    torch.manual_seed(5)
    shape = (96, 192)
    if kind == "normal":
        return torch.randn(shape) * 0.03
    return torch.distributions.StudentT(4.0).sample(shape) * 0.02 * (0.2 + torch.rand(shape[0], 1))


@functools.cache
def quantizer() -> Any:
    """That of the package `hqq`, which stands aside so that transformers does not import it (see the Makefile)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(sys.prefix) / "reference")
        from hqq.core.quantize import Quantizer
    return Quantizer


def reference(weight: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """What the package `hqq` makes of it, in float32."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        codes, meta = quantizer().quantize(
            weight, nbits=bits, group_size=group, axis=1, device="cpu", bitpack=False, optimize=True
        )
        meta["compute_dtype"] = torch.float32
        return quantizer().dequantize(codes, meta)


def norm(error: torch.Tensor, power: float = NORM) -> float:
    return error.abs().pow(power).mean().item()


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed"])
@pytest.mark.parametrize("bits", [4, 3, 2])
def test_not_worse_than_the_reference(kind, bits):
    """Its scales and zero points have 32 bits, ours 16; its solver stops at plain averaging."""
    weight = weights(kind)
    ours = HQQ.quantize(weight, parse_scheme(f"hqq-int{bits}-g64-rz")).dequantize() - weight
    theirs = reference(weight, bits, 64) - weight
    assert norm(ours) <= norm(theirs) * 1.01
    assert norm(ours, 1.0) <= norm(theirs, 1.0) * 1.01


@pytest.mark.parametrize("kind", ["normal", "heavy-tailed"])
@pytest.mark.parametrize("bits", [4, 3, 2])
@pytest.mark.parametrize("zero", ["-rz", ""])
def test_below_rtn_in_the_norm_it_minimizes(kind, bits, zero):
    weight = weights(kind)
    base = RTN.quantize(weight, parse_scheme(f"rtn-int{bits}-g64")).dequantize() - weight
    ours = HQQ.quantize(weight, parse_scheme(f"hqq-int{bits}-g64{zero}")).dequantize() - weight
    assert norm(ours) < norm(base) * 0.99
    assert norm(ours, 1.0) < norm(base, 1.0) * 0.99


@pytest.mark.parametrize("bits", range(2, 9))
def test_no_group_is_worse_than_where_it_started(bits):
    weight = weights("heavy-tailed")
    base, ours = (
        (method.quantize(weight, parse_scheme(f"{name}-int{bits}-g64")).dequantize() - weight).view(-1, 64)
        for name, method in (("rtn", RTN), ("hqq", HQQ))
    )
    assert (ours.abs().mean(-1) <= base.abs().mean(-1) * (1 + 1e-5)).all()


def test_the_result_scales_with_the_weight():
    """Powers of two change no rounding, and errors are measured in steps: no constant has a unit."""
    weight = weights("normal")
    scheme = parse_scheme("hqq-int3-g64-rz")
    one, large = HQQ.quantize(weight, scheme).dequantize(), HQQ.quantize(weight * 1024, scheme).dequantize()
    assert torch.equal(one * 1024, large)


def test_symmetric_and_whole_tensors_are_refused():
    layer = Layer("x", "linear", 96, 192, dtype_bytes=2)
    assert "symmetric has none" in HQQ.refuses(layer, parse_scheme("hqq-int4-g64-sym"))
    assert "not per tensor" in HQQ.refuses(layer, parse_scheme("hqq-int4-tensor-rz"))
