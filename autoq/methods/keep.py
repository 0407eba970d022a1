"""No quantization: the weight ships as it is in the model, in the model's own dtype.

The method of the scheme `keep`; it lets sizes, frontiers and exports treat an untouched layer like any
other. The tensor is shared with the model where it is contiguous, since neither side writes to it.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from autoq.methods import Grid, QuantizedWeight, Statistics
from autoq.methods._ruled import RuledMethod
from autoq.methods._weights import KeptWeight
from autoq.scheme import Keep, Scheme


class KeepAsIs(RuledMethod):
    """The weight itself."""

    def rule(self, scheme: Scheme, shape: tuple[int, int]) -> str | None:
        return None if isinstance(scheme, Keep) else "keep knows only the scheme keep"

    def make(self, weight: Tensor, scheme: Scheme, statistics: Statistics | None) -> QuantizedWeight:
        return KeptWeight(scheme, (weight.shape[0], weight.shape[1]), {"weight": weight})

    def schemes(self, name: str, grid: Grid) -> Iterable[Scheme]:
        yield Keep()
