"""The frontiers of several studies of one model, on one picture.

Studies stand beside each other only where they can: the same model, the same objectives in the same units and
directions. What is compared at equal size is read off staircases: at a size, a study has the best point that is no
larger. Nothing between two points is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoq.display import numbers
from autoq.display.compare import quality_objective, sort_objective
from autoq.errors import BadInput

from .. import drawing, palette
from ..columns import PARTS
from . import Cell, Column, Facts, Figure, Table
from .options import Choice, ObjectiveName, Option, StudyNames

MOST = 8
_DASHES = ("solid", "dash", "dot", "dashdot")
_SIZES = 12  # at which the table compares
_SCALES = ("auto", "log", "linear")
OPTIONS: Mapping[str, Option] = {
    "studies": StudyNames(MOST - 1),
    "x": ObjectiveName(),
    "y": ObjectiveName(),
    "x_scale": Choice(_SCALES),
    "y_scale": Choice(_SCALES),
}


def build(
    facts: Facts,
    studies: Sequence[Facts] = (),
    x: str | None = None,
    y: str | None = None,
    x_scale: str = "auto",
    y_scale: str = "auto",
) -> Figure:
    """This study's frontier and those of `studies`. Raises `BadInput` naming a study that cannot stand beside it."""
    own = facts.study.objectives
    x = x or sort_objective(own).name
    y = y or next((o.name for o in (quality_objective(own), *own) if o is not None and o.name != x), x)
    for other in studies:
        _refuse(facts, other, (x, y))
    units = {o.name: o.unit for o in own} | {n: u for n, u in facts.trials.units.items() if n in (x, y)}
    all_of = [facts, *studies]
    shown_names = " and ".join(each.study.name for each in all_of[:3]) + (" …" if len(all_of) > 3 else "")
    title = f"{y} against {x}: {shown_names}"
    others = (Column(each.study.name, units[y]) for each in all_of)
    columns = (Column(f"{x} at most", units[x]), *others, Column("least"))
    part = _part(all_of, y)
    lines = [_Line(each, x, y, part) for each in all_of]
    if not any(len(line.x) for line in lines):
        message = f"no study has a complete trial with both {x} and {y}"
        return Figure(drawing.empty(message), Table(columns, ()), title, drawing.sentence([message]))
    across, up = (np.concatenate([getattr(line, axis) for line in lines]) for axis in "xy")
    logs = drawing.is_log(x_scale, _in_sight(lines, "x")), drawing.is_log(y_scale, _in_sight(lines, "y"))
    shown = np.ones(len(up), dtype=bool)
    for values, log, axis in ((across, logs[0], "x"), (up, logs[1], "y")):
        if log:
            known = _in_sight(lines, axis)
            shown &= values >= known[known > 0].min() / drawing.VANISHING
    traces: list[dict[str, Any]] = []
    for index, line in enumerate(lines):
        traces += line.traces(index, logs, units)
    layout: dict[str, Any] = {"meta": {"x": x, "y": y}, "margin": {"t": 56}}
    layout["legend"] = {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"}
    for letter, name, values, log in (("x", x, across, logs[0]), ("y", y, up, logs[1])):
        made = drawing.axis(drawing.words(name, units[name]), units[name], log, values[shown])
        if not shown.all() and shown.any():
            made |= {"range": drawing.ends(values[shown], log), "autorange": False}
        layout[f"{letter}axis"] = made
    rows = _at_equal(lines, own, x, y)
    return Figure({"data": traces, "layout": layout}, Table(columns, rows), title, _note(all_of, lines, x, y, part))


def _refuse(facts: Facts, other: Facts, names: Sequence[str]) -> None:
    ours, theirs = facts.study, other.study
    a, b = (study.spec["model"]["id"] for study in (ours, theirs))
    if a != b:
        raise BadInput(f"study {theirs.name!r} is of model {b!r}, {ours.name!r} of {a!r}; only one model is compared")
    for name in names:
        mine = next((o for o in ours.objectives if o.name == name), None)
        found = next((o for o in theirs.objectives if o.name == name), None)
        unit = found.unit if found else other.trials.units.get(name)
        if unit is None:
            choices = ", ".join(o.name for o in theirs.objectives)
            raise BadInput(f"study {theirs.name!r} has no {name}; it has {choices}")
        wanted = mine.unit if mine else facts.trials.units[name]
        if unit != wanted:
            raise BadInput(f"study {theirs.name!r} has {name} in {unit!r} and {ours.name!r} in {wanted!r}")
        if mine and found and mine.direction != found.direction:
            raise BadInput(
                f"study {theirs.name!r} is to {found.direction} {name}, {ours.name!r} to {mine.direction} it"
            )


def _part(all_of: Sequence[Facts], y: str) -> int:
    """What is compared: the report part where every study has it of a frontier point, else the search part."""
    for each in all_of:
        member = each.trials.on_frontier
        if member.any() and not (each.trials.measured(y, "report").kind[member] >= 0).any():
            return PARTS.index("search")
    return PARTS.index("report")


class _Line:
    """One study's frontier points with values of one part."""

    def __init__(self, facts: Facts, x: str, y: str, part: int) -> None:
        trials = facts.trials
        self.facts, self.name, self.names = facts, facts.study.name, (x, y)
        quality = trials.measured(y, PARTS[part])
        # A size belongs to no part; a latency is compared as measured only where y is.
        best = trials.best(x) if PARTS[part] == "report" else None
        across = best.value if best is not None else trials.measured(x, "search").value
        kind = best.kind if best is not None else trials.measured(x, "search").kind
        up = quality
        if not (quality.kind >= 0).any():  # neither part: y is computed
            up = trials.measured(y, "search")
        member = trials.on_frontier & (kind >= 0) & (up.kind >= 0)
        place = np.flatnonzero(member)
        place = place[np.argsort(across[place], kind="stable")]
        self.numbers = trials.number[place]
        self.base = trials.is_baseline[place]
        self.x, self.y, self.error = across[place], up.value[place], up.stderr[place]
        self.predicted = (kind[place] == 1) | (up.kind[place] == 1)
        objectives = facts.study.objectives
        directions = tuple(drawing.direction_of(objectives, name) or "minimize" for name in (x, y))
        self.directions: tuple[str, str] = (directions[0], directions[1])
        kept = drawing.staircase(self.x, self.y, self.directions)
        self.stairs = kept

    def traces(self, index: int, logs: tuple[bool, bool], units: Mapping[str, str]) -> list[dict[str, Any]]:
        there = ((self.x > 0) | (not logs[0])) & ((self.y > 0) | (not logs[1]))
        color = palette.CATEGORIES[index % len(palette.CATEGORIES)]
        symbol = palette.SYMBOLS[index % len(palette.SYMBOLS)]
        if not there.any():
            return []
        on = np.zeros(len(self.x), dtype=bool)
        on[self.stairs] = True
        name = drawing.safe(self.name)
        hover = [self._hover(int(i), units) for i in np.flatnonzero(there)]
        bars = np.nan_to_num(self.error[there])
        found: list[dict[str, Any]] = [
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "legendgroup": f"study-{index}",
                "x": drawing.array(self.x[there]),
                "y": drawing.array(self.y[there]),
                "customdata": drawing.array(self.numbers[there]),
                "meta": {"study": self.name},
                "marker": {
                    "symbol": [symbol + ("-open" if predicted else "") for predicted in self.predicted[there].tolist()],
                    "size": 9,
                    "color": color,
                    "opacity": [1.0 if each else 0.35 for each in on[there].tolist()],
                    "line": {"width": 1},
                },
                "hovertext": hover,
                "hovertemplate": "%{hovertext}<extra></extra>",
            }
        ]
        if bars.any():
            error = {"type": "data", "array": drawing.array(bars), "thickness": 1, "width": 3}
            found[0]["error_y"] = error | {"color": palette.GREY}
        stairs = self.stairs[there[self.stairs]]
        if len(stairs) > 1:
            shape = {"shape": drawing.step_shape(self.directions[0]), "dash": _DASHES[index % len(_DASHES)]}
            line = {
                "type": "scatter",
                "mode": "lines",
                "legendgroup": f"study-{index}",
                "showlegend": False,
                "x": drawing.array(self.x[stairs]),
                "y": drawing.array(self.y[stairs]),
                "line": {**shape, "color": color, "width": 1.5},
                "hoverinfo": "skip",
            }
            found.insert(0, line)
        return found

    def _hover(self, index: int, units: Mapping[str, str]) -> str:
        lines = [drawing.safe(self.name), drawing.safe(self.facts.trials.label(int(self.numbers[index])))]
        for name, value in zip(self.names, (self.x[index], self.y[index]), strict=True):
            lines.append(f"{drawing.safe(name)}: {drawing.safe(numbers.quantity(float(value), units[name]))}")
        return "<br>".join(lines)

    def at(self, limit: float) -> float | None:
        """The best y among the points that keep a limit on x; None where none does."""
        within = self.x <= limit if self.directions[0] == "minimize" else self.x >= limit
        if not within.any():
            return None
        return float(self.y[within].min() if self.directions[1] == "minimize" else self.y[within].max())


