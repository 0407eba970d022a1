"""Slopes against what they claim: derivatives of the loss towards every choice, at the weights that are swapped in."""

import functools

import pytest
import torch

from autoq.calibration.slopes import gather
from autoq.chunks import mean_loss
from autoq.models.loading import load
from autoq.objectives.cosine_distance import CosineDistance
from autoq.objectives.kl_nats_per_token import KLNatsPerToken
from autoq.reference import make_reference
from autoq.spec import ModelSpec

IDS = torch.arange(32).view(2, 16) * 5 % 255 + 4  # (windows, tokens)
CHOICES = 3


class Setting:
    """A tiny model in float32 whose layers have random neighbours for choices; the first ones are swapped in."""

    def __init__(self, folder, size):
        self.model = load(ModelSpec(id=str(folder), dtype="float32"))
        self.layers = self.model.info.layers
        with torch.inference_mode():
            reference = make_reference(self.model, IDS, 10**9)
        kind = CosineDistance if self.model.info.task == "encoder" else KLNatsPerToken
        self.loss = functools.partial(mean_loss, self.model, kind(), reference, 0, IDS)
        generator = torch.Generator().manual_seed(0)
        self.weights = {}
        for layer in self.layers:
            original = self.model.weight(layer.name)
            noise = torch.randn(CHOICES, *original.shape, generator=generator)
            self.weights[layer.name] = list(original + size * original.std() * noise)

    def at(self, changes=None):
        """The loss at the first choices, with some weights changed."""
        self.model.swap({name: w[0] for name, w in self.weights.items()} | (changes or {}))
        try:
            with torch.no_grad():
                return float(self.loss(self.model.outputs(IDS)))
        finally:
            self.model.restore()

    def slopes(self):
        self.model.swap({name: w[0] for name, w in self.weights.items()})
        try:
            return gather(self.model, IDS, self.loss, self.layers, lambda layer: self.weights[layer.name])
        finally:
            self.model.restore()


@pytest.fixture
def setting(tiny_model_dir):
    return lambda family, size=1.0: Setting(tiny_model_dir(family), size)


# Linears; Conv1D, which stores its transpose; a weight that is embedding and head; no head at all; tables of
# positions that are given something else than the rows they look up; layers that run in several places.
@pytest.mark.parametrize("family", ["llama", "gpt2", "llama-tied", "bert", "opt", "albert"])
def test_slopes_are_derivatives_of_the_loss(setting, family):
    """Towards a choice, by central differences; the quantized weights are far away, so that rounding is small."""
    found = setting(family)
    value, table = found.slopes()
    assert value == pytest.approx(found.at(), rel=1e-5)
    assert set(table) == {layer.name for layer in found.layers}
    checked = {}
    for layer in found.layers:
        original = found.model.weight(layer.name)
        step = 0.02 * (found.weights[layer.name][2] - original)
        here = found.weights[layer.name][0]
        rise = found.at({layer.name: here + step}) - found.at({layer.name: here - step})
        checked[layer.name] = (table[layer.name][2], rise / 0.04)
    largest = max(abs(exact) for _, exact in checked.values())
    assert largest > 1e-3 * value
    for own, exact in checked.values():
        assert own == pytest.approx(exact, rel=0.06, abs=0.03 * largest + 2e-6)


@pytest.mark.parametrize("family", ["llama", "llama-tied", "bert"])
def test_half_of_what_layers_answer_for_is_the_loss_where_perturbations_are_small(setting, family):
    """Euler's theorem: a distance begins quadratically, so its derivative along the perturbation is twice itself."""
    value, table = setting(family, size=0.05).slopes()
    assert 0.5 * sum(own[0] for own in table.values()) == pytest.approx(value, rel=0.05)


def test_a_layer_that_the_loss_does_not_depend_on_has_slopes_of_zero(setting):
    found = setting("llama")
    found.loss = lambda outputs: found.model.model.model.embed_tokens.weight.sum() * 0 + outputs.sum() * 0
    last = found.layers[-1].name
    _, table = found.slopes()
    assert table[last] == [0.0] * CHOICES

    class Silent:
        """An expert that no token comes to: none of its modules runs."""

        def __getattr__(self, name):
            return getattr(found.model, name)

        def modules_of(self, layer):
            return [] if layer.name == last else found.model.modules_of(layer)

    _, table = gather(Silent(), IDS, found.loss, found.layers, lambda layer: found.weights[layer.name])
    assert table[last] == [0.0] * CHOICES


def test_nothing_is_left_on_the_model(setting):
    found = setting("llama")

    def broken(outputs):
        raise ValueError("no loss")

    with pytest.raises(ValueError, match="no loss"):
        gather(found.model, IDS, broken, found.layers, lambda layer: found.weights[layer.name])
    assert not any(module._forward_hooks for module in found.model.model.modules())
