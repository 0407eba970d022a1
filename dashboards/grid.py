"""Layers as a grid: blocks down, modules across, and what stands outside the blocks in rows of its own.

A layer's row is the numbered list that it is in (`model.layers.3`) and its column is the rest of its name, with the
numbers within it as `*`: all experts of a block are one cell. Other layers that would share a cell keep their numbers.
Stacks of one model (encoder, decoder) have rows of their own. Shapes say which block a layer is in; without them its
name does.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from . import drawing, palette

if TYPE_CHECKING:
    from autoq.layer import Layer

OUTSIDE = "outside the blocks"
_ROW_HEIGHT, _FEWEST_ROWS = 19, 5
MOST_TEXT = 3000  # cells above which they hold no text


@dataclass
class Spot:
    """One cell: its row and column, and the names of the layers in it, in the model's order."""

    row: str
    column: str
    block: int | None
    path: str = ""  # of all layers in it, with * for the numbers that tell them apart
    names: list[str] = field(default_factory=list)

    @property
    def label(self) -> str:
        """The layer's name, or how many of them there are and what they are called."""
        if len(self.names) == 1:
            return self.names[0]
        return f"{len(self.names)} × {self.path}"


@dataclass(frozen=True)
class Grid:
    """Rows from top to bottom, columns from left to right, and the cells that are there, row by row."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    spots: tuple[Spot, ...]

    @classmethod
    def of(cls, names: Iterable[str], layers: Mapping[str, Layer]) -> Grid:
        """The grid of layers, in the order of the model where that is known."""
        order = {name: place for place, name in enumerate(layers)}
        listed = sorted(names, key=lambda name: (order.get(name, len(order)), _natural(name)))
        placed = _apart({name: _place(name, layers.get(name)) for name in listed}, layers)
        stacks = list(dict.fromkeys(stack for stack, block, _ in placed.values() if block is not None))
        short = _short(stacks)
        spots: dict[tuple[str, str], Spot] = {}
        for name, (stack, block, module) in placed.items():
            row = name if block is None else f"{short[stack]}{block}"
            spots.setdefault((row, module), Spot(row, module, block, f"{stack}.{block}.{module}")).names.append(name)
        inner = [spot for spot in spots.values() if spot.block is not None]
        inner.sort(key=lambda spot: (stacks.index(placed[spot.names[0]][0]), spot.block or 0))
        before, after = _outer([spot for spot in spots.values() if spot.block is None])
        rows = tuple(dict.fromkeys(spot.row for spot in [*before, *inner, *after]))
        columns = list(dict.fromkeys(module for _, block, module in placed.values() if block is not None))
        columns += [OUTSIDE] if before or after else []
        across = {column: place for place, column in enumerate(columns)}
        down = {row: place for place, row in enumerate(rows)}
        ordered = sorted(spots.values(), key=lambda spot: (down[spot.row], across[spot.column]))
        return cls(rows, tuple(columns), tuple(ordered))

    def heatmap(
        self,
        values: Mapping[int, float],
        text: Mapping[int, str],
        hover: Mapping[int, str],
        colors: Mapping[int, str],
        **more: Any,
    ) -> dict[str, Any]:
        """A trace of the cells with a value, by their place in `spots`. `colors` are what the values come out as: text
        is black or white by them."""
        places = {row: index for index, row in enumerate(self.rows)}, {c: index for index, c in enumerate(self.columns)}
        shape = len(self.rows), len(self.columns)
        z: list[list[float | None]] = [[None] * shape[1] for _ in range(shape[0])]
        texts, hovers = ([[""] * shape[1] for _ in range(shape[0])] for _ in range(2))
        for index, spot in enumerate(self.spots):
            if index in values:
                i, j = places[0][spot.row], places[1][spot.column]
                z[i][j] = values[index]
                texts[i][j] = f'<span style="color:{palette.ink_on(colors[index])}">{text[index]}</span>'
                hovers[i][j] = hover[index]
        written = len(self.spots) <= MOST_TEXT
        return {
            "type": "heatmap",
            "x": [_broken(column) for column in drawing.distinct(self.columns)],
            "y": drawing.distinct(self.rows),
            "z": z,
            **({"text": texts, "texttemplate": "%{text}", "textfont": {"size": 11}} if written else {}),
            "hovertext": hovers,
            "hovertemplate": "%{hovertext}<extra></extra>",
            "hoverongaps": False,
            "xgap": 2,
            "ygap": 2,
            **more,
        }

    def layout(self, **more: Any) -> dict[str, Any]:
        """Axes and height for a heatmap of this grid."""
        bare = {"showgrid": False, "zeroline": False, "showline": False, "ticks": "", "type": "category"}
        # Names of modules are long: they stand above the columns, turned where there are many.
        return {
            "xaxis": {**bare, "side": "top", "tickangle": 0 if len(self.columns) <= 8 else -40},
            "yaxis": {**bare, "autorange": "reversed", "title": {"text": "block"}},
            "height": max(len(self.rows), _FEWEST_ROWS) * _ROW_HEIGHT + 110,
            "margin": {"t": 64, "b": 16},
            **more,
        }


def steps(
    values: Mapping[int, int], names: Sequence[str], shades: Sequence[str]
) -> tuple[dict[str, Any], dict[int, str]]:
    """A colour scale of as many steps as there are names, for values 0, 1, …; and the colour of each value."""
    scale: list[list[float | str]] = []
    for place, shade in enumerate(shades):
        scale += [[place / len(names), shade], [(place + 1) / len(names), shade]]
    ticks = {"tickvals": list(range(len(names))), "ticktext": list(names)}
    made = {"colorscale": scale, "zmin": -0.5, "zmax": len(names) - 0.5, "colorbar": ticks}
    return made, {index: shades[value] for index, value in values.items()}


def _place(name: str, layer: Layer | None) -> tuple[str, int | None, str]:
    """Stack, block and module of a layer; its own name and no block for what is outside."""
    if layer is None or layer.block is not None:
        for number in re.finditer(r"(?<=\.)\d+(?=\.)", name):
            if layer is None or int(number[0]) == layer.block:
                module = re.sub(r"(?<=\.)\d+(?=\.)", "*", name[number.end() :])
                return name[: number.start() - 1], int(number[0]), module[1:]
    return name, None, OUTSIDE


Place = tuple[str, int | None, str]


def _apart(placed: Mapping[str, Place], layers: Mapping[str, Layer]) -> dict[str, Place]:
    """Only experts share a cell: other layers that a number alone tells apart keep it in their module's name."""
    shared: dict[Place, list[str]] = {}
    for name, place in placed.items():
        shared.setdefault(place, []).append(name)
    numbered = {
        (stack, module)
        for (stack, block, module), names in shared.items()
        if block is not None and len(names) > 1 and not all(_is_expert(name, layers.get(name)) for name in names)
    }
    return {
        name: (stack, block, name.removeprefix(f"{stack}.{block}.") if (stack, module) in numbered else module)
        for name, (stack, block, module) in placed.items()
    }