def _in_sight(lines: Sequence[_Line], axis: str) -> NDArray[np.float64]:
    """Values that choose the scale: of searched points where there are any."""
    searched = np.concatenate([getattr(line, axis)[~line.base] for line in lines])
    return searched if len(searched) > 1 else np.concatenate([getattr(line, axis) for line in lines])


def _at_equal(lines: Sequence[_Line], own: Any, x: str, y: str) -> tuple[tuple[Cell, ...], ...]:
    """At sizes that the studies have points of, evenly: each study's best, and who has the best of all."""
    sizes = np.unique(np.concatenate([line.x for line in lines]))
    if len(sizes) > _SIZES:
        sizes = sizes[np.linspace(0, len(sizes) - 1, _SIZES).round().astype(np.intp)]
    maximize = drawing.direction_of(own, y) == "maximize"
    rows = []
    for size in sizes.tolist():
        values = [line.at(size) for line in lines]
        known = [value for value in values if value is not None]
        best = (max(known) if maximize else min(known)) if known else None
        first = [line.name for line, value in zip(lines, values, strict=True) if value is not None and value == best]
        rows.append((size, *values, " and ".join(first) or None))
    return tuple(rows)


def _note(all_of: Sequence[Facts], lines: Sequence[_Line], x: str, y: str, part: int) -> str:
    parts = [f"values of {y} are of the {PARTS[part]} part", "points that another one beats in these two are dim"]
    parts.append(
        f"the table gives each study's best with {x} no worse than the limit; between points nothing is claimed"
    )
    texts = {
        tuple(sorted((key, str(value)) for key, value in each.study.spec.get("data", {}).items())) for each in all_of
    }
    if len(texts) > 1:
        parts.append("the studies were measured on different data: differences of quality may be the text's")
    if any(line.predicted.any() for line in lines):
        parts.append("open symbols are predicted, not measured")
    if any(np.isfinite(line.error).any() for line in lines):
        parts.append("bars are one standard error")
    return drawing.sentence(parts)
