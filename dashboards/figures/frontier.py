"""Any two objectives against each other, a third as colour.

A trial stands where it was measured on the report part, or on the search part where it was not; which of the two, and
whether a value was predicted, is said by its symbol. The line joins what no other point of the same provenance beats
in the two objectives that are drawn: with a third objective, frontier points lie beyond it too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoq.display import numbers
from autoq.display.compare import quality_objective, sort_objective

from .. import drawing, labels, palette
from ..columns import KINDS, PARTS, Best, Trials
from . import Cell, Column, Facts, Figure, Table, finite
from .options import Choice, Count, Flag, ObjectiveName, Option, objectives

MOST = 20_000  # dominated, infeasible and stopped trials that are drawn
SCALES = ("auto", "log", "linear")
OPTIONS: Mapping[str, Option] = {
    "x": ObjectiveName(),
    "y": ObjectiveName(),
    "color": ObjectiveName(none=True),
    "x_scale": Choice(SCALES),
    "y_scale": Choice(SCALES),
    "stopped": Flag(),
    "limit": Count(0, MOST),
}

REPORTED, SEARCHED, PREDICTED = range(3)
_FEW = 3  # reported points that make a line
_HOW = ("measured on the report part", "measured on the search part", "partly predicted")
_SUFFIX = ("", "-open-dot", "-open")
_STATUS = ("dominated", "infeasible", "stopped early", "frontier", "baseline")
_SYMBOL = ("circle", "x-thin", "triangle-down", "circle", "square")
_SIZE = (5, 7, 6, 9, 10)


@dataclass(frozen=True, eq=False)
class _Points:
    """What is drawn, in the order of the table: places in the columns, and a status and provenance for each."""

    place: NDArray[np.intp]
    status: NDArray[np.int8]
    how: NDArray[np.int8]
    left_out: int


def build(
    facts: Facts,
    x: str | None = None,
    y: str | None = None,
    color: str | None = None,
    x_scale: str = "auto",
    y_scale: str = "auto",
    stopped: bool = False,
    limit: int = MOST,
) -> Figure:
    """Size against quality unless told otherwise; `color` defaults to the study's next objective."""
    trials, study, units = facts.trials, facts.study, objectives(facts)
    x = x or sort_objective(study.objectives).name
    y = y or next(
        (o.name for o in (quality_objective(study.objectives), *study.objectives) if o is not None and o.name != x), x
    )
    if color is None:
        color = next((o.name for o in study.objectives if o.name not in (x, y)), "none")
    title = f"{study.name}: {y} against {x}"
    columns = _columns(x, y, color, units)
    across, up = trials.best(x), trials.best(y)
    points = _points(trials, across, up, x, y, stopped, limit)
    if not len(points.place):
        message = _nothing(trials, x, y)
        return Figure(drawing.empty(message), Table(columns, ()), title, drawing.sentence([message]))
    ties = facts.ties()
    sketch = _Sketch(facts, points, (x, y, color), units, (x_scale, y_scale), ties)
    return Figure(sketch.plotly(), Table(columns, sketch.rows()), title, sketch.note())


def _columns(x: str, y: str, color: str, units: Mapping[str, str]) -> tuple[Column, ...]:
    found = [Column("trial"), Column("name"), Column("status")]
    for name in dict.fromkeys([x, y]):
        found += [Column(name, units[name]), Column(f"{name} standard error", units[name])]
    if color != "none" and color not in (x, y):
        found.append(Column(color, units[color]))
    return (*found, Column("provenance"), Column("no better than"))


