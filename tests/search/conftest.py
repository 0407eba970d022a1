"""A loss whose makeup is known: perturbations of layers that share a direction and have others in common."""

import numpy as np
import pytest

from autoq.search.interactions import Slopes


class Coherent:
    """Loss ½ |Σ_l u_l|² where ½ |u_l,c|² is about `loss[l, c]` and pairs of layers count, with either sign."""

    def __init__(self, loss, seed, common=0.5, independent=False):
        """With `independent`, what is rounded to other bits is another error and not a multiple of it."""
        rng = np.random.default_rng(seed)
        layers, width = loss.shape
        shared = rng.normal(size=40) / np.sqrt(40)
        shape = (layers, width if independent else 1, 40)
        mixed = rng.normal(size=shape) / np.sqrt(40) + common * shared * rng.uniform(0, 2, (layers, 1, 1))
        self.u = np.sqrt(2 * loss)[:, :, None] * mixed

    def of(self, choices):
        return np.array([0.5 * (self.u[np.arange(len(self.u)), x].sum(0) ** 2).sum() for x in choices])

    def slopes(self, choices, noise=0.0, rng=None):
        """`noise` is that of the cosines between a choice and the whole, one standard deviation."""
        at = self.u[np.arange(len(self.u)), choices].sum(0)
        table = self.u @ at
        if noise:
            size = np.linalg.norm(self.u, axis=2) * np.linalg.norm(at)
            table = table + noise * size * rng.normal(size=table.shape)
        return Slopes(np.asarray(choices), float(0.5 * at @ at), table)


@pytest.fixture(scope="session", name="Coherent")
def coherent_class():
    """The class `Coherent` of this file."""
    return Coherent
