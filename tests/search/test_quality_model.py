"""The model of quality: what it predicts of losses whose makeup is known."""

import numpy as np
import pytest

from autoq.search.interactions import Slopes
from autoq.search.layers import Layers
from autoq.search.quality_model import QualityModel
from autoq.search.samplers._trials import interactions_of

KINDS = ["attn.q", "attn.o", "mlp.up", "mlp.down"]
BLOCKS, WIDTH = 8, 5
NAMES = tuple(f"blocks.{block}.{kind}" for block in range(BLOCKS) for kind in KINDS)
N = len(NAMES)
DEPTH = np.repeat(np.linspace(-1, 1, BLOCKS), len(KINDS))


def layers(seed=0, **changes):
    rng = np.random.default_rng(seed)
    loss = rng.lognormal(0, 0.7, (N, 1)) * 4.0 ** -np.arange(WIDTH) * rng.uniform(0.9, 1.1, (N, WIDTH))
    return Layers(NAMES, loss, **changes)


def drawn(rng, k):
    """Assignments around levels, as a search proposes them."""
    return np.clip(rng.integers(0, WIDTH, (k, 1)) + rng.integers(-1, 2, (k, N)), 0, WIDTH - 1)


def off_by_kind_and_depth(known):
    """What the prediction misses: `mlp.down` counts threefold, later blocks more."""
    factor = np.tile([1.0, 0.7, 1.0, 3.0], BLOCKS) * np.exp(0.8 * DEPTH)
    return known.loss * factor[:, None], factor


def no_trials(known, slopes=()):
    return QualityModel(known, np.zeros((0, N)), np.zeros(0), interactions_of(known, slopes))


def test_with_nothing_told_it_predicts_the_sum_of_what_was_predicted():
    known, choices = layers(), drawn(np.random.default_rng(1), 20)
    mean, spread = no_trials(known).predict(choices)
    assert np.exp(mean) == pytest.approx(known.pick(known.loss, choices).sum(1))
    assert (spread > 0.3).all()


def learned(model, factor):
    """Correlation of what was learned of layers with the truth."""
    return np.corrcoef(np.log(model.cost[:, 2] / model.layers.loss[:, 2]), np.log(factor))[0, 1]


def test_kinds_and_depths_are_learned_from_trials_alone():
    known, rng = layers(), np.random.default_rng(2)
    true, factor = off_by_kind_and_depth(known)
    choices, fresh = drawn(rng, 80), drawn(rng, 200)
    model = QualityModel(known, choices, known.pick(true, choices).sum(1))
    exact = np.log(known.pick(true, fresh).sum(1))
    error = np.std(model.predict(fresh)[0] - exact)
    assert error < 0.4 * np.std(no_trials(known).predict(fresh)[0] - exact)
    assert learned(model, factor) > 0.8


def test_kinds_and_depths_are_learned_from_slopes_alone():
    known, rng = layers(), np.random.default_rng(3)
    true, factor = off_by_kind_and_depth(known)
    slopes = []
    for choices in drawn(rng, 6):
        # Without interactions ½ P is the loss of each layer; measured ones are rough.
        table = 2 * np.sqrt(true * known.pick(true, choices)[:, None]) * rng.lognormal(0, 0.2, (N, 1))
        slopes.append(Slopes(choices, float(known.pick(true, choices).sum()), table))
    assert learned(no_trials(known, slopes), factor) > 0.95


@pytest.mark.parametrize("broken", [np.inf, 1e6, 1e-9])
def test_a_broken_trial_does_not_bend_it(broken):
    known, rng = layers(), np.random.default_rng(5)
    true, _ = off_by_kind_and_depth(known)
    choices, fresh = drawn(rng, 40), drawn(rng, 200)
    losses = known.pick(true, choices).sum(1)
    exact = np.log(known.pick(true, fresh).sum(1))
    clean, worst = QualityModel(known, choices, losses), losses.copy()
    worst[17] = broken
    bent = QualityModel(known, choices, worst)
    (mean, spread), (other, wider) = clean.predict(fresh), bent.predict(fresh)
    assert np.std(other - exact) < 1.5 * np.std(mean - exact) + 0.02
    assert abs(np.mean(other - exact)) < 0.15
    assert np.median(wider) < 4 * np.median(spread)


def test_what_loses_nothing_is_no_infinite_evidence():
    """A choice that keeps a layer as it is has a loss of 0, and so does an assignment of such choices."""
    rng = np.random.default_rng(6)
    loss = layers().loss.copy()
    loss[:, -1] = 0.0
    known = Layers(NAMES, loss)
    choices = drawn(rng, 30)
    losses = 1.5 * known.pick(loss, choices).sum(1) ** 1.3
    keep = np.full((1, N), WIDTH - 1)
    nothing = Slopes(keep[0], 0.0, np.zeros((N, WIDTH)))
    told = losses > 0
    alone = QualityModel(known, choices[told], losses[told])
    model = QualityModel(
        known, np.concatenate([choices[told], keep]), np.append(losses[told], 1e-7), interactions_of(known, [nothing])
    )
    fresh = drawn(rng, 100)
    fresh = fresh[known.pick(loss, fresh).sum(1) > 0]
    assert np.isfinite(model.predict(keep)[0]).all()
    assert model.predict(fresh)[0] == pytest.approx(alone.predict(fresh)[0], abs=0.25)


def test_it_is_surer_with_every_trial_and_repeats_what_it_was_told(Coherent):
    known, rng = layers(), np.random.default_rng(7)
    truth = Coherent(known.loss, 7)
    choices, fresh = drawn(rng, 120), drawn(rng, 100)
    losses = truth.of(choices)
    spreads = []
    for count in (0, 5, 120):
        model = QualityModel(known, choices[:count], losses[:count])
        spreads.append(float(np.median(model.predict(fresh)[1])))
    assert spreads == sorted(spreads, reverse=True)
    residual = np.abs(model.predict(choices)[0] - np.log(losses))
    parametric = np.abs(model._parametric(choices)[0] - np.log(losses))
    assert np.median(residual) < 0.5 * np.median(parametric)
    mean, spread = model.predict(fresh)
    within = np.abs(mean - np.log(truth.of(fresh))) < 2 * spread
    assert within.mean() > 0.8


def test_names_without_a_number_leave_depth_to_the_others():
    known = Layers((*NAMES, "lm_head", "embed"), np.ones((N + 2, 2)))
    alone = Layers(NAMES, np.ones((N, 2)))
    assert known.basis[:N] == pytest.approx(alone.basis)
    assert not known.basis[N:].any()
    assert alone.basis.shape[1] == len(KINDS) + 4


def test_draws_spread_as_the_posterior_does():
    known, rng = layers(), np.random.default_rng(8)
    true, _ = off_by_kind_and_depth(known)
    choices = drawn(rng, 30)
    model = QualityModel(known, choices, known.pick(true, choices).sum(1))
    drawn_logs = np.log([model.sample(rng)[:, 2] for _ in range(300)])
    early = np.log([no_trials(known).sample(rng)[:, 2] for _ in range(300)])
    assert drawn_logs.std(0).mean() < early.std(0).mean()
    assert np.abs(drawn_logs.mean(0) - np.log(model.cost[:, 2])).max() < 0.12