def _is_expert(name: str, layer: Layer | None) -> bool:
    return layer.stack is not None if layer is not None else ".experts." in name


def _broken(module: str) -> str:
    """A module's name as a header, in two lines."""
    if module == OUTSIDE:
        return "outside the<br>blocks"
    head, dot, tail = module.rpartition(".")
    return f"{head}{dot}<br>{tail}" if head else tail


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _short(stacks: list[str]) -> dict[str, str]:
    """What a stack's rows begin with: nothing where there is one, else the part of its name that tells it apart."""
    if len(stacks) < 2:
        return dict.fromkeys(stacks, "")
    parts = {stack: stack.split(".") for stack in stacks}
    for place in range(max(map(len, parts.values()))):
        found = {stack: (own[place] if place < len(own) else stack) for stack, own in parts.items()}
        if len(set(found.values())) == len(stacks):
            return {stack: f"{text} " for stack, text in found.items()}
    return {stack: f"{stack} " for stack in stacks}


def _outer(spots: list[Spot]) -> tuple[list[Spot], list[Spot]]:
    """What stands outside the blocks: embeddings before them, all else after."""
    first = {"wte", "wpe", "shared"}
    before = [spot for spot in spots if "emb" in spot.row.lower() or spot.row.rpartition(".")[2] in first]
    return before, [spot for spot in spots if spot not in before]
