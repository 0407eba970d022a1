"""All objectives at once, one axis each: parallel coordinates (Inselberg 1985, "The plane with parallel coordinates").

Lines are trials, coloured by the first quality. Axes are logarithmic where values spread; better is not always down,
so each says its direction.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoq.display.compare import quality_objective

from .. import drawing
from . import Cell, Column, Facts, Figure, Table
from .options import Choice, Option

MOST = 5000  # lines; more are a surface
OPTIONS: Mapping[str, Option] = {"show": Choice(("frontier", "all"))}


def build(facts: Facts, show: str = "frontier") -> Figure:
    """The frontier and the baselines, or all complete trials (evenly over the study where they are too many)."""
    trials, objectives = facts.trials, facts.study.objectives
    names = [o.name for o in objectives]
    best = {name: trials.best(name) for name in names}
    chosen = trials.complete([])
    for each in best.values():
        chosen = chosen & (each.kind >= 0)
    if show == "frontier":
        chosen = chosen & (trials.on_frontier | trials.is_baseline)
    place = np.flatnonzero(chosen)
    left_out = max(0, len(place) - MOST)
    if left_out:
        place = place[np.linspace(0, len(place) - 1, MOST).round().astype(np.intp)]
    columns = (Column("trial"), Column("name"), Column("on frontier"), *(Column(o.name, o.unit) for o in objectives))
    title = f"{facts.study.name}: all objectives"
    if not len(place):
        message = "no trial is complete yet"
        return Figure(drawing.empty(message), Table(columns, ()), title, drawing.sentence([message]))
    values = {name: best[name].value[place] for name in names}
    shading = (quality_objective(objectives) or objectives[0]).name
    dimensions, logs = [], {}
    hidden = np.zeros(len(place), dtype=bool)
    base = trials.is_baseline[place]
    for o in objectives:
        dimension, log, gone = _dimension(o.name, o.unit, o.direction, values[o.name], base)
        dimensions.append(dimension)
        logs[o.name] = log
        hidden |= gone
    shown = ~hidden
    for dimension in dimensions:
        kept = dimension["values"][shown]
        if dimension.pop("bytes", False) and len(kept):
            dimension["tickvals"], dimension["ticktext"] = drawing.size_ticks(float(kept.min()), float(kept.max()))
        dimension["values"] = drawing.array(kept)
    shade = np.log10(values[shading][shown]) if logs[shading] else values[shading][shown]
    unit = next(o.unit for o in objectives if o.name == shading)
    bar: dict[str, Any] = {"title": {"text": drawing.words(shading, unit), "side": "right"}}
    if logs[shading] and len(shade):
        bar["tickvals"], bar["ticktext"] = drawing.log_ticks(float(shade.min()), float(shade.max()))
    trace = {
        "type": "parcoords",
        "dimensions": dimensions,
        "customdata": drawing.array(trials.number[place][shown]),
        "line": {"color": drawing.array(shade), "coloraxis": "coloraxis"},
        "labelangle": 0,
    }
    layout = {
        "margin": {"t": 72, "l": 90, "r": 40, "b": 32},
        "meta": {"objectives": names, "show": show},
        "coloraxis": {"colorbar": bar},
    }
    numbers_ = trials.number[place].tolist()
    cells: list[list[Cell]] = [numbers_, [trials.label(n) for n in numbers_], trials.on_frontier[place].tolist()]
    cells += [values[name].tolist() for name in names]
    note = _note(
        facts, place, show, left_out, int(hidden.sum()), [trials.label(int(n)) for n in trials.number[place][hidden]]
    )
    return Figure({"data": [trace], "layout": layout}, Table(columns, tuple(zip(*cells, strict=True))), title, note)


def _dimension(
    name: str, unit: str, direction: str, values: NDArray[np.float64], base: NDArray[np.bool_]
) -> tuple[dict[str, Any], bool, NDArray[np.bool_]]:
    """One axis; whether it is logarithmic, and which trials it has no place for."""
    known = values[~base] if (~base).sum() > 1 else values
    log = drawing.is_log("auto", known)
    gone = np.zeros(len(values), dtype=bool)
    better = "↓" if direction == "minimize" else "↑"
    made: dict[str, Any] = {"label": f"{drawing.words(name, unit)} {better}"}
    if log:
        gone = values < known[known > 0].min() / drawing.VANISHING
        made["values"] = np.log10(np.where(gone, 1.0, values))
        shown = made["values"][~gone]
        made["tickvals"], made["ticktext"] = drawing.log_ticks(float(shown.min()), float(shown.max()))
    else:
        made["values"] = values
        if unit == "bytes":
            made["bytes"] = True
    return made, log, gone


def _note(facts: Facts, place: NDArray[np.intp], show: str, left_out: int, hidden: int, names: list[str]) -> str:
    trials = facts.trials
    reported = sum(bool((trials.best(o.name).part[place] == 0).any()) for o in facts.study.objectives)
    parts = [
        f"{len(place)} trials: " + ("the frontier and the baselines" if show == "frontier" else "all that are complete")
    ]
    parts.append("an arrow says which way is better")
    if reported:
        parts.append("values are of the report part where a trial was measured on it, else of the search part")
    if any((trials.best(o.name).kind[place] == 1).any() for o in facts.study.objectives):
        parts.append("latencies and energies that were not measured are predicted")
    if left_out:
        parts.append(f"{left_out} more are not drawn")
    if hidden:
        parts.append(f"not in sight on a logarithmic axis: {', '.join(names[:3])}" + (" …" if hidden > 3 else ""))
    return drawing.sentence(parts)
