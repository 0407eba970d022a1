"""Fixed levels: nf beside the published numbers and scipy's quantiles, log on powers of two, both by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq import plugins
from autoq.methods import Method
from autoq.methods._levels import FixedLevels
from autoq.scheme import FIXED_LEVELS, parse_scheme

# NF4 as QLoRA's appendix E and bitsandbytes publish it.
NF4 = [
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
]  # fmt: skip


def method(name):
    return plugins.load("methods", name, Method)


def made(weight, text):
    scheme = parse_scheme(text)
    return method(scheme.method).quantize(weight, scheme)


def error(weight, text):
    return (made(weight, text).dequantize() - weight).square().mean().item()


def gaussian(rows, columns, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def test_the_table_of_names_is_the_folder():
    own = {name for name in plugins.names("methods") if isinstance(method(name), FixedLevels)}
    assert own == set(FIXED_LEVELS)


@pytest.mark.parametrize("name", FIXED_LEVELS)
@pytest.mark.parametrize("bits", range(2, 9))
def test_levels_ascend_from_minus_one_to_one_through_zero(name, bits):
    levels = method(name).levels(bits)
    assert len(levels) == 2**bits
    assert (levels.diff() > 0).all()
    assert (levels[0], levels[-1]) == (-1, 1)
    assert 0 in levels


def test_nf4_is_the_published_table():
    assert method("nf").levels(4).tolist() == NF4


@pytest.mark.parametrize("bits", range(2, 9))
def test_nf_levels_are_quantiles(bits):
    """By scipy: the positive ones at 2^(b-1) equal steps of probability, the negative ones at one less."""
    from scipy.stats import norm

    levels = method("nf").levels(bits).double()
    outermost = 1 - (1 / (2 * (2**bits - 1)) + 1 / (2 * 2**bits)) / 2
    for side, count in ((levels[levels > 0], 2 ** (bits - 1)), (-levels[levels < 0], 2 ** (bits - 1) - 1)):
        assert len(side) == count
        steps = torch.tensor(norm.cdf(torch.cat([torch.zeros(1), side.sort().values]) * norm.ppf(outermost))).diff()
        assert torch.allclose(steps, torch.full_like(steps, (outermost - 0.5) / count), rtol=1e-3)


def test_nf4_by_hand():
    """Scale 2: levels -2, …, 0, 0.159, …; -0.29 lies between -0.3695 and -0.1821, 0.08 beyond 0.0796."""
    found = made(torch.tensor([[2.0, -0.29, 0.0, 0.08, -2.0, 0.0795]]), "nf4-channel")
    assert found.tensors["scales"].tolist() == [[2.0]]
    assert found.codes().tolist() == [[15, 5, 7, 8, 0, 7]]
    assert found.tensors["codes"].tolist() == [[0x5F, 0x87, 0x70]]
    assert found.dequantize().tolist() == [[2.0, 2 * NF4[5], 0.0, 2 * NF4[8], -2.0, 0.0]]


@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [3, 4])
def test_nf_beats_equal_steps_on_gaussian_weights(bits, group):
    """The claim of the paper, at the same group, the same bytes and the same scales in bfloat16."""
    for seed in range(3):
        weight = gaussian(64, 512, seed)
        ours, theirs = f"nf{bits}-g{group}", f"rtn-int{bits}-g{group}-sym"
        assert parse_scheme(ours).nbytes(64, 512, 2) == parse_scheme(theirs).nbytes(64, 512, 2)
        assert error(weight, ours) < 0.9 * error(weight, theirs)


def test_log_by_hand():
    """4 bits: eight positive powers and seven negative ones; a tie, 1.5 · 2^-k, takes the lower level."""
    levels = method("log").levels(4).tolist()
    assert levels == [-1, -1 / 2, -1 / 4, -1 / 8, -1 / 16, -1 / 32, -1 / 64, 0] + [2.0**-k for k in range(7, -1, -1)]
    found = made(torch.tensor([[8.0, 5.9, 6.0, 6.1, -6.0, 0.0625, 0.031, -0.0624]]), "log4-channel")
    assert found.dequantize().tolist() == [[8.0, 4.0, 4.0, 8.0, -8.0, 0.0625, 0.0, 0.0]]
    assert method("log").levels(2).tolist() == [-1.0, 0.0, 0.5, 1.0]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.integers(2, 7), top=st.integers(-40, 40))
def test_log_keeps_powers_of_two(data, bits, top):
    """Within the exponents below the largest weight that its codes hold, whatever the signs."""
    depth = min(2 ** (bits - 1) - 2, 60)
    powers = st.integers(0, depth).flatmap(lambda k: st.sampled_from([2.0 ** (top - k), -(2.0 ** (top - k)), 0.0]))
    rows = data.draw(st.lists(st.lists(powers, min_size=7, max_size=7), min_size=1, max_size=3))
    weight = torch.tensor([[2.0**top, *row] for row in rows])
    assert torch.equal(made(weight, f"log{bits}-channel").dequantize(), weight)
    assert torch.equal(made(weight, f"log{bits}-g8").dequantize(), weight)
    assert torch.equal(made(weight, f"log{bits}-tensor").dequantize(), weight)


def test_log_rounds_small_weights_as_well_as_large_ones():
    """Relative error: at most a third (2 for 1.5) anywhere in six octaves, where equal steps lose all."""
    weight = torch.cat([torch.ones(1), torch.logspace(-5.9, 0, 999, base=2.0)]).view(1, -1)
    ours = (made(weight, "log4-channel").dequantize() / weight - 1).abs().max()
    assert ours <= 1 / 3 + 1e-6
    assert (made(weight, "rtn-int4-channel-sym").dequantize() / weight - 1).abs().max() >= 1


@pytest.mark.parametrize("name", FIXED_LEVELS)
def test_blocks_of_rows_do_not_show(name, monkeypatch):
    from autoq.methods import _weights

    texts = [f"{name}{bits}-{where}" for bits in (3, 4) for where in ("g16", "channel", "tensor")]
    weight = gaussian(50, 64)
    whole = [made(weight, text) for text in texts]
    monkeypatch.setattr(_weights, "BLOCK_ELEMENTS", 100)
    for text, expected in zip(texts, whole, strict=True):
        found = made(weight, text)
        assert all(torch.equal(found.tensors[key], tensor) for key, tensor in expected.tensors.items())
        assert torch.equal(found.dequantize(), expected.dequantize())


@pytest.mark.parametrize("name", FIXED_LEVELS)
def test_other_kinds_of_scheme_are_refused(name):
    from autoq.errors import SchemeRefused
    from autoq.scheme import Integer, PerChannel

    with pytest.raises(SchemeRefused, match=f"{name} makes fixed levels only"):
        method(name).quantize(gaussian(2, 4), Integer(name, 4, PerChannel()))
