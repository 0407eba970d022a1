"""What every method promises, over every scheme that it makes. A new method file is enrolled by itself."""

from __future__ import annotations

import collections
import dataclasses
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq import plugins
from autoq.bank import Bank
from autoq.errors import NotFinite, SchemeRefused
from autoq.layer import Layer
from autoq.methods import Grid, Method
from autoq.methods._float_weight import DTYPES, magnitudes
from autoq.methods._weights import restore
from autoq.scheme import (
    FLOAT_FORMATS,
    Float,
    Gguf,
    Integer,
    Keep,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    Sparse,
    parse_scheme,
)
from autoq.sparsity import TwoOfFour, Unstructured

GRID = Grid(
    methods=plugins.names("methods"),
    bits=(2, 3, 4, 5, 6, 7, 8),
    granularities=(PerTensor(), PerChannel(), PerGroup(3), PerGroup(6), PerGroup(12), PerGroup(16), PerGroup(32)),
    zero_points=("none", "integer", "real"),
    activations=(None, "a8dyn"),
    formats=tuple(FLOAT_FORMATS),
    blocks=(PerBlock(2, 8), PerBlock(128, 128)),
    sparsity=(TwoOfFour(), Unstructured(50)),
)
SMALL = ((5, 12), (1, 36), (7, 1), (3, 7))
SHAPES = (*SMALL, (6, 96), (3, 256), (40, 300))


@functools.cache
def method(name: str) -> Method:
    return plugins.load("methods", name, Method)


def layer(shape) -> Layer:
    return Layer("x", "linear", *shape, dtype_bytes=2)


def weight(shape, seed: int = 0) -> torch.Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 0.03).to(torch.bfloat16)


@functools.cache
def schemes(name: str):
    """The schemes of a method within the grid; only GGUF types are as wide as 16 bits."""
    grid = dataclasses.replace(GRID, bits=(*GRID.bits, 16)) if name == "gguf" else GRID
    return tuple(method(name).schemes(name, grid))


@functools.cache
def made(name: str, shape):
    """The schemes of a method within the grid that it makes for `shape`."""
    return tuple(scheme for scheme in schemes(name) if method(name).refuses(layer(shape), scheme) is None)


@functools.cache
def some(name: str, shape):
    """Of these, for what a whole grid would take minutes: fewer widths, and inputs in 8 bits beside one of them."""
    integers = (3, 8) if shape == SHAPES[-1] else (2, 3, 4, 8)

    def wanted(scheme) -> bool:
        inner = getattr(scheme, "inner", None) or scheme
        if not isinstance(inner, Integer):
            return True
        return inner.bits in integers and (inner.activation is None or inner.bits == integers[-1])

    return tuple(scheme for scheme in made(name, shape) if wanted(scheme))


def each(name: str, shape):
    """The whole grid on small weights, some of it on larger ones."""
    return made(name, shape) if shape in SMALL else some(name, shape)


def statistics(name: str, scheme, columns: int, kind: str = "related"):
    """How to get calibration statistics of a layer with so many inputs, where the scheme is made from them.

    Inputs that are `unrelated` have nothing to do with each other; those that are `alike` are of one size besides.
    """
    if not method(name).uses_statistics(scheme):
        return None
    inputs = torch.randn(64, columns, generator=torch.Generator().manual_seed(7))
    if kind == "alike":
        inputs = inputs.sign()
    squares = inputs.square().mean(0)
    hessian = inputs.t() @ inputs / 64 if kind == "related" else squares.diag()
    return lambda: {
        "input_mean_square": squares,
        "hessian": hessian,
        "input_peak": inputs.abs().amax(0),
        "input_range": torch.stack(torch.aminmax(inputs)),
    }


def quantize(name: str, w: torch.Tensor, scheme, kind: str = "related"):
    given = statistics(name, scheme, w.shape[-1], kind)
    return method(name).quantize(w, scheme, given() if given else None)


@functools.cache
def ready(name: str, shape, scheme):
    """The weight of a shape under a scheme, made once for all tests that only read it."""
    return quantize(name, weight(shape), scheme)


def float_levels(scheme: Float) -> torch.Tensor:
    """The numbers of the format's codes, ascending."""
    if scheme.form.element in DTYPES:
        every = torch.arange(256).to(torch.uint8).view(DTYPES[scheme.form.element]).float()
        return every[every.isfinite()].sort().values
    positive = magnitudes(scheme.form.element)
    return torch.cat([-positive.flip(0), positive])