def _points(trials: Trials, across: Best, up: Best, x: str, y: str, stopped: bool, limit: int) -> _Points:
    there = (across.kind >= 0) & (up.kind >= 0)
    complete, base = trials.states("complete") & there, trials.is_baseline
    status = np.full(len(trials), -1, dtype=np.int8)
    status[complete] = 0
    status[complete & (trials.feasible == 0)] = 1
    if stopped:
        status[trials.states("stopped") & there] = 2
    status[complete & trials.on_frontier] = 3
    status[complete & base] = 4
    how = _provenance(across, up)
    crowd = np.flatnonzero((status >= 0) & (status < 3))
    kept = crowd
    if len(crowd) > limit:  # evenly over the study
        kept = crowd[np.linspace(0, len(crowd) - 1, limit).round().astype(np.intp)] if limit else crowd[:0]
    place = np.concatenate([kept, np.flatnonzero(status >= 3)]).astype(np.intp)
    # By what a trace is made of, frontier and baselines then along the axis.
    along = np.where(status[place] >= 3, across.value[place], 0.0)
    place = place[np.lexsort((place, along, how[place], status[place]))]
    return _Points(place, status[place], how[place], len(crowd) - len(kept))


def _provenance(across: Best, up: Best) -> NDArray[np.int8]:
    """REPORTED, SEARCHED or PREDICTED per trial: the weaker of its two values. Computed is as good as reported."""
    how = np.full(len(across.kind), REPORTED, dtype=np.int8)
    for best in (across, up):
        how[(best.kind == KINDS.index("measured")) & (best.part == PARTS.index("search")) & (how == 0)] = SEARCHED
        how[best.kind == KINDS.index("predicted")] = PREDICTED
    return how


def _nothing(trials: Trials, x: str, y: str) -> str:
    """Why there is no point."""
    if trials.states("complete").any():
        return f"no trial has both {x} and {y} yet"
    failed = int(trials.states("failed").sum())
    why = f": {failed} {'has' if failed == 1 else 'have'} failed" if failed else " yet"
    return f"no trial is complete{why}"


