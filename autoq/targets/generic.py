"""any runtime: every scheme of every method, judged by size and quality alone; times nothing.

For a deployment that AutoQ does not know, or for asking what a number format is worth before a kernel
for it exists. Weights are evaluated dequantized, so what is refused is only what cannot be evaluated:
groups that do not divide a row, and activation precisions, which belong to some runtime's kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from autoq import plugins
from autoq.layer import Layer
from autoq.scheme import MAX_BITS, MIN_BITS, Integer, Keep, PerChannel, PerGroup, Scheme, ZeroPoint
from autoq.targets import Target

if TYPE_CHECKING:
    from autoq.methods import Grid

_GROUP_SIZES = (64, 32, 128)  # the first is the one that baselines prefer


class Generic(Target):
    """No runtime in particular."""

    def grid(self) -> Grid:
        """Every axis that this target runs, for every installed method."""
        from autoq.methods import Grid

        return Grid(
            methods=plugins.names("methods"),
            bits=tuple(range(MIN_BITS, MAX_BITS + 1)),
            granularities=(*(PerGroup(size) for size in sorted(_GROUP_SIZES)), PerChannel()),
            zero_points=("integer", "none", "real"),
        )

    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        """See `Target.refuses`."""
        if isinstance(scheme, Keep):
            return None
        granularity = scheme.granularity
        if isinstance(granularity, PerGroup) and layer.in_features % granularity.size:
            return (
                f"group size {granularity.size} does not divide the {layer.in_features} inputs of shape "
                f"({layer.out_features}, {layer.in_features})"
            )
        if isinstance(scheme, Integer) and scheme.activation is not None:
            return f"{scheme.activation} needs a kernel that quantizes activations, and no runtime is named"
        return None

    def baselines(self) -> Mapping[str, Sequence[Scheme]]:
        """See `Target.baselines`."""

        def integers(method: str, bits: int) -> list[Scheme]:
            zero: ZeroPoint = "real" if method == "hqq" else "integer"
            grouped = [Integer(method, bits, PerGroup(size), zero) for size in _GROUP_SIZES]
            return [*grouped, Integer(method, bits, PerChannel(), zero)]

        return {
            "unquantized": [Keep()],
            "uniform-int8": [Integer("rtn", 8, PerChannel(), "none")],
            **{f"uniform-int{bits}": integers("rtn", bits) for bits in (6, 5, 4, 3, 2)},
            **{f"uniform-int{bits}-hqq": integers("hqq", bits) for bits in (4, 3, 2)},
        }