CASES = [(name, shape) for name in plugins.names("methods") for shape in SHAPES]


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_schemes_are_its_own_and_canonical(name):
    own = schemes(name)
    assert own
    assert len(set(own)) == len(own)
    for scheme in own:
        assert scheme.method == name
        assert parse_scheme(str(scheme)) == scheme
    assert made(name, (40, 300))


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_a_weight_is_the_same_whatever_its_inputs_are_rounded_to(name):
    plain = {str(scheme): scheme for scheme in made(name, (5, 12))}
    for text, scheme in plain.items():
        bare = plain.get(text.removesuffix("-a8dyn"))
        if bare not in (None, scheme):
            one, other = ready(name, (5, 12), scheme), ready(name, (5, 12), bare)
            assert all(torch.equal(tensor, other.tensors[key]) for key, tensor in one.tensors.items()), scheme


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_what_ships_is_exactly_what_the_scheme_says(name, shape):
    for scheme in each(name, shape):
        quantized = ready(name, shape, scheme)
        assert quantized.scheme == scheme
        assert quantized.shape == shape
        assert quantized.nbytes == scheme.nbytes(*shape, dtype_bytes=2), scheme
        assert all(tensor.is_contiguous() for tensor in quantized.tensors.values())


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_numbers_come_back_finite_rounded_once_and_the_same_each_time(name, shape):
    for scheme in each(name, shape):
        one, two = ready(name, shape, scheme), quantize(name, weight(shape), scheme)
        assert all(torch.equal(tensor, two.tensors[key]) for key, tensor in one.tensors.items()), scheme
        exact = one.dequantize()
        assert exact.shape == shape
        assert exact.dtype == torch.float32
        assert exact.isfinite().all()
        for dtype in (torch.bfloat16, torch.float16):
            assert torch.equal(one.dequantize(dtype), exact.to(dtype)), scheme


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_codes_and_parameters_explain_the_numbers(name, shape):
    """Kernels and exports read codes, scales, zeros and codebooks; these must mean the same weight."""
    for scheme in each(name, shape):
        quantized = ready(name, shape, scheme)
        if isinstance(scheme, Keep | Gguf):
            continue  # nobody but ggml reads its blocks
        if isinstance(scheme, Sparse):
            left = quantized.mask()
            assert left.sum(1).tolist() == [scheme.pattern.kept(shape[1])] * shape[0]
            assert (quantized.dequantize()[~left] == 0).all()
            if scheme.inner is None:
                assert torch.equal(quantized.dequantize()[left], weight(shape)[left].float())
                continue
        if isinstance(scheme, Float):
            scales = quantized.scales()
            assert scales.shape == (shape[0], scales.shape[1])
            assert (scales > 0).all()
            grouped = quantized.values().view(shape[0], scales.shape[1], -1)
            assert set(grouped.unique().tolist()) <= set(float_levels(scheme).tolist())
            assert torch.equal((grouped * scales[..., None]).view(shape), quantized.dequantize()), scheme
            continue
        codes = quantized.codes()
        assert codes.shape == shape
        assert codes.dtype == torch.uint8
        assert int(codes.max()) < 2**scheme.bits
        if isinstance(scheme, Integer | Sparse):
            scales, zeros = quantized.scales(), quantized.zeros()
            if isinstance(scheme, Sparse):
                scheme = scheme.inner
            assert scales.shape == zeros.shape == (shape[0], scales.shape[1])
            assert scales.dtype == zeros.dtype == torch.float32
            assert (scales > 0).all()
            if scheme.zero == "none":
                assert (zeros == 2 ** (scheme.bits - 1)).all()
            if scheme.zero == "integer":
                assert torch.equal(zeros, zeros.round().clamp(0, 2**scheme.bits - 1))
            grouped = codes.float().view(shape[0], scales.shape[1], -1)
            values = ((grouped - zeros[..., None]) * scales[..., None]).view(shape)
            if scheme.scales_inputs:
                assert quantized.input_scales().shape == shape[1:]
                assert (quantized.input_scales() > 0).all()
                values = values / quantized.input_scales()
        else:
            books = quantized.codebook()
            assert (books.diff(dim=-1) >= 0).all()
            grouped = codes.long().view(shape[0], books.shape[1], -1)
            values = books.gather(-1, grouped).view(shape)
        assert torch.equal(values, quantized.dequantize()), scheme


