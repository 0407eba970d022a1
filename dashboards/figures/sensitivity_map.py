"""Blocks × modules: what each layer is predicted to lose under one scheme while all others stay as they are."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from autoq.display.sensitivity import module_kind

from .. import drawing, palette
from ..grid import Grid
from ..losses import lightest, loss_unit
from . import Cell, Column, Facts, Figure, Table
from .options import Option, SchemeName

OPTIONS: Mapping[str, Option] = {"scheme": SchemeName()}


def build(facts: Facts, scheme: str | None = None) -> Figure:
    """The map under a scheme; unless told otherwise under the lightest one that most layers have."""
    losses = facts.sensitivity
    unit = loss_unit(facts)
    columns = (
        *(Column("layer"), Column("block"), Column("module"), Column("layers")),
        *(Column("predicted loss", unit), Column("share of all")),
    )
    title = f"{facts.study.name}: sensitivity"
    if not losses:
        message = "this study has predicted no losses"
        return Figure(drawing.empty(message), Table(columns, ()), title, drawing.sentence([message]))
    scheme = scheme or lightest(facts)
    there = {name: own[scheme] for name, own in losses.items() if scheme in own}
    grid = Grid.of(there, facts.layers)
    # Experts add up, as the losses of layers do.
    sums = [sum(there[name] for name in spot.names) for spot in grid.spots]
    total = sum(sums)
    positive = [value for value in sums if value > 0]
    low = min(positive, default=1.0)
    values = {i: float(np.log10(max(value, low))) for i, value in enumerate(sums)}
    texts = {i: f"{value:.1e}".replace("e-0", "e-").replace("e+0", "e") for i, value in enumerate(sums)}
    shown = f"{unit}, predicted"
    hovers = {
        i: f"{drawing.safe(spot.label, 80)}<br>{drawing.safe(scheme)}<br>{value:.3g} {drawing.safe(shown)}"
        for i, (spot, value) in enumerate(zip(grid.spots, sums, strict=True))
    }
    ends = min(values.values()), max(values.values())
    ticks = drawing.log_ticks(*ends)
    bar = {
        "tickvals": ticks[0],
        "ticktext": ticks[1],
        "title": {"text": f"predicted loss ({drawing.safe(unit)})", "side": "right"},
    }
    span = (ends[1] - ends[0]) or 1.0
    colors = {i: palette.at((value - ends[0]) / span) for i, value in values.items()}
    limits = {"zmin": ends[0], "zmax": ends[0] + span}
    trace = grid.heatmap(values, texts, hovers, colors, colorscale=palette.scale(), colorbar=bar, **limits)
    layout = grid.layout(meta={"scheme": scheme})
    rows: list[tuple[Cell, ...]] = []
    for spot, value in zip(grid.spots, sums, strict=True):
        module = spot.column if spot.block is not None else None
        rows.append((spot.label, spot.block, module, len(spot.names), value, value / total if total else None))
    kinds: dict[str, float] = {}
    for name, value in there.items():
        kinds[module_kind(name)] = kinds.get(module_kind(name), 0.0) + value
    most = max(kinds, key=lambda kind: kinds[kind])
    parts = [f"predicted loss of each layer as {scheme}, in {unit}: predictions, not measurements"]
    if total > 0:
        parts.append(f"{kinds[most] / total:.0%} of all of it is in {drawing.short(most)}")
    picture = {"data": [trace], "layout": layout}
    return Figure(picture, Table(columns, tuple(rows)), f"{title} as {scheme}", drawing.sentence(parts))