class _Sketch:
    """One picture in the making."""

    def __init__(
        self,
        facts: Facts,
        points: _Points,
        names: tuple[str, str, str],
        units: Mapping[str, str],
        scales: tuple[str, str],
        ties: Mapping[int, Sequence[int]] | None,
    ) -> None:
        self.facts, self.points, self.units, self.ties = facts, points, units, ties
        self.trials = facts.trials
        self.x, self.y, self.color = names
        place = points.place
        self.numbers = self.trials.number[place]
        self.best = {name: _taken(self.trials.best(name), place) for name in names if name != "none"}
        # What was stopped counts by the estimate of its full value.
        early = points.status == 2
        for name, best in self.best.items():
            expected = self.trials.measured(name, "search").expected[place]
            best.value[early] = np.where(np.isfinite(expected[early]), expected[early], best.value[early])
        self.logs = tuple(self._scale(name, scale) for name, scale in zip(names[:2], scales, strict=True))
        self.hidden = self._hidden()
        self.color_log = self.color != "none" and drawing.is_log("auto", self._known(self.color))

    def _known(self, name: str) -> NDArray[np.float64]:
        """The finite values of an objective, of searched points where there are any."""
        values = self.best[name].value
        searched = values[(self.points.status < 4) & np.isfinite(values)]
        return searched if len(searched) > 1 else values[np.isfinite(values)]

    def _scale(self, name: str, scale: str) -> bool:
        return drawing.is_log(scale, self._known(name))

    def _hidden(self) -> NDArray[np.bool_]:
        """Points that a logarithmic axis has no place for, or only by pressing all others into a corner."""
        hidden = np.zeros(len(self.numbers), dtype=bool)
        for name, log in zip((self.x, self.y), self.logs, strict=True):
            if log:
                known = self._known(name)
                floor = known[known > 0].min() / drawing.VANISHING
                hidden |= self.best[name].value < floor
        return hidden

    # The picture

    def plotly(self) -> dict[str, Any]:
        traces = [
            self._trace(status, how)
            for status in range(3)
            for how in range(3)
            if ((self.points.status == status) & (self.points.how == how)).any()
        ]
        line = self._line()
        traces += [] if line is None else [line]
        traces += [
            self._trace(status, how)
            for status in (3, 4)
            for how in range(3)
            if ((self.points.status == status) & (self.points.how == how)).any()
        ]
        traces += [_legend_entry(trace) for trace in traces if "legendgroup" in trace]
        layout: dict[str, Any] = {
            "xaxis": self._axis(0),
            "yaxis": self._axis(1),
            "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
            "meta": {"x": self.x, "y": self.y, "color": self.color},
            "margin": {"t": 56},
        }
        if any("coloraxis" in trace.get("marker", {}) for trace in traces):
            layout["coloraxis"] = self._color_axis()
        return {"data": traces, "layout": layout}

    def _axis(self, which: int) -> dict[str, Any]:
        name = (self.x, self.y)[which]
        shown = self.best[name].value[~self.hidden]
        made = drawing.axis(drawing.words(name, self.units[name]), self.units[name], self.logs[which], shown)
        if len(shown) and (self.hidden.any() or shown.min() == shown.max()):  # ticks would all read the same
            made |= {"range": drawing.ends(shown, self.logs[which]), "autorange": False}
        return made

    def _color_axis(self) -> dict[str, Any]:
        unit = self.units[self.color]
        bar: dict[str, Any] = {"title": {"text": drawing.words(self.color, unit), "side": "right"}}
        known = self._known(self.color)
        if self.color_log:
            known = np.log10(known[known > 0])
            bar["tickvals"], bar["ticktext"] = drawing.log_ticks(float(known.min()), float(known.max()))
        elif unit == "bytes":
            bar |= {"tickformat": "~s", "ticksuffix": "B"}
        # What searched trials have decides: a baseline far off, as the unquantized model is, has the end's colour.
        low, high = float(known.min()), float(known.max())
        limits = {"cmin": low, "cmax": high} if low < high else {}
        return {"colorbar": bar, **limits}

    def _shade(self, chosen: NDArray[np.bool_]) -> NDArray[np.float64] | None:
        """The third objective's values, None where one is missing."""
        if self.color in ("none", self.x, self.y):
            return None
        values = self.best[self.color].value[chosen]
        if self.color_log:
            values = np.log10(np.where(values > 0, values, np.nan))
        return values if np.isfinite(values).all() else None

    def _trace(self, status: int, how: int) -> dict[str, Any]:
        chosen = (self.points.status == status) & (self.points.how == how)
        # A logarithmic axis has no place for these at all; they are in the table and in the note.
        for name, log in zip((self.x, self.y), self.logs, strict=True):
            if log:
                chosen = chosen & (self.best[name].value > 0)
        count = int(chosen.sum())
        crowd = status < 3
        marker: dict[str, Any] = {"symbol": _SYMBOL[status] + _SUFFIX[how], "size": _SIZE[status]}
        if status == 1:  # crosses are lines
            marker |= {"symbol": "x-thin", "line": {"width": 1.5, "color": palette.GREY}}
        shade = self._shade(chosen)
        if status != 1:
            if shade is not None:
                marker |= {"color": drawing.array(shade), "coloraxis": "coloraxis"}
            else:
                marker["color"] = (palette.GREY, "", palette.GREY, palette.BLUE, palette.VERMILLION)[status]
        marker |= {"opacity": 0.4} if crowd else {"line": {"width": 2 if how != REPORTED else 1}}
        numbers_ = self.numbers[chosen]
        trace: dict[str, Any] = {
            "type": "scattergl" if count > drawing.MANY else "scatter",
            "mode": "markers",
            "name": self._name(status, how),
            "x": drawing.array(self.best[self.x].value[chosen]),
            "y": drawing.array(self.best[self.y].value[chosen]),
            "customdata": drawing.array(numbers_),
            "marker": marker,
            "meta": {"status": _STATUS[status], "provenance": _HOW[how]},
        }
        if shade is not None and status != 1:
            trace |= {"legendgroup": trace["name"], "showlegend": False}
        if crowd:
            third = (
                ""
                if shade is None or self.color_log
                else f"<br>{drawing.hover('marker.color', self.units[self.color])}"
            )
            trace["hovertemplate"] = (
                f"trial %{{customdata}}, {_STATUS[status]}<br>{drawing.hover('x', self.units[self.x])}<br>"
                f"{drawing.hover('y', self.units[self.y])}{third}<br>{_HOW[how]}<extra></extra>"
            )
        else:
            self._detail(trace, chosen, status)
        return trace

    def _detail(self, trace: dict[str, Any], chosen: NDArray[np.bool_], status: int) -> None:
        """Names, error bars and hover texts of frontier points and baselines."""
        indices = np.flatnonzero(chosen)
        trace["ids"] = [f"trial-{number}" for number in self.numbers[indices]]
        trace["hovertext"] = [self._hover(int(index)) for index in indices]
        trace["hovertemplate"] = "%{hovertext}<extra></extra>"
        for letter, name in (("x", self.x), ("y", self.y)):
            error = self.best[name].stderr[indices]
            if np.isfinite(error).any():
                bars = {"type": "data", "array": drawing.array(np.nan_to_num(error)), "thickness": 1, "width": 3}
                bars["color"] = palette.GREY
                trace[f"error_{letter}"] = bars
        texts = [self._label(int(self.numbers[index]), status) for index in indices]
        if any(texts):
            trace |= {"mode": "markers+text", "text": texts, "cliponaxis": False}
            trace["textposition"] = self._label_places(indices, texts) if status == 4 else "top center"

    def _label(self, number: int, status: int) -> str:
        tied = "~" if self.ties and self.ties.get(number) else ""
        return drawing.safe(self.trials.label(number), 28) + tied if status == 4 else tied

    def _label_places(self, indices: NDArray[np.intp], texts: Sequence[str]) -> list[str]:
        shares = np.stack([self._share(self.x, self.logs[0]), self._share(self.y, self.logs[1])], 1)
        dots = [(float(a), float(b)) for a, b in shares[(self.points.status >= 3) & ~self.hidden]]
        here = [(*map(float, shares[index]), text) for index, text in zip(indices, texts, strict=True)]
        return labels.place(here, dots)  # type: ignore[arg-type]

    def _share(self, name: str, log: bool) -> NDArray[np.float64]:
        """How far along the axis each point is, 0 to 1."""
        values = self.best[name].value
        if log:
            values = np.log10(np.where(values > 0, values, values[values > 0].min()))
        shown = values[~self.hidden]
        width = float(np.ptp(shown)) if len(shown) else 0.0
        return 0.05 + 0.9 * (values - shown.min()) / width if width else np.full(len(values), 0.5)

    def _hover(self, index: int) -> str:
        number = int(self.numbers[index])
        name = self.trials.baselines.get(number)
        lines = [f"trial {number}" + (f", {drawing.safe(name)}" if name else "")]
        for objective, best in self.best.items():
            if np.isfinite(best.value[index]):
                text = numbers.with_error(best.value[index], finite(best.stderr[index]), self.units[objective])
                unit = "" if self.units[objective] == "bytes" else f" {drawing.safe(self.units[objective])}"
                how = KINDS[best.kind[index]]
                where = f", {PARTS[best.part[index]]} part" if how == "measured" else ""
                lines.append(f"{drawing.safe(objective)}: {text}{unit} ({how}{where})")
        if self.ties and (others := self.ties.get(number)):
            shown = ", ".join(map(str, others[:6])) + (" …" if len(others) > 6 else "")
            lines.append(f"no better than {shown}, beyond noise")
        place = int(self.points.place[index])
        if self.trials.feasible[place] == 0:
            lines.append("infeasible")
        return "<br>".join(lines)

    def _name(self, status: int, how: int) -> str:
        several = len(set(self.points.how[self.points.status >= 3].tolist())) > 1
        named = {0: "dominated", 1: "infeasible", 2: "stopped early, estimated", 3: "frontier", 4: "baselines"}[status]
        return f"{named}, {_HOW[how]}" if several and status >= 3 else named

    def _line(self) -> dict[str, Any] | None:
        """The staircase of frontier points of one provenance: of reported ones where there are some, else of most."""
        directions = [drawing.direction_of(self.facts.study.objectives, name) for name in (self.x, self.y)]
        member = self.trials.on_frontier[self.points.place] & ~self.hidden
        if None in directions or not member.any() or self.x == self.y:
            return None
        counts = np.bincount(self.points.how[member], minlength=3)
        how = REPORTED if counts[REPORTED] >= _FEW else int(counts.argmax())
        indices = np.flatnonzero(member & (self.points.how == how))
        x, y = self.best[self.x].value[indices], self.best[self.y].value[indices]
        kept = drawing.staircase(x, y, (str(directions[0]), str(directions[1])))
        if len(kept) < 2:
            return None
        return {
            "type": "scatter",
            "mode": "lines",
            "x": drawing.array(x[kept]),
            "y": drawing.array(y[kept]),
            "line": {"shape": drawing.step_shape(str(directions[0])), "color": palette.BLUE, "width": 1.5},
            "opacity": 0.6,
            "hoverinfo": "skip",
            "showlegend": False,
        }

    # The table and the note

    def rows(self) -> tuple[tuple[Cell, ...], ...]:
        names = list(dict.fromkeys([self.x, self.y]))
        third = self.color if self.color not in ("none", *names) else None
        numbers_ = self.numbers.tolist()
        cells: list[list[Cell]] = [numbers_, [self.trials.label(number) for number in numbers_]]
        cells.append([_STATUS[status] for status in self.points.status.tolist()])
        for name in names:
            cells.append(self.best[name].value.tolist())
            cells.append([value if value == value else None for value in self.best[name].stderr.tolist()])
        if third is not None:
            cells.append([value if value == value else None for value in self.best[third].value.tolist()])
        cells.append([_HOW[how] for how in self.points.how.tolist()])
        ties = self.ties or {}
        cells.append([", ".join(map(str, ties[n])) if ties.get(n) else None for n in numbers_])
        return tuple(zip(*cells, strict=True))

    def note(self) -> str:
        status, how = self.points.status, self.points.how
        parts = []
        main = how[status >= 3]
        if len(main):
            counts = np.bincount(main, minlength=3)
            said = [f"{count} {_HOW[kind]}" for kind, count in enumerate(counts.tolist()) if count]
            where = f": {', '.join(said)}" if len(said) > 1 else f" were {_HOW[int(main[0])]}"
            parts.append(f"frontier and baselines{where}")
        several = len(set(main.tolist())) > 1
        if several and (main == PREDICTED).any():
            parts.append("open symbols are predicted, not measured")
        if several and (main == SEARCHED).any():
            parts.append("open symbols with a dot were measured on the search part only")
        if any(np.isfinite(self.best[name].stderr[status >= 3]).any() for name in (self.x, self.y)):
            parts.append("bars are one standard error")
        if (status < 3).any():
            crowd = sorted(set(status[status < 3].tolist()))
            parts.append(f"small: {', '.join(_STATUS[each] for each in crowd)}; values of the search part")
        if self.ties and any(self.ties.values()):
            parts.append("~ marks points that are better than another one in nothing, beyond noise")
        if self.ties is None:
            parts.append("the frontier is too large to compare all its points in pairs")
        if self.points.left_out:
            parts.append(f"{self.points.left_out} more dominated trials are not drawn")
        if self.hidden.any():
            parts.append("not in sight on a logarithmic axis: " + self._out_of_sight())
        return drawing.sentence(parts)

    def _out_of_sight(self) -> str:
        found = []
        for index in np.flatnonzero(self.hidden)[:3]:
            name = next(n for n, log in zip((self.x, self.y), self.logs, strict=True) if log)
            value = numbers.quantity(float(self.best[name].value[index]), self.units[name])
            found.append(f"{self.trials.label(int(self.numbers[index]))} ({value})")
        more = int(self.hidden.sum()) - len(found)
        return ", ".join(found) + (f" and {more} more" if more > 0 else "")


def _legend_entry(trace: Mapping[str, Any]) -> dict[str, Any]:
    """Stands in a legend for a trace whose colours are numbers, in grey: colour says the third objective there."""
    marker = {key: trace["marker"][key] for key in ("symbol", "size")}
    return {
        "type": "scatter",
        "mode": "markers",
        "name": trace["name"],
        "legendgroup": trace["legendgroup"],
        "x": [None],
        "y": [None],
        "marker": {**marker, "color": palette.GREY},
        "hoverinfo": "skip",
    }


def _taken(best: Best, place: NDArray[np.intp]) -> Best:
    return Best(best.value[place], best.stderr[place], best.kind[place], best.part[place])
