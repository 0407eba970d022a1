"""Which layers go together where scales of inputs are folded, and what their schemes must be. No torch.

Scales of a layer's inputs that are folded into its `Source` meet all that reads the source: layers whose scales are
folded, too, share them; what is kept gets them multiplied into its weight; what is quantized otherwise cannot take
them. A layer that is the source has its rows divided by them, which a scale for each row can take.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from autoq.layer import Layer
from autoq.scheme import Codebook, Float, Integer, Keep, Levels, PerBlock, PerTensor, Scheme


def is_folded(scheme: object) -> bool:
    """Whether the scheme has scales of inputs that are folded."""
    return isinstance(scheme, Integer) and scheme.folded


def readers(layers: Iterable[Layer]) -> dict[str, list[Layer]]:
    """Module -> the layers whose source it is, in the model's order."""
    found: dict[str, list[Layer]] = {}
    for layer in layers:
        if layer.source is not None:
            found.setdefault(layer.source.module, []).append(layer)
    return found


def rows_refuse(scheme: Scheme) -> str | None:
    """Why rows of a layer under `scheme` cannot be over powers of two (one clause), or None."""
    if isinstance(scheme, Keep):
        return None
    if isinstance(scheme, Integer | Float | Levels | Codebook):
        if isinstance(scheme.granularity, PerTensor | PerBlock):
            return f"rows share a scale per {'tensor' if isinstance(scheme.granularity, PerTensor) else 'block'}"
        if not isinstance(scheme, Float) or scheme.form.scale == "bfloat16":
            return None
        return "its scales are 8-bit floats"
    return "it has no scale for each row"


def through_cache(layer: Layer, caches: Iterable[str]) -> str | None:
    """The one of `caches`, names of attention modules whose KV cache is quantized, that keeps the layer's inputs.

    Values over scales would be rounded by other steps.
    """
    if layer.source is None or layer.source.kind != "rows":
        return None
    return next((name for name in caches if layer.source.module.startswith(f"{name}.")), None)


def conflict(layers: Sequence[Layer], schemes: Mapping[str, Scheme], caches: Collection[str] = ()) -> str | None:
    """The first layer of an assignment whose scales cannot be folded (one clause, naming layers and rule), or None.

    `caches` are the KV caches that are quantized.
    """
    by_name = {layer.name: layer for layer in layers}
    for module, own in readers(layers).items():
        folded = [layer for layer in own if is_folded(schemes.get(layer.name, Keep()))]
        if not folded:
            continue
        first, scheme = folded[0], schemes[folded[0].name]
        if (cache := through_cache(first, caches)) is not None:
            return f"{first.name} as {scheme} scales the values of {cache}, whose KV cache is quantized"
        for layer in own:
            other = schemes.get(layer.name, Keep())
            if other != scheme and not isinstance(other, Keep):
                both = f"{first.name} as {scheme} and {layer.name} as {other}"
                return f"{both} read the same inputs, and must share the scales of these"
            if isinstance(other, Keep) and layer.tied:
                return f"{first.name} as {scheme} reads what {layer.name} reads, whose weight is an embedding's"
        if module in by_name and (rule := rows_refuse(schemes.get(module, Keep()))) is not None:
            return f"the scales of {first.name} as {scheme} are folded into {module} as {schemes[module]}: {rule}"
    return None