@pytest.mark.parametrize("name", plugins.names("methods"))
@pytest.mark.parametrize("columns", [36, 96])
def test_every_code_is_the_nearest_level_that_ships(name, columns):
    """Where inputs are not related: else an error in one column may make up for that in another."""
    w = weight((6, columns))
    for scheme in some(name, (6, columns)):
        if isinstance(scheme, Keep | Gguf) or (isinstance(scheme, Sparse) and scheme.inner is None):
            continue
        quantized = quantize(name, w, scheme, "unrelated")
        left = quantized.mask() if isinstance(scheme, Sparse) else torch.ones(w.shape, dtype=torch.bool)
        if isinstance(scheme, Float):
            levels = float_levels(scheme) * quantized.scales()[..., None]
        elif isinstance(scheme, Integer | Sparse):
            levels = (torch.arange(2**scheme.bits) - quantized.zeros()[..., None]) * quantized.scales()[..., None]
        else:
            levels = quantized.codebook()
        wide = levels.repeat_interleave(columns // levels.shape[1], dim=1)  # (out, in, levels)
        if getattr(scheme, "scales_inputs", False):
            wide = wide / quantized.input_scales()[:, None]
        nearest = (wide - w.float()[..., None]).abs().amin(-1)
        error = (quantized.dequantize() - w.float()).abs()
        assert torch.allclose(error[left], nearest[left], rtol=1e-4, atol=1e-8), scheme


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_error_does_not_grow_with_bits(name):
    shape = (16, 768 if name == "gguf" else 384)  # the least that every group and block divides
    w = weight(shape, seed=1)
    errors = collections.defaultdict(list)
    for scheme in made(name, shape):
        if getattr(getattr(scheme, "inner", None) or scheme, "activation", None) is not None:
            continue  # the same weight
        if not isinstance(scheme, Keep) and scheme.bits is not None:
            error = (quantize(name, w, scheme).dequantize() - w.float()).square().mean().item()
            axes = ("granularity", "format", "zero", "importance", "pattern")
            # Q4_0 and Q5_0 are one family, Q4_K and Q5_K another.
            kind = getattr(scheme, "type", "")
            whole = {**vars(scheme), **vars(getattr(scheme, "inner", None) or Keep())}
            rest = (kind.partition("_")[2] or kind, *(whole.get(axis) for axis in axes))
            errors[rest].append((scheme.bits, error))
    for rest, found in errors.items():
        sizes = [error for _, error in sorted(found)]
        assert sizes == sorted(sizes, reverse=True), (rest, found)


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_refuses_and_quantize_agree(name):
    other = next(o for o in plugins.names("methods") if o != name)
    own = schemes(name)
    foreign = schemes(other)
    odd = [Integer(name, 4, PerGroup(5)), parse_scheme(f"{name}2-g5"), Integer(name, 4, PerTensor(), "real")]
    for shape in ((5, 12), (3, 7), (1, 36)):
        for scheme in [*own, *foreign, *odd]:
            reason = method(name).refuses(layer(shape), scheme)
            if reason is None:
                assert ready(name, shape, scheme).scheme == scheme
                continue
            assert "\n" not in reason
            with pytest.raises(SchemeRefused) as refusal:
                quantize(name, weight(shape), scheme)
            assert reason in str(refusal.value)
    assert method(name).refuses(layer((5, 12)), foreign[0]) is not None


@pytest.mark.parametrize("text", ["rtn-int4-g5", "hqq-int4-g5", "kmeans2-g5", "nf4-g5", "log4-g5", "rtn-fp4-g5"])
def test_a_group_size_that_does_not_divide_is_named_with_the_shape(text):
    scheme = parse_scheme(text)
    name = scheme.method
    reason = method(name).refuses(layer((5, 12)), scheme)
    assert reason == "group size 5 does not divide the 12 inputs of shape (5, 12)"


@pytest.mark.parametrize("name", plugins.names("methods"))
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_counted(name, bad):
    w = weight((4, 36)).clone()
    w[1, 3] = w[2, 5] = bad
    with pytest.raises(NotFinite, match=r"^2 of the 144 numbers of the weight \(4, 36\) are NaN or infinite$"):
        quantize(name, w, made(name, (4, 36))[0])


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_statistics_that_are_not_there_or_not_finite_are_refused(name):
    for scheme in made(name, (4, 36)):
        given = statistics(name, scheme, 36)
        if given is None:
            continue
        with pytest.raises(SchemeRefused, match="statistics"):
            method(name).quantize(weight((4, 36)), scheme)
        spoilt = {key: torch.full_like(tensor, float("nan")) for key, tensor in given().items()}
        with pytest.raises(NotFinite, match="statistic"):
            method(name).quantize(weight((4, 36)), scheme, spoilt)


@pytest.mark.parametrize("name", plugins.names("methods"))
@pytest.mark.parametrize("w", [torch.zeros(3), torch.zeros(0, 4), torch.zeros(2, 4, dtype=torch.int8)])
def test_what_is_not_a_float_matrix_is_refused(name, w):
    with pytest.raises(SchemeRefused, match="float matrix"):
        quantize(name, w, made(name, (5, 12))[0])


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_strides_and_the_source_dtype_do_not_matter(name):
    w = weight((12, 36))
    for scheme in some(name, (12, 36)):
        straight = quantize(name, w, scheme).dequantize()
        turned = w.t().contiguous().t()
        sliced = torch.stack([w, w], -1)[..., 0]
        for same in (turned, sliced, w.float(), w.double()):
            assert torch.equal(quantize(name, same, scheme).dequantize(), straight), scheme
        assert torch.equal(w, weight((12, 36)))


EXTREME = st.sampled_from([0.0, 1.0, -1.0, 1e-45, -1e-40, 2e-38, 1e-20, 3e4, -6e4, 1e20, 1e38, -1e38, 3.3e38, -3.4e38])


@pytest.mark.parametrize("name", plugins.names("methods"))
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_no_weight_is_too_strange(name, data):
    """All equal, one outlier, subnormal, huge: finite numbers come out, in every dtype, whatever goes in."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    base, outlier = data.draw(EXTREME), data.draw(EXTREME)
    limit = torch.finfo(dtype).max
    w = torch.full((4, 12), base)
    w[1, 3] = outlier
    w[2] = torch.tensor(data.draw(st.lists(EXTREME, min_size=12, max_size=12)))
    w = w.clamp(-limit, limit).to(dtype)
    for scheme in made(name, (4, 12))[:: data.draw(st.integers(3, 9))]:
        if scheme == Gguf("f16") and w.abs().max() > torch.finfo(torch.float16).max:
            with pytest.raises(SchemeRefused, match="half precision"):
                quantize(name, w, scheme)
            continue
        quantized = quantize(name, w, scheme)
        for result in (torch.float32, torch.bfloat16, torch.float16):
            if isinstance(scheme, Keep) and torch.finfo(result).max < limit:
                continue
            assert quantized.dequantize(result).isfinite().all(), (scheme, w)


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_zeros_stay_zero(name):
    for scheme in some(name, (4, 36)):
        assert (quantize(name, torch.zeros(4, 36), scheme).dequantize() == 0).all(), scheme


@pytest.mark.parametrize("name", plugins.names("methods"))
@pytest.mark.parametrize("constant", [0.7, -0.7, 1e-30, 1e30])
def test_a_constant_comes_back_to_bfloat16_precision(name, constant):
    """Where inputs are alike: else a method may scale the columns, which then are no constant any more."""
    for scheme in some(name, (4, 36)):
        if isinstance(scheme, Integer) and scheme.zero == "none":
            continue  # the positive end lies half a step out by definition
        if isinstance(scheme, Float) and (scheme.bits < 8 or scheme.form.scale != "bfloat16"):
            continue  # scales of so few bits cannot
        if isinstance(scheme, Gguf):
            continue  # halves end before 1e30 and 1e-30
        if isinstance(scheme, Sparse) and scheme.inner is not None and scheme.inner.zero == "none":
            continue
        quantized = quantize(name, torch.full((4, 36), constant), scheme, "alike")
        back = quantized.dequantize()
        if isinstance(scheme, Sparse):
            back = back[quantized.mask()]
        assert torch.allclose(back, torch.full_like(back, constant), rtol=2.0**-7, atol=0), scheme


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_the_bank_gives_back_what_was_made(name, tmp_path):
    shape = (3, 256)
    w, calls = weight(shape), Bank.weight_hash(weight(shape))
    for scheme in some(name, shape):
        first = Bank(tmp_path, 10**8, 0).quantized(w, calls, scheme, statistics(name, scheme, 256), "text")
        again = Bank(tmp_path, 10**8, 0).quantized(w, calls, scheme, statistics(name, scheme, 256), "text")
        assert type(again) is type(first)
        assert (again.scheme, again.shape) == (first.scheme, first.shape)
        assert sorted(again.tensors) == sorted(first.tensors)
        assert all(torch.equal(again.tensors[key], tensor) for key, tensor in first.tensors.items()), scheme


@pytest.mark.parametrize("name", plugins.names("methods"))
def test_restore_takes_only_the_tensors_of_the_scheme(name):
    scheme = made(name, (5, 12))[0]
    quantized = quantize(name, weight((5, 12)), scheme)
    assert torch.equal(restore(scheme, (5, 12), quantized.tensors).dequantize(), quantized.dequantize())
    with pytest.raises(SchemeRefused):
        restore(scheme, (5, 13), quantized.tensors)
    with pytest.raises(SchemeRefused):
        restore(scheme, (5, 12), {**quantized.tensors, "more": torch.zeros(1)})
