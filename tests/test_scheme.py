"""Schemes: the text form is canonical, and sizes count every bit that ships."""

from __future__ import annotations

from typing import get_args

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from autoq.errors import BadInput
from autoq.scheme import (
    FIXED_LEVELS,
    FLOAT_FORMATS,
    Activation,
    Codebook,
    Float,
    Integer,
    Keep,
    Levels,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    Sparse,
    code_bits,
    parse_scheme,
)
from autoq.sparsity import TwoOfFour, Unstructured

METHODS = st.from_regex(r"[a-z][a-z_]{0,11}", fullmatch=True).filter(lambda name: name not in FIXED_LEVELS)
BITS = st.integers(2, 8)
GRANULARITIES = st.one_of(
    st.just(PerTensor()), st.just(PerChannel()), st.builds(PerGroup, st.integers(2, 999_999))
)  # fmt: skip
INTEGERS = st.builds(
    Integer,
    METHODS,
    BITS,
    GRANULARITIES,
    st.sampled_from(["none", "integer", "real"]),
    st.sampled_from([None, *get_args(Activation)]),
)  # fmt: skip
CODEBOOKS = st.builds(Codebook, METHODS, BITS, GRANULARITIES)
BLOCKS = st.builds(PerBlock, st.integers(2, 99_999), st.integers(2, 99_999))
FLOATS = st.one_of(
    st.builds(Float, METHODS, st.sampled_from(["fp8", "fp8_e5m2"]), st.one_of(GRANULARITIES, BLOCKS)),
    st.builds(Float, METHODS, st.just("fp4"), GRANULARITIES),
    st.builds(Float, METHODS, st.just("nvfp4"), st.just(PerGroup(16))),
    st.builds(Float, METHODS, st.sampled_from([n for n in FLOAT_FORMATS if n[:2] == "mx"]), st.just(PerGroup(32))),
    st.builds(Float, METHODS, st.just("fp8"), st.just(PerChannel()), st.sampled_from(["a8dyn", "a8static"])),
)  # fmt: skip
LEVELS = st.builds(Levels, st.sampled_from(FIXED_LEVELS), BITS, GRANULARITIES)
UNIFORM = st.one_of(st.just(Keep()), INTEGERS, LEVELS, CODEBOOKS)
PATTERNS = st.one_of(st.just(TwoOfFour()), st.builds(Unstructured, st.sampled_from(range(10, 100, 5))))
INNER = st.builds(Integer, st.just("rtn"), BITS, GRANULARITIES, st.sampled_from(["none", "integer"]))
SPARSE = st.builds(Sparse, METHODS, PATTERNS, st.one_of(st.none(), INNER))
SCHEMES = st.one_of(UNIFORM, FLOATS, SPARSE)


@given(scheme=SCHEMES)
def test_the_text_form_is_canonical(scheme):
    assert parse_scheme(str(scheme)) == scheme
    assert str(parse_scheme(str(scheme))) == str(scheme)


@given(one=SCHEMES, two=SCHEMES)
def test_different_schemes_have_different_texts(one, two):
    assert (str(one) == str(two)) == (one == two)


