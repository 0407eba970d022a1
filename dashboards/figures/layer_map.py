"""Blocks × modules of one trial: how many bits each layer has, or which scheme.

Every cell says its bits in words too. Experts of a block are one cell: with one scheme its bits, with several their
range. Tied weights, pruned ones and quantized activations are marked. A KV cache that is quantized is the cell of
its attention module.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

from autoq.display import numbers
from autoq.kv_cache import KeyValue
from autoq.layer import Layer
from autoq.scheme import Scheme, Sparse, code_bits, kernel_activation

from .. import drawing, palette
from ..grid import Grid, Spot, steps
from ..picks import default_trial
from . import Cell, Column, Facts, Figure, Table
from .options import Choice, Option, TrialName

OPTIONS: Mapping[str, Option] = {"trial": TrialName(), "by": Choice(("bits", "scheme"))}
_COLUMNS = (
    Column("layer"), Column("block"), Column("module"), Column("layers"), Column("scheme"), Column("code", "bits"),
    Column("size", "bytes"), Column("stored", "bits/weight"), Column("marks"),
)  # fmt: skip
TIED, TRAINED, CACHE = "⚭", "✦", "kv"


def build(facts: Facts, trial: int | None = None, by: str = "bits") -> Figure:
    """The map of a trial; unless told otherwise of the knee of the frontier."""
    trial = default_trial(facts) if trial is None else trial
    if trial is None:
        message = "no feasible trial is complete yet"
        return Figure(
            drawing.empty(message), Table(_COLUMNS, ()), f"{facts.study.name}: layers", drawing.sentence([message])
        )
    record = facts.trial(trial)
    assignment = record.assignment
    assert assignment is not None
    layers = facts.layers
    schemes: dict[str, Scheme | KeyValue] = {**assignment, **assignment.caches}
    grid = Grid.of(schemes, layers)
    label = facts.trials.label(trial)
    title = f"{facts.study.name}: layers of {label}"
    cells = [_Cell(spot, schemes, layers, assignment.trained) for spot in grid.spots]
    rows: list[tuple[Cell, ...]] = [cell.row() for cell in cells]
    values, names, shades = _by_bits(cells) if by == "bits" else _by_scheme(cells)
    scale, colors = steps(values, names, shades)
    scale["colorbar"] |= {"title": {"text": "bits per code" if by == "bits" else "scheme", "side": "right"}}
    texts = {i: cell.text if by == "bits" else cell.scheme_text for i, cell in enumerate(cells)}
    hovers = {i: cell.hover for i, cell in enumerate(cells)}
    trace = grid.heatmap(values, texts, hovers, colors, **scale)
    layout = grid.layout(meta={"trial": trial, "by": by})
    return Figure({"data": [trace], "layout": layout}, Table(_COLUMNS, tuple(rows)), title, _note(cells, by))


class _Cell:
    """What is said of one cell of the grid."""

    def __init__(
        self,
        spot: Spot,
        schemes: Mapping[str, Scheme | KeyValue],
        layers: Mapping[str, Layer],
        trained: Mapping[str, str],
    ) -> None:
        self.spot = spot
        self.schemes = Counter(str(schemes[name]) for name in spot.names)
        own = [scheme for name in spot.names if not isinstance(scheme := schemes[name], KeyValue)]
        cached = [scheme for name in spot.names if isinstance(scheme := schemes[name], KeyValue)]
        self.is_cache = bool(cached)
        known = [layers[name] for name in spot.names if name in layers]
        dtype_bits = 8 * known[0].dtype_bytes if known else 16
        self.bits = [*(code_bits(scheme, dtype_bits) for scheme in own), *(scheme.bits for scheme in cached)]
        self.nbytes = None
        self.stored = None
        if len(known) == len(own) == len(spot.names):
            self.nbytes = sum(layer.nbytes(scheme) for layer, scheme in zip(known, own, strict=True))
            self.stored = 8 * self.nbytes / sum(layer.parameters for layer in known)
        self.tied = tuple(name for layer in known for name in layer.tied)
        self.marks = [CACHE] if cached else []
        if any(kernel_activation(scheme) is not None for scheme in own):
            self.marks.append("a8")
        patterns = sorted({str(scheme.pattern) for scheme in own if isinstance(scheme, Sparse)})
        self.marks += [f"{p[0]}:{p[1]}" if p == "24" else f"−{p}%" for p in patterns]
        self.marks += [TIED] if self.tied else []
        self.marks += [TRAINED] if any(name in trained for name in spot.names) else []

    @property
    def mean_bits(self) -> float:
        return sum(self.bits) / len(self.bits)

    @property
    def text(self) -> str:
        low, high = min(self.bits), max(self.bits)
        return " ".join([str(low) if low == high else f"{low}–{high}", *self.marks])

    @property
    def scheme_text(self) -> str:
        first, _ = self.schemes.most_common(1)[0]
        shown = first if len(self.schemes) == 1 else f"{first} +{len(self.schemes) - 1}"
        marks = [mark for mark in self.marks if mark in (TIED, TRAINED)]
        return " ".join([drawing.safe(shown, 26), *marks])

    @property
    def hover(self) -> str:
        lines = [drawing.safe(self.spot.label, 80)]
        lines += [
            f"{scheme}" + (f" × {n}" if len(self.spot.names) > 1 else "") for scheme, n in self.schemes.most_common(4)
        ]
        if self.nbytes is not None and self.stored is not None:
            lines.append(f"{numbers.size(self.nbytes)}, {self.stored:.3g} bits per weight with scales")
        if self.tied:
            lines.append(f"{TIED} the same weight as {drawing.safe(', '.join(self.tied), 80)}")
        return "<br>".join(lines)

    def row(self) -> tuple[Cell, ...]:
        schemes = ", ".join(f"{n} × {s}" if len(self.schemes) > 1 else s for s, n in self.schemes.most_common())
        low, high = min(self.bits), max(self.bits)
        bits: Cell = low if low == high else f"{low} to {high}"
        spot = self.spot
        module = spot.column if spot.block is not None else None
        marks = " ".join(self.marks) or None
        return (spot.label, spot.block, module, len(spot.names), schemes, bits, self.nbytes, self.stored, marks)


def _by_bits(cells: Sequence[_Cell]) -> tuple[dict[int, int], list[str], list[str]]:
    """A step for every width that occurs; a cell of several takes the one nearest to its mean."""
    levels = sorted({bits for cell in cells for bits in cell.bits})
    values = {
        i: min(range(len(levels)), key=lambda place: abs(levels[place] - cell.mean_bits))
        for i, cell in enumerate(cells)
    }
    # A width has the same colour in every map: by its logarithm, from 2 to 16 bits.
    return values, [f"{level}" for level in levels], [palette.at(min(max(math.log2(b) - 1, 0) / 3, 1)) for b in levels]


def _by_scheme(cells: Sequence[_Cell]) -> tuple[dict[int, int], list[str], list[str]]:
    """A step for every scheme that occurs, by rising bits."""
    width = {scheme: min(cell.bits) for cell in cells for scheme in cell.schemes}
    levels = sorted(width, key=lambda scheme: (width[scheme], scheme))
    values = {i: levels.index(cell.schemes.most_common(1)[0][0]) for i, cell in enumerate(cells)}
    return values, [drawing.safe(level, 26) for level in levels], palette.spread(len(levels))


def _note(cells: Sequence[_Cell], by: str) -> str:
    parts = ["every cell is a layer's code width in bits" if by == "bits" else "every cell is a layer's scheme"]
    marks = {mark for cell in cells for mark in cell.marks}
    if any(len(cell.spot.names) > 1 for cell in cells):
        parts.append("the experts of a block are one cell")
    if "a8" in marks:
        parts.append("a8: activations in 8 bits too")
    if any(":" in mark or mark.startswith("−") for mark in marks):
        parts.append("2:4 and −n%: pruned")
    if CACHE in marks:
        parts.append(f"{CACHE}: the attention's KV cache, which is no layer")
    if TIED in marks:
        parts.append(f"{TIED} a weight that another module shares")
    if TRAINED in marks:
        parts.append(f"{TRAINED} trained, or quantized in sequence")
    sizes = [cell.nbytes for cell in cells if not cell.is_cache]
    if None not in sizes:
        parts.append(f"the layers take {numbers.size(sum(size for size in sizes if size is not None))} together")
    return drawing.sentence(parts)
