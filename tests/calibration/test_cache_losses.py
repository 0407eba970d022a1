"""Predicted losses and slopes of KV caches, against gradients taken by hand and against what is measured."""

from __future__ import annotations

import functools

import pytest
import torch

from autoq.calibration import caches, slopes
from autoq.calibration.curvature import go_back
from autoq.chunks import mean_loss
from autoq.kv_cache import BITS
from autoq.models.caches import dequantized, read, read_keys
from autoq.models.loading import load
from autoq.objectives.kl_nats_per_token import KLNatsPerToken
from autoq.reference import make_reference
from autoq.spec import ModelSpec

CHOICES = [read(bits) for bits in sorted(BITS)] + [None]


def windows(count: int, tokens: int) -> torch.Tensor:
    return torch.randint(4, 260, (count, tokens), generator=torch.Generator().manual_seed(5))


@pytest.fixture(params=["llama", "gpt2", "gpt-oss"])
def model(request, tiny_model_dir):
    return load(ModelSpec(id=str(tiny_model_dir(request.param)), dtype="float32"))


def test_losses_are_squared_gradients_times_squared_errors(model):
    """Of what queries read as codes: keys of whole groups, all values."""
    data = windows(1, 56)
    names = [cache.name for cache in model.info.caches]
    found = caches.losses(model, data, 7, dict.fromkeys(names, CHOICES))
    leaves = {}

    def leaf(name, keys, values):
        leaves[name] = tuple(x.detach().clone().requires_grad_() for x in (keys, values))
        # What was read keeps its way back to earlier blocks.
        return tuple(own + (x - x.detach()) for own, x in zip(leaves[name], (keys, values), strict=True))

    model.swap({}, caches={name: functools.partial(leaf, name) for name in names})
    with torch.enable_grad():
        parameters = list(model.model.parameters())
        for parameter in parameters:
            parameter.requires_grad_()
        go_back(model.outputs(data), model.info.task, torch.Generator().manual_seed(7))
    model.restore()
    for name in names:
        keys, values = leaves[name]
        for i, bits in enumerate(sorted(BITS)):
            with torch.no_grad():
                moved = [(keys.grad, read_keys(keys, bits) - keys), (values.grad, dequantized(values, bits) - values)]
                expected = sum(float((g * d).square().sum()) for g, d in moved) / 2 / 56
            assert found[name][i] == pytest.approx(expected, rel=1e-3)
        # A key that is read only before its group is whole is never read as a code.
        assert float(keys.grad[:, :, 32:].abs().max()) == 0 < float(keys.grad[:, :, :32].abs().max())
        assert found[name][-1] == 0.0
        assert found[name][:-1] == sorted(found[name][:-1], reverse=True)


def test_nothing_is_left_on_the_model_and_a_seed_gives_the_same(model):
    data = windows(2, 40)
    names = [cache.name for cache in model.info.caches]
    first = caches.losses(model, data, 1, dict.fromkeys(names, CHOICES))
    assert caches.losses(model, data, 1, dict.fromkeys(names, CHOICES)) == first
    assert caches.losses(model, data, 2, dict.fromkeys(names, CHOICES)) != first
    assert not any(hasattr(module, "autoq_cache") for module in model.model.modules())


def test_losses_predict_the_divergence_that_is_measured(trained_model_dir):
    model = load(ModelSpec(id=str(trained_model_dir("llama")), dtype="float32"))
    data = windows(24, 64)
    names = [cache.name for cache in model.info.caches]
    found = caches.losses(model, data, 0, {name: [read(4), read(2)] for name in names})
    with torch.inference_mode():
        reference = make_reference(model, data, 10**9)
    for name in names:
        for i, bits in enumerate((4, 2)):
            model.swap({}, caches={name: read(bits)})
            with torch.inference_mode():
                measured = float(mean_loss(model, KLNatsPerToken(), reference, 0, data, model.outputs(data)))
            model.restore()
            assert found[name][i] == pytest.approx(measured, rel=0.6)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without experts, whose choice has no derivative
@pytest.mark.parametrize("current", [None, 2])
def test_slopes_are_derivatives_of_the_loss(family, current, tiny_model_dir):
    """Towards a choice, by central differences; keys and values of the last block: nothing is rounded behind them."""
    model = load(ModelSpec(id=str(tiny_model_dir(family)), dtype="float32"))
    ids = windows(2, 48)
    with torch.inference_mode():
        reference = make_reference(model, (ids + 1) % 256, 10**9)  # of another text, so that there is a slope
    loss = functools.partial(mean_loss, model, KLNatsPerToken(), reference, 0, ids)
    name = model.info.caches[-1].name
    here = None if current is None else read(current)
    watched = caches.slopes(CHOICES, here)

    def between(keys, values, choice, step):
        at = (keys, values) if here is None else here(keys, values)
        to = choice(keys, values)
        return tuple(a + step * (t - x) for a, t, x in zip(at, to, (keys, values), strict=True))

    model.swap({}, caches={name: watched})
    try:
        value, table = slopes.gather(model, ids, loss, [], lambda _: [])
    finally:
        model.restore()
    assert table == {}
    assert watched.sums[-1] == 0.0
    for choice, slope in zip(CHOICES[:1], watched.sums, strict=False):
        ends = []
        for step in (0.05, -0.05):
            model.swap({}, caches={name: functools.partial(between, choice=choice, step=step)})
            with torch.no_grad():
                ends.append(float(loss(model.outputs(ids))))
            model.restore()
        exact = (ends[0] - ends[1]) / 0.1
        assert abs(exact) > 1e-5 * value
        assert slope == pytest.approx(exact, rel=0.1, abs=2e-6)