@given(text=st.text())
def test_any_text_is_a_scheme_or_bad_input_in_one_line(text):
    try:
        scheme = parse_scheme(text)
    except BadInput as problem:
        message = str(problem)
        assert len(message.splitlines()) == 1
        assert len(message) < 300
    else:
        assert str(scheme) == text


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "int4", "rtn", "rtn-int4", "rtn-4-g64", "rtn-int4-g", "rtn-int4-g0", "rtn-int4-g064", "rtn-int4-g1",
        "rtn-int1-g64", "rtn-int9-g64", "rtn-int16-g64", "rtn-int4-row", "rtn-int4-g64-asym", "rtn-int4-g64-rz-sym",
        "rtn-int4-g64-sym-rz", "rtn-int4-g64-a8", "rtn-int4-g64-a8dyn-sym", "rtn-int4-g64-", "RTN-int4-g64", "keep ",
        "keep-int4-g64-", "kmeans4", "kmeans-channel", "kmeans4-channel-sym", "kmeans1-channel", "4-channel",
        "rtn-fp8", "rtn-fp8-b128", "rtn-fp8-b0x128", "rtn-fp8-b128x0128", "rtn-fp8-b128x128x128", "rtn-fp8-g1",
        "rtn-fp8_e4m3-channel", "rtn-int8-b128x128", "rtn-mxfp6-g32", "rtn-mxfp8-g64", "rtn-mxfp8-channel",
        "rtn-nvfp4-g32", "rtn-fp4-b128x128", "rtn-fp8_e5m2-channel-a8dyn", "rtn-mxfp8-g32-a8dyn", "rtn-fp8-b1x128",
        "wanda2", "wanda05", "wanda23", "wanda100", "wanda24-", "wanda24-g64", "wanda24-int4",
        "wanda24-int4-g64-rz", "wanda24-int4-g64-a8dyn", "wanda2:4", "24", "wanda٢٤", "wanda24-int4-g64\n",
        "rtn-int4-g64-a8max", "rtn-fp8-channel-a8pct-a8mse",
        "rtn-int4-g64\n", "rtn-int4-g99999999", "rtn-int٤-g64", "rtn-int4-g٦٤", "x" * 10**5,
    ],
)  # fmt: skip
def test_junk_is_refused_in_one_line(text):
    with pytest.raises(BadInput) as refusal:
        parse_scheme(text)
    assert len(str(refusal.value).splitlines()) == 1
    assert refusal.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "shape", "expected"),
    [
        ("keep", (3, 5), 30),
        # 64 codes of 4 bits are 32 bytes a row; a scale of 2 bytes and a zero of 4 bits padded to a byte.
        ("rtn-int4-g64", (10, 64), 10 * (32 + 2 + 1)),
        ("rtn-int4-g64-sym", (10, 64), 10 * (32 + 2)),
        ("rtn-int4-g64-rz", (10, 64), 10 * (32 + 2 + 2)),
        # 192 codes of 3 bits are 72 bytes; three scales; three zeros are 9 bits, so 2 bytes.
        ("hqq-int3-g64", (7, 192), 7 * (72 + 6 + 2)),
        # 5 codes of 3 bits are 15 bits.
        ("rtn-int3-channel", (4, 5), 4 * (2 + 2 + 1)),
        ("rtn-int8-tensor", (4, 5), 20 + 2 + 1),
        ("rtn-int8-tensor-sym-a8dyn", (4, 5), 20 + 2),
        ("rtn-int8-tensor-sym-a8static", (4, 5), 20 + 2 + 2),
        ("rtn-int8-tensor-sym-a8mse", (4, 5), 20 + 2 + 2),
        ("kmeans4-channel", (4, 6), 4 * (3 + 16 * 2)),
        ("kmeans2-tensor", (4, 6), 4 * 2 + 4 * 2),
        ("kmeans2-g4", (4, 8), 4 * (2 + 2 * 4 * 2)),
        ("nf4-g64", (10, 64), 10 * (32 + 2)),
        ("nf3-channel", (4, 5), 4 * (2 + 2)),
        ("log5-tensor", (4, 8), 4 * 5 + 2),
        ("rtn-fp8-channel", (4, 6), 4 * (6 + 2)),
        ("rtn-fp8-tensor-a8static", (4, 6), 24 + 2 + 2),
        ("rtn-fp8_e5m2-g3", (4, 6), 4 * (6 + 2 * 2)),
        # 130x576: two rows of five blocks, a bfloat16 each.
        ("rtn-fp8-b128x128", (130, 576), 130 * 576 + 2 * 5 * 2),
        ("rtn-fp4-channel", (4, 5), 4 * (3 + 2)),
        ("rtn-fp4-tensor", (4, 6), 4 * 3 + 2),
        # 64 codes of 6 bits are 48 bytes; two scales of a byte.
        ("rtn-mxfp6_e2m3-g32", (3, 64), 3 * (48 + 2)),
        ("rtn-mxfp8-g32", (3, 64), 3 * (64 + 2)),
        ("rtn-mxfp4-g32", (3, 64), 3 * (32 + 2)),
        ("rtn-nvfp4-g16", (3, 64), 3 * (32 + 4) + 4),
        # Of 12 inputs 6 are left, in 16 bits each, and 12 bits of mask are 2 bytes.
        ("wanda24", (4, 12), 4 * (2 + 12)),
        # 30 % of 12 is 3 whole weights; 9 codes of 3 bits are 4 bytes, then a scale and a zero.
        ("magnitude30-int3-channel", (4, 12), 4 * (2 + 4 + 2 + 1)),
        ("wanda24-int4-g64-sym", (10, 128), 10 * (16 + 32 + 4)),
        ("wanda50-int8-tensor-sym", (4, 5), 4 * (1 + 3) + 2),
    ],
)
def test_bytes_by_hand(text, shape, expected):
    assert parse_scheme(text).nbytes(*shape, dtype_bytes=2) == expected


