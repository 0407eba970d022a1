"""Each observer against a slow and plain way of doing the same."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autoq.calibration.histogram import Histogram
from autoq.calibration.observers import AFFINE_INT8, FP8, SYMMETRIC_INT8
from autoq.calibration.observers.entropy import BINS, Entropy, divergence
from autoq.calibration.observers.mse import Mse
from autoq.calibration.observers.percentile import Percentile

KINDS = ["normal", "outlier", "silu", "heavy", "one-sided"]


def inputs(kind, count=20_000):
    x = torch.randn(count, generator=torch.Generator().manual_seed(KINDS.index(kind)))
    match kind:
        case "outlier":
            x[7] = 300.0
        case "silu":
            x = torch.nn.functional.silu(2 * x)
        case "heavy":
            x = x**3
        case "one-sided":
            x = x.abs()
    return x


def histogram(x):
    made = Histogram()
    made.add(x)
    return made


def ends(x):
    return min(0.0, float(x.min())), max(0.0, float(x.max()))


def error(x, levels, low, high):
    """Mean squared error of rounding by the kernels' own arithmetic."""
    x = x.double()
    if levels is AFFINE_INT8:
        step = (high - low) / 255
        zero = round(-low / step)
        return float((((x / step).round() + zero).clamp(0, 255) - zero).mul(step).sub(x).square().mean())
    if levels is SYMMETRIC_INT8:
        step = max(-low, high) / 127
        return float((x / step).round().clamp(-127, 127).mul(step).sub(x).square().mean())
    step = max(-low, high) / 448
    codes = (x / step).clamp(-448, 448).float().to(torch.float8_e4m3fn).double()
    return float((codes * step - x).square().mean())


@pytest.mark.parametrize("levels", [SYMMETRIC_INT8, AFFINE_INT8, FP8], ids=["symmetric", "affine", "fp8"])
@pytest.mark.parametrize("kind", KINDS)
def test_mse_is_near_the_best_of_many_ranges(kind, levels):
    """Of 100 symmetric thresholds, or 16 × 16 affine bounds, by the error on the inputs themselves."""
    x = inputs(kind)
    low, high = ends(x)
    found = error(x, levels, *Mse().choose(histogram(x), low, high, levels))
    if levels is AFFINE_INT8:
        shares = torch.logspace(0, -1, 16).tolist()
        lows = [low * share for share in shares] if low < 0 else [0.0]
        best = min(error(x, levels, one, high * share) for one in lows for share in shares)
    else:
        best = min(error(x, levels, -t, t) for t in (max(-low, high) * torch.logspace(0, -1.5, 100)).tolist())
    assert found <= 1.05 * best
    assert found <= 1.001 * error(x, levels, low, high)


@pytest.mark.parametrize("levels", [SYMMETRIC_INT8, AFFINE_INT8, FP8], ids=["symmetric", "affine", "fp8"])
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_mse_never_errs_more_than_the_whole_range(levels, values):
    """By the error that it minimizes, which takes inputs to lie evenly in their bins."""
    x = torch.tensor(values)
    low, high = ends(x)
    if low == high:
        return
    made = histogram(x)

    def told(low, high):
        bounds = torch.tensor([[low], [high]], dtype=torch.float64)
        return float(levels.square_error(made.edges, made.width, bounds[:1], bounds[1:]) @ made.sums.double())

    assert told(*Mse().choose(made, low, high, levels)) <= told(low, high)


@pytest.mark.parametrize("levels", [SYMMETRIC_INT8, AFFINE_INT8], ids=["symmetric", "affine"])
@pytest.mark.parametrize("width", [0.001, 0.05, 0.3])  # of a step of 0.1
def test_the_error_of_evenly_spread_inputs_is_its_integral(levels, width):
    """Steps wider and narrower than bins, and beyond the last level."""
    low, high = (-12.7, 12.7) if levels is SYMMETRIC_INT8 else (-5.0, 20.5)
    left = torch.tensor([0.0, 0.04, 1.23, -3.3, high - width / 2, high + 2, low - 3], dtype=torch.float64)
    bounds = torch.tensor([[low], [high]], dtype=torch.float64)
    (found,) = levels.square_error(left, width, bounds[:1], bounds[1:])
    dense = torch.linspace(0, width, 20_001, dtype=torch.float64)
    expected = [error(start + dense, levels, low, high) for start in left]
    assert found.tolist() == pytest.approx(expected, rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_percentile_leaves_out_what_it_says(kind):
    x = inputs(kind)
    made, (low, high) = histogram(x), ends(x)
    bounds = Percentile().choose(made, low, high, SYMMETRIC_INT8)
    magnitudes = x.abs().sort(descending=True).values
    # 2 of 20,000 may lie outside: the bound is the third, within a bin.
    assert max(-bounds[0], bounds[1]) == pytest.approx(float(magnitudes[2]), abs=made.width)
    assert int((x.abs() > max(-bounds[0], bounds[1])).sum()) <= 2
    lower, upper = Percentile().choose(made, low, high, AFFINE_INT8)
    ordered = x.sort().values
    assert upper == pytest.approx(float(ordered[-2]), abs=made.width)
    assert lower == pytest.approx(min(0.0, float(ordered[1])), abs=made.width)


@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40))
def test_of_few_inputs_a_percentile_leaves_none_out(values):
    x = torch.tensor(values)
    for levels in (SYMMETRIC_INT8, AFFINE_INT8):
        low, high = Percentile().choose(histogram(x), *ends(x), levels)
        if levels is AFFINE_INT8:
            assert (low, high) == pytest.approx(ends(x))
        else:
            assert max(-low, high) == pytest.approx(float(x.abs().max()))


