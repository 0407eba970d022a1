"""Interactions of layers: what is learned from slopes of a loss whose makeup is known."""

import numpy as np
import pytest

from autoq.search import coherent
from autoq.search.interactions import Interactions, Slopes
from autoq.search.layers import Layers

KINDS = ["attn.q", "attn.o", "mlp.up", "mlp.down"]
BLOCKS, WIDTH = 15, 5
NAMES = tuple(f"blocks.{block}.{kind}" for block in range(BLOCKS) for kind in KINDS)
N = len(NAMES)
ROWS = np.arange(N)
SIZE = np.tile(np.arange(2.0, 2 + WIDTH), (N, 1))


def layers(seed=0):
    rng = np.random.default_rng(seed)
    return Layers(NAMES, rng.lognormal(0, 0.5, (N, 1)) * 4.0 ** -np.arange(WIDTH) * np.ones((N, WIDTH)))


def value(context, choices):
    turned = context.direction[ROWS, choices].sum()
    return context.cost[ROWS, choices].sum() + 0.5 * context.weight * turned**2


def solved(context, budget):
    counts = [WIDTH] * N
    return coherent.solve(context.cost, context.direction, context.weight, SIZE, counts, budget)


def test_around_a_slope_is_its_loss_and_the_gradient_that_was_smoothed(Coherent):
    known = layers()
    start = np.random.default_rng(1).integers(1, 4, N)
    slopes = Coherent(known.loss, 1).slopes(start)
    found = Interactions(known, [slopes])
    own = found.own(found.place(start))
    context, smoothed = found.around(start, own), found.smoothed(start, own)
    total = smoothed[ROWS, start].sum()
    assert value(context, start) == pytest.approx(0.5 * total)
    for layer in (0, 17):
        for choice in range(WIDTH):
            if choice == start[layer]:
                continue
            moved = start.copy()
            moved[layer] = choice
            turn = smoothed[layer, choice] - smoothed[layer, start[layer]]
            away = own[layer, choice] + own[layer, start[layer]]
            assert value(context, moved) - value(context, start) == pytest.approx(turn + away + turn**2 / (2 * total))


def test_what_is_measured_once_counts_in_part_and_what_is_measured_alike_again_counts_more(Coherent):
    """Of what exceeds the own losses; never more than was measured."""
    known, rng = layers(), np.random.default_rng(2)
    truth, start = Coherent(known.loss, 2, independent=True), np.full(N, 2)

    def share(count):
        found = Interactions(known, [truth.slopes(start, 0.02, rng) for _ in range(count)])
        own = found.own(found.place(start))
        excess, exact = found.smoothed(start, own), truth.slopes(start).table.copy()
        for table in (excess, exact):
            table[ROWS, start] -= 2 * own[ROWS, start]
        return float((excess * exact).sum() / (exact**2).sum())

    shares = [share(count) for count in (1, 2, 8)]
    assert shares == sorted(shares)
    assert 0.2 < shares[0] < 0.9
    assert 0.7 < shares[2] < 1.05


def test_noise_is_told_from_signal(Coherent):
    known, rng = layers(), np.random.default_rng(3)
    truth, start = Coherent(known.loss, 3, common=0.0, independent=True), np.full(N, 2)
    starts = [np.where(rng.random(N) < 0.1, 3, start) for _ in range(4)]
    kept = []
    for noise in (0.0, 0.5):
        found = Interactions(known, [truth.slopes(x, noise, rng) for x in starts])
        # What a slope's own cosines count for at its own place.
        kept.append(float(np.abs(found._smoothing).max()))
    assert kept[0] > 2 * kept[1]


def test_kinds_and_depths_that_lose_more_are_found():
    known = layers()
    factor = np.tile([1.0, 0.7, 1.0, 1.6], BLOCKS) * np.exp(0.4 * np.repeat(np.linspace(-1, 1, BLOCKS), 4))
    slopes = []
    for level in (1, 2, 3):
        choices = np.full(N, level)
        true = (known.loss * factor[:, None])[ROWS, choices]
        table = np.zeros((N, WIDTH))
        table[ROWS, choices] = 2 * true
        slopes.append(Slopes(choices, float(true.sum()), table))
    found = Interactions(known, slopes)
    own = found.own(found.place(np.full(N, 2)))
    assert np.corrcoef(np.log(own[:, 2] / known.loss[:, 2]), np.log(factor))[0, 1] > 0.97


def test_far_from_all_slopes_it_is_what_was_predicted():
    known = layers()
    choices = np.zeros(N, dtype=np.int64)
    table = np.zeros((N, WIDTH))
    table[:, 0] = 6 * known.loss[:, 0]
    found = Interactions(known, [Slopes(choices, float(3 * known.loss[:, 0].sum()), table)])
    assert found.own(found.place(choices)) == pytest.approx(3 * known.loss, rel=0.1)
    assert found.own(found.place(choices) - 8) == pytest.approx(known.loss, rel=1e-2)
    elsewhere = np.full(N, 4)
    assert found.anchor(elsewhere) is elsewhere
    assert (found.anchor(choices) == choices).all()


@pytest.mark.parametrize("noise", [0.0, 0.05])
def test_solutions_get_better_with_slopes(Coherent, noise):
    """Round by round at one budget, each from the last: what is truly lost falls, and most of it at first."""
    ratios = []
    for seed in range(8):
        known, rng = layers(seed), np.random.default_rng(seed)
        truth, budget = Coherent(known.loss, seed, common=0.0, independent=True), 4.0 * N
        first = coherent.knapsack(known.loss, SIZE, [WIDTH] * N, budget)
        choices, slopes, losses = first, [], [float(truth.of([first])[0])]
        for _ in range(4):
            slopes.append(truth.slopes(choices, noise, rng))
            found = Interactions(known, slopes)
            near = coherent.knapsack(found.own(found.place(choices)), SIZE, [WIDTH] * N, budget)
            context = found.around(found.anchor(near), found.own(found.place(near)))
            choices = solved(context, budget)
            assert SIZE[ROWS, choices].sum() <= budget
            losses.append(float(truth.of([choices])[0]))
        ratios.append(losses[-1] / losses[0])
    assert np.median(ratios) < 0.8
    assert max(ratios) < 1.1


def test_choices_that_lose_nothing_are_no_trouble(Coherent):
    loss = layers().loss.copy()
    loss[:, -1] = 0.0
    loss[3, 3:] = np.inf
    known = Layers(NAMES, loss)
    start = np.full(N, 2)
    start[5:9] = WIDTH - 1
    with np.errstate(all="raise"):
        found = Interactions(known, [Coherent(np.where(np.isfinite(loss), loss, 0.0), 4).slopes(start)])
        own = found.own(found.place(start))
        context = found.around(start, own)
    assert np.isfinite(context.direction).all()
    assert (context.cost[3, 3:] == np.inf).all()
    assert context.weight > 0


def test_slopes_that_deny_a_loss_are_not_built_on():
    known, start = layers(), np.full(N, 2)
    found = Interactions(known, [Slopes(start, 0.1, -known.loss)] * 6)
    context = found.around(start, found.own(found.place(start)))
    assert context.weight == 0.0
    assert np.isfinite(context.cost).all()
