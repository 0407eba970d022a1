"""Figures, one file each: `build(facts, **options)` gives the picture and the table of the same numbers.

    frontier            any two objectives against each other, a third as colour
    parallel            all objectives at once, as parallel coordinates
    layer_map           blocks × modules of one trial, by bits or by scheme
    diff_map            where two trials differ, and what each difference is predicted to cost
    sensitivity_map     blocks × modules, predicted loss under one scheme
    which_layers_pay    layers of a trial by the loss that their bytes avoid
    hypervolume         how much the frontier dominates, over trials and over time
    predicted_measured  what the sampler foresaw, or a latency table, against what came
    progress            how trials ended, and how fast
    compare             the frontiers of several studies of one model
    savings             the search against uniform baselines

A picture is plain data in Plotly's JSON schema, so it can be sent, drawn by Plotly's JavaScript alone, or made a
`plotly.graph_objects.Figure`. It holds no colour that depends on the background: `Figure.themed` adds those as a
template. A trial's number is in `customdata` of every point; axes name objectives in `layout.meta`.

The folder is the registry: a new file is a new figure. It has `build`, and `OPTIONS`: name -> what it may be.
"""

from __future__ import annotations

import functools
import importlib
import math
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from autoq.display import numbers
from autoq.errors import UnknownName

from .. import palette

if TYPE_CHECKING:
    from autoq.layer import Layer
    from autoq.store import StudyRecord, TrialRecord

    from ..columns import Trials
    from .options import Option

Cell = str | int | float | bool | None
MOST_ROWS = 1000  # of a table as JSON, unless more are asked for


@dataclass(frozen=True)
class Column:
    """One column: its title, and the unit of its numbers where they have one."""

    title: str
    unit: str = ""

    def __str__(self) -> str:
        return f"{self.title} ({self.unit})" if self.unit else self.title


@dataclass(frozen=True)
class Table:
    """The numbers of a picture, in the order in which they are drawn. Bytes are bytes, numbers are whole."""

    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def headers(self) -> tuple[str, ...]:
        """Titles with their units."""
        return tuple(map(str, self.columns))

    def column(self, title: str) -> list[Cell]:
        """One column's cells."""
        place = [column.title for column in self.columns].index(title)
        return [row[place] for row in self.rows]

    def text(self, most: int | None = None) -> list[list[str]]:
        """The first `most` rows for people: digits that carry information, bytes with a decimal unit."""
        return [
            [_text(cell, column.unit) for cell, column in zip(row, self.columns, strict=True)]
            for row in self.rows[:most]
        ]

    def to_json(self, most: int | None = MOST_ROWS) -> dict[str, Any]:
        """`{"headers", "units", "rows", "total"}` with the first `most` of `total` rows."""
        return {
            "headers": [column.title for column in self.columns],
            "units": [column.unit for column in self.columns],
            "rows": [list(row) for row in self.rows[:most]],
            "total": len(self.rows),
        }


def _text(cell: Cell, unit: str) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "yes" if cell else "no"
    if isinstance(cell, str):
        return cell
    return str(cell) if isinstance(cell, int) and unit != "bytes" else numbers.number(cell, unit)


@dataclass(frozen=True)
class Figure:
    """A picture: `plotly` has `data` and `layout`; `note` says how to read it, and what is not in it."""

    plotly: Mapping[str, Any]
    table: Table
    title: str
    note: str

    def themed(self, theme: palette.Theme) -> dict[str, Any]:
        """`plotly` with the template of `light` or `dark`. Raises `UnknownName` for another one."""
        if theme not in palette.THEMES:
            raise UnknownName("theme", theme, palette.THEMES)
        layout = {**self.plotly["layout"], "template": palette.template(theme)}
        return {"data": self.plotly["data"], "layout": layout}

    def to_json(self, rows: int | None = MOST_ROWS) -> dict[str, Any]:
        """`{"plotly", "table", "title", "note"}`."""
        return {"plotly": self.plotly, "table": self.table.to_json(rows), "title": self.title, "note": self.note}


class Facts(Protocol):
    """What is known of a study: all that a figure may be drawn from."""

    @property
    def study(self) -> StudyRecord:
        """The study itself."""

    @property
    def trials(self) -> Trials:
        """All its trials as columns."""

    @property
    def layers(self) -> Mapping[str, Layer]:
        """The model's layers by name; empty where the study has not stored them."""

    @property
    def sensitivity(self) -> Mapping[str, Mapping[str, float]]:
        """Layer -> scheme -> predicted loss; empty where nothing was predicted."""

    def trial(self, number: int) -> TrialRecord:
        """One trial with its assignment. Raises `NotFound`."""

    def records(self, numbers: Sequence[int]) -> list[TrialRecord]:
        """These trials without their assignments, in this order."""

    def ties(self) -> Mapping[int, Sequence[int]] | None:
        """Frontier point -> those that it has no advantage over; None where the frontier is too large to tell."""

    def volume(self) -> Any:
        """The hypervolume of the trials so far; see `dashboards.volume.Curve`."""

    def other(self, study: str) -> Facts:
        """Another study of the same database. Raises `NotFound`."""


Build = Callable[..., Figure]


@functools.cache
def names() -> tuple[str, ...]:
    """The figures that there are."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return tuple(sorted(name for name in found if name != "options" and not name.startswith("_")))


def load(name: str) -> tuple[Build, Mapping[str, Option]]:
    """A figure's `build` and `OPTIONS`. Raises `UnknownName`."""
    if name not in names():
        raise UnknownName("figure", name, names())
    module = importlib.import_module(f"{__name__}.{name}")
    return module.build, module.OPTIONS


def build(facts: Facts, name: str, options: Mapping[str, object] | None = None) -> Figure:
    """The figure `name` of a study. Raises `UnknownName` and `BadInput` for what it does not know."""
    draw, known = load(name)
    read: dict[str, Any] = {}
    for option, value in (options or {}).items():
        if option not in known:
            raise UnknownName(f"option of figure {name}", option, known)
        if value is not None and value != "":
            read[option] = known[option].read(option, value, facts)
    return draw(facts, **read)


def finite(value: float | None) -> float | None:
    """None for what is no finite number: neither JSON nor Plotly has any other."""
    return None if value is None or not math.isfinite(value) else float(value)
