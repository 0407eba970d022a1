"""any runtime: every scheme of every method, judged by size and quality alone; times nothing.

For a deployment that AutoQ does not know, or for asking what a number format is worth before a kernel
for it exists. Weights are evaluated dequantized, so what is refused is only what cannot be evaluated:
groups that do not divide a row, and activation precisions, which belong to some runtime's kernel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from autoq.kv_cache import Cache, KeyValue
from autoq.layer import Layer
from autoq.scheme import Float, Gguf, Integer, Keep, PerChannel, PerGroup, Scheme, ZeroPoint
from autoq.targets import Target

if TYPE_CHECKING:
    from autoq.methods import Grid

_GROUP_SIZES = (64, 32, 128)  # the first is the one that baselines prefer


class Generic(Target):
    """No runtime in particular."""

    reads_images = True

    def grid(self) -> Grid:
        """The usual integer formats. Other methods, widths and groups are there for who names them."""
        from autoq.methods import Grid

        return Grid(
            methods=("hqq", "keep", "rtn"),
            bits=(2, 3, 4, 5, 6, 8),
            granularities=(PerGroup(64), PerChannel()),
            zero_points=("integer",),
        )

    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        """See `Target.refuses`."""
        if isinstance(scheme, Keep):
            return None
        if isinstance(scheme, Gguf):
            return "a GGUF type belongs to the target llama-cpp"
        granularity = scheme.granularity  # None for pruned weights that stay as they are otherwise
        if isinstance(granularity, PerGroup) and layer.in_features % granularity.size:
            return (
                f"group size {granularity.size} does not divide the {layer.in_features} inputs of shape "
                f"({layer.out_features}, {layer.in_features})"
            )
        if isinstance(scheme, Integer | Float) and scheme.activation is not None:
            return f"{scheme.activation} needs a kernel that quantizes activations, and no runtime is named"
        return None

    def refuses_cache(self, cache: Cache, scheme: KeyValue) -> str | None:
        """See `Target.refuses_cache`: any can be evaluated."""
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