@given(
    scheme=st.one_of(UNIFORM, SPARSE),
    rows=st.integers(1, 50),
    groups=st.integers(1, 7),
    width=st.integers(2, 40),
    dtype=st.sampled_from([2, 4]),
)  # fmt: skip
def test_bytes_by_an_independent_count_of_bits(scheme, rows, groups, width, dtype):
    pad = lambda b: b + (-b) % 8  # noqa: E731
    columns = groups * width
    left, mask, whole = columns, 0, scheme
    if isinstance(scheme, Sparse):
        scheme = scheme.inner or Keep()
        pruned = int(columns * 0.5) if str(whole.pattern) == "24" else columns * int(str(whole.pattern)) // 100
        left, mask = columns - pruned, rows * pad(columns)
        assume(str(whole.pattern) != "24" or columns % 4 == 0)
    if not isinstance(scheme, Keep) and isinstance(scheme.granularity, PerGroup):
        scheme = type(scheme)(**{**vars(scheme), "granularity": PerGroup(width)})
    whole = Sparse(whole.method, whole.pattern, None if scheme == Keep() else scheme) if mask else scheme
    bits = mask
    if isinstance(scheme, Keep):
        bits += rows * left * dtype * 8
    else:
        sets = {PerTensor: (1, 1), PerChannel: (rows, 1), PerGroup: (rows, groups)}[type(scheme.granularity)]
        bits += rows * pad(left * scheme.bits)
        if isinstance(scheme, Codebook):
            bits += sets[0] * sets[1] * 2**scheme.bits * 16
        else:
            bits += sets[0] * sets[1] * 16
            bits += {"none": 0, "real": sets[0] * sets[1] * 16, "integer": sets[0] * pad(sets[1] * scheme.bits)}[
                getattr(scheme, "zero", "none")
            ]
            bits += 0 if getattr(scheme, "activation", None) in (None, "a8dyn") else 16  # one scale for the inputs
    assert whole.nbytes(rows, columns, dtype) * 8 == bits


@given(scheme=st.one_of(INTEGERS, LEVELS, CODEBOOKS), rows=st.integers(1, 9), width=st.integers(1, 64))
def test_more_bits_never_take_less_room(scheme, rows, width):
    columns = width * scheme.granularity.size if isinstance(scheme.granularity, PerGroup) else width
    if scheme.bits < 8:
        larger = type(scheme)(**{**vars(scheme), "bits": scheme.bits + 1})
        assert larger.nbytes(rows, columns, 2) >= scheme.nbytes(rows, columns, 2)


@pytest.mark.parametrize("bits", [-1, 0, 1, 9, 16])
def test_bits_out_of_range_name_the_choices(bits):
    for make, method in ((Integer, "x"), (Codebook, "x"), (Levels, "nf")):
        with pytest.raises(BadInput, match=rf"^{bits} bits is out of range; choose from 2 to 8$"):
            make(method, bits, PerChannel())


def test_fixed_levels_and_codebooks_are_told_apart_by_the_method():
    assert parse_scheme("nf4-g64") == Levels("nf", 4, PerGroup(64))
    assert parse_scheme("kmeans4-g64") == Codebook("kmeans", 4, PerGroup(64))
    with pytest.raises(BadInput, match=r"^'kmeans' has no fixed levels; choose from log, nf$"):
        Levels("kmeans", 4, PerGroup(64))
    with pytest.raises(BadInput, match=r"^nf has fixed levels and no codebook$"):
        Codebook("nf", 4, PerGroup(64))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("rtn-mxfp8-g64", "mxfp8 has its own granularity, g32, not g64"),
        ("rtn-fp4-b128x128", "fp4 has a scale per channel, tensor or group, not per b128x128"),
        ("rtn-fp8_e5m2-channel-a8dyn", "fp8_e5m2 is a weight-only format here; leave a8dyn out"),
        ("rtn-fp8-b128x128-a8dyn", "a8dyn goes with a scale per channel or tensor, not per b128x128"),
        ("rtn-fp8-g128-a8static", "a8static goes with a scale per channel or tensor, not per g128"),
        ("rtn-fp8-b1x128", "block 1x128 is too small; the least is 2x2"),
    ],
)
def test_floats_say_what_they_do_not_hold(text, reason):
    with pytest.raises(BadInput) as refusal:
        parse_scheme(text)
    assert str(refusal.value) == reason


def test_an_unknown_format_names_the_choices():
    with pytest.raises(BadInput, match=r"^no floating-point format 'fp9'; choose from fp8, fp8_e5m2, fp4, mxfp8, "):
        parse_scheme("rtn-fp9-channel")


@pytest.mark.parametrize("size", [-4, 0, 1])
def test_a_group_of_one_is_no_group(size):
    with pytest.raises(BadInput, match="too small; the least is 2"):
        PerGroup(size)


def test_code_bits():
    assert code_bits(parse_scheme("rtn-int4-g64")) == 4
    assert code_bits(parse_scheme("kmeans3-channel")) == 3
    assert code_bits(Keep()) == 16
    assert code_bits(Keep(), dtype_bits=32) == 32
    assert code_bits(parse_scheme("wanda24-int4-g64")) == 4
    assert code_bits(parse_scheme("wanda24"), dtype_bits=32) == 32


@pytest.mark.parametrize("text", ["wanda24-int4-g64-rz", "wanda24-int4-g64-a8dyn"])
def test_what_is_left_is_quantized_with_zero_as_a_code_and_weights_alone(text):
    with pytest.raises(BadInput, match="with zero as a code"):
        parse_scheme(text)


@pytest.mark.parametrize("text", ["wanda23", "wanda05", "wanda99"])
def test_a_sparsity_that_there_is_not_names_the_choices(text):
    with pytest.raises(BadInput, match=r"choose 24 .* or a percentage of each row from 10 to 95 in steps of 5"):
        parse_scheme(text)