def migacz(counts, levels):
    """The slides' loop, bin by bin; divergences from i = `levels` on."""
    found = []
    for i in range(levels, len(counts) + 1):
        reference = list(counts[:i])
        reference[-1] += sum(counts[i:])
        groups = [[b for b in range(i) if b * levels // i == group] for group in range(levels)]
        quantized = [0.0] * i
        for group in groups:
            filled = [b for b in group if counts[b] > 0]
            for b in filled:
                quantized[b] = sum(counts[b] for b in group) / len(filled)
        p = [each / sum(reference) for each in reference]
        q = [each / sum(quantized) if sum(quantized) else 0.0 for each in quantized]
        if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
            found.append(math.inf)
        else:
            found.append(sum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0))
    return found


@given(st.lists(st.integers(0, 50), min_size=8, max_size=40).filter(any))
def test_divergences_are_those_of_the_plain_loop(counts):
    levels = 8
    while counts[-1] == 0:
        counts = [0, *counts[:-1]]
    cuts = torch.linspace(0, 1, levels + 1, dtype=torch.float64)
    found = divergence(torch.tensor(counts).double(), torch.arange(levels, len(counts) + 1), cuts)
    assert found.tolist() == pytest.approx(migacz(counts, levels), abs=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_the_entropy_threshold_is_half_a_bin_beyond_the_least_divergence(kind):
    x = inputs(kind, 5000)
    low, high = ends(x)
    top = 2.0 ** math.frexp(max(-low, high))[1]
    counts = torch.histc(x.abs().double(), BINS, 0, top).tolist()
    used = max(b for b, count in enumerate(counts) if count) + 1
    for levels, affine in ((128, False), (256 if kind == "one-sided" else 128, True)):
        divergences = migacz_fast(counts[:used], levels)
        least = min(divergences)
        i = max(k for k, each in enumerate(divergences) if each == pytest.approx(least, abs=1e-12)) + levels
        threshold = (i + 0.5) * top / BINS
        expected = (max(low, -threshold), min(high, threshold))
        found = Entropy().choose(histogram(x), low, high, AFFINE_INT8 if affine else SYMMETRIC_INT8)
        assert found == pytest.approx(expected)


def migacz_fast(counts, levels):
    """`migacz` with numpy's sums, for 2,048 bins."""
    counts, found = torch.tensor(counts).double(), []
    for i in range(levels, len(counts) + 1):
        own = counts[:i]
        group = torch.arange(i) * levels // i
        sums = torch.zeros(levels).double().index_add_(0, group, own)
        filled = torch.zeros(levels).double().index_add_(0, group, (own > 0).double())
        p = own.clone()
        p[-1] += counts[i:].sum()
        q = torch.where(own > 0, (sums / filled)[group], 0.0)
        p, q = p / p.sum(), q / q.sum()
        found.append(
            math.inf if bool(((p > 0) & ~(q > 0)).any()) else float((p[p > 0] * (p[p > 0] / q[p > 0]).log()).sum())
        )
    return found


def test_entropy_groups_fp8_by_the_nearest_number():
    """Cuts are between the numbers of E4M3: 126 of them, and both ends."""
    cuts = FP8.cuts(one_sided=False)
    assert len(cuts) == 128
    assert torch.equal(cuts, FP8.cuts(one_sided=True))
    assert (cuts.diff() > 0).all()
    near = torch.stack([cuts[1:-1] * (1 - 1e-6), cuts[1:-1] * (1 + 1e-6)]) * 448
    codes = near.float().to(torch.float8_e4m3fn).view(torch.uint8)
    assert codes[0].tolist() == list(range(126))
    assert codes[1].tolist() == list(range(1, 127))


def test_one_outlier_by_hand():
    """A thousand inputs of magnitude 1 and one of 1000: squares give up little of it, percentiles nothing."""
    x = torch.cat([torch.ones(500), -torch.ones(500), torch.tensor([1000.0])])
    made = histogram(x)
    assert Percentile().choose(made, -1.0, 1000.0, SYMMETRIC_INT8) == (-1.0, 1000.0)
    many = torch.cat([x[:-1].repeat(100), x[-1:]])
    low, high = Percentile().choose(histogram(many), -1.0, 1000.0, SYMMETRIC_INT8)
    assert low == -1.0
    assert 1.0 <= high <= 1.0 + 2 * made.width
    found = Mse().choose(histogram(many), -1.0, 1000.0, SYMMETRIC_INT8)
    assert error(many, SYMMETRIC_INT8, *found) <= error(many, SYMMETRIC_INT8, -1.0, 1000.0)
