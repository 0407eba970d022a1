"""Where two trials differ, and what each difference is predicted to cost; totals against what was measured."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from autoq.display import diff, numbers
from autoq.display.compare import comparable, quality_objective
from autoq.kv_cache import KeyValue, parse_choice
from autoq.scheme import code_bits

from .. import drawing, palette
from ..grid import Grid
from ..losses import KEEP, loss_of, loss_unit
from ..picks import picks
from . import Cell, Column, Facts, Figure, Table
from .options import Choice, Option, TrialName

OPTIONS: Mapping[str, Option] = {"a": TrialName(), "b": TrialName(), "by": Choice(("loss", "bytes"))}


def build(facts: Facts, a: int | None = None, b: int | None = None, by: str = "loss") -> Figure:
    """From trial `a` to trial `b`; unless told otherwise from the smallest to the knee of the frontier."""
    unit = loss_unit(facts)
    columns = (
        *(Column("layer"), Column("block"), Column("module"), Column("layers"), Column("a"), Column("b")),
        *(Column("change", "bytes"), Column("predicted change of loss", unit)),
    )
    chosen = picks(facts)
    a = chosen.get("smallest") if a is None else a
    b = next((n for n in (chosen.get("knee"), chosen.get("best")) if n is not None and n != a), a) if b is None else b
    if a is None or b is None:
        message = "no feasible trial is complete yet"
        return Figure(
            drawing.empty(message), Table(columns, ()), f"{facts.study.name}: difference", drawing.sentence([message])
        )
    title = f"{facts.study.name}: {facts.trials.label(a)} to {facts.trials.label(b)}"
    document = diff.document(facts.study, facts.trial(a), facts.trial(b), facts.layers)
    differing: Mapping[str, Mapping[str, Any]] = document["layers"]
    if not differing:
        message = "the two have the same assignment"
        return Figure(drawing.empty(message), Table(columns, ()), title, drawing.sentence([message]))
    first, second = facts.trial(a).assignment, facts.trial(b).assignment
    assert first is not None
    assert second is not None
    caches = {*first.caches, *second.caches}
    grid = Grid.of({*first, *second, *caches}, facts.layers)
    changes = {i: _Change(facts, spot.names, differing) for i, spot in enumerate(grid.spots)}
    changes = {i: change for i, change in changes.items() if change.names}
    values = {i: change.loss if by == "loss" else change.nbytes for i, change in changes.items()}
    known = {i: float(value) for i, value in values.items() if value is not None}
    # Without a number a cell has the colour of nothing, and still says what changed. A few layers change by much more
    # than all others: the scale is that of cube roots.
    reach = max(map(abs, known.values()), default=0.0) or 1.0
    scaled = {i: float(np.cbrt(known.get(i, 0.0) / reach)) for i in changes}
    ticks = [-1.0, -0.125, 0.0, 0.125, 1.0]
    bar_title = f"predicted change of loss ({drawing.safe(unit)})" if by == "loss" else "change of size"
    bar = {
        "title": {"text": bar_title, "side": "right"},
        "tickvals": [float(np.cbrt(tick)) for tick in ticks],
        "ticktext": [_tick(tick * reach, by) for tick in ticks],
    }
    trace = grid.heatmap(
        scaled,
        {i: change.text for i, change in changes.items()},
        {i: change.hover(grid.spots[i].label, unit) for i, change in changes.items()},
        {i: palette.at((value + 1) / 2, palette.DIVERGING) for i, value in scaled.items()},
        colorscale=palette.scale(palette.DIVERGING),
        zmin=-1,
        zmax=1,
        colorbar=bar,
    )
    rows: list[tuple[Cell, ...]] = []
    for i, change in changes.items():
        spot = grid.spots[i]
        module = spot.column if spot.block is not None else None
        rows.append((spot.label, spot.block, module, len(change.names), change.a, change.b, change.nbytes, change.loss))
    layout = grid.layout(meta={"a": a, "b": b, "by": by})
    note = _note(facts, list(changes.values()), unit, a, b)
    return Figure({"data": [trace], "layout": layout}, Table(columns, tuple(rows)), title, note)


class _Change:
    """What differs in one cell of the grid."""

    def __init__(self, facts: Facts, names: list[str], differing: Mapping[str, Mapping[str, Any]]) -> None:
        self.names = [name for name in names if name in differing]
        entries = [differing[name] for name in self.names]
        self.a, self.b = (_joined([entry[side] for entry in entries]) for side in "ab")
        self.is_cache = not any(name in facts.layers for name in self.names) and any(
            isinstance(parse_choice(_plain(entry[side]) or KEEP), KeyValue) for entry in entries for side in "ab"
        )
        sized = all("bytes_a" in entry and "bytes_b" in entry for entry in entries)
        self.nbytes = sum(entry["bytes_b"] - entry["bytes_a"] for entry in entries) if sized else None
        losses = [
            [loss_of(facts.sensitivity.get(name), _plain(entry[side])) for side in "ab"]
            for name, entry in zip(self.names, entries, strict=True)
        ]
        whole = [(before, after) for before, after in losses if before is not None and after is not None]
        self.loss = sum(after - before for before, after in whole) if len(whole) == len(losses) else None
        dtype_bits = {name: 8 * facts.layers[name].dtype_bytes for name in self.names if name in facts.layers}
        self._bits = [
            tuple(_bits(entry[side], dtype_bits.get(name, 16)) for side in "ab")
            for name, entry in zip(self.names, entries, strict=True)
        ]

    @property
    def text(self) -> str:
        """`4→8`, where only the format changed `4→4`."""
        return "→".join(_range([pair[side] for pair in self._bits]) for side in range(2))

    def hover(self, label: str, unit: str) -> str:
        lines = [drawing.safe(label, 80), f"{drawing.safe(self.a)} → {drawing.safe(self.b)}"]
        if self.nbytes is not None:
            lines.append(signed(self.nbytes, "bytes"))
        if self.loss is not None:
            lines.append(f"{signed(self.loss, unit)} {drawing.safe(unit)}, predicted")
        return "<br>".join(lines)


def signed(value: float, unit: str) -> str:
    """A change with its sign."""
    return ("+" if value > 0 else "") + numbers.number(value, unit)


def _tick(value: float, by: str) -> str:
    if not value:
        return "0"
    return signed(float(f"{value:.2g}"), "bytes") if by == "bytes" else f"{value:+.2g}"


def _plain(text: str | None) -> str:
    return "" if text is None else text.partition("#")[0]


def _bits(text: str | None, dtype_bits: int) -> int | None:
    if text is None:
        return None
    scheme = parse_choice(_plain(text))
    return scheme.bits if isinstance(scheme, KeyValue) else code_bits(scheme, dtype_bits)


def _range(bits: list[int | None]) -> str:
    known = [each for each in bits if each is not None]
    if not known:
        return "–"
    return str(min(known)) if min(known) == max(known) else f"{min(known)}–{max(known)}"


def _joined(texts: list[str | None]) -> str:
    known = list(dict.fromkeys(text or "not there" for text in texts))
    return known[0] if len(known) == 1 else f"{known[0]} and {len(known) - 1} more" if known else ""


def _note(facts: Facts, changes: list[_Change], unit: str, a: int, b: int) -> str:
    count = sum(len(change.names) for change in changes)
    parts = [f"{count} {'layer differs' if count == 1 else 'layers differ'}; cells say code bits before and after"]
    layers = [change for change in changes if not change.is_cache]  # a cache ships no byte
    sizes = [change.nbytes for change in layers if change.nbytes is not None]
    if layers and len(sizes) == len(layers):
        parts.append(f"together {signed(sum(sizes), 'bytes')}")
    losses = [change.loss for change in changes if change.loss is not None]
    if losses:
        some = "" if len(losses) == len(changes) else f" for {len(losses)} of {len(changes)} cells"
        parts.append(f"predicted to change the loss by {signed(sum(losses), unit)} {unit}{some}")
    quality = quality_objective(facts.study.objectives)
    if quality is not None:
        left, right = (record.best_measurements().get(quality.name) for record in facts.records([a, b]))
        if left is not None and right is not None and comparable(left, right):
            change = f"{signed(right.value - left.value, quality.unit)} {quality.unit} in {quality.name}"
            parts.append(f"measured on the {left.part} part: {change}")
    return drawing.sentence(parts)
