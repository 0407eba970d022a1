"""How much of the space of objectives the frontier dominates, over trials and over time; see `dashboards.volume`.

Only trials that raise the volume are drawn and listed, the first and the last besides: between them nothing changes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from autoq.display import numbers

from .. import drawing, palette
from ..volume import SAMPLES, Curve
from . import Cell, Column, Facts, Figure, Table
from .options import Choice, Option

OPTIONS: Mapping[str, Option] = {"over": Choice(("trials", "time"))}
_COLUMNS = (
    Column("trial"),
    Column("finished trials"),
    Column("time", "min"),
    Column("hypervolume", "share of the box"),
)


def build(facts: Facts, over: str = "trials") -> Figure:
    """The hypervolume over complete trials, or over the minutes since the study's first trial began."""
    curve: Curve = facts.volume()
    title = f"{facts.study.name}: hypervolume"
    share = curve.share
    if not len(share) or not share.any():
        message = "no feasible trial is better than the reference yet" if len(share) else "no trial is complete yet"
        return Figure(drawing.empty(message), Table(_COLUMNS, ()), title, drawing.sentence([message]))
    rises = np.flatnonzero(np.diff(share, prepend=-1.0) > 0)
    kept = np.unique([0, *rises.tolist(), len(share) - 1])
    began = float(np.nanmin(facts.trials.created))
    minutes = np.maximum((np.array(curve.times)[kept] - began) / 60, 0.0)
    counts = kept + 1
    across, label = (counts, "complete trials") if over == "trials" else (minutes, "time since the first trial (min)")
    trace = {
        "type": "scattergl" if len(kept) > drawing.MANY else "scatter",
        "mode": "lines+markers",
        "x": drawing.array(across),
        "y": drawing.array(share[kept]),
        "customdata": drawing.array(np.array(curve.numbers)[kept]),
        "line": {"shape": "hv", "color": palette.BLUE, "width": 2},
        "marker": {"size": 5 if len(kept) < 100 else 2, "color": palette.BLUE},
        "hovertemplate": "trial %{customdata}<br>%{y:.4f} of the box<br>%{x:.4~g} " + label + "<extra></extra>",
    }
    layout: dict[str, Any] = {
        "xaxis": drawing.axis(label, ""),
        "yaxis": drawing.axis("hypervolume (share of the box)", ""),
        "meta": {"over": over},
    }
    cells: list[list[Cell]] = [np.array(curve.numbers)[kept].tolist(), counts.tolist(), minutes.tolist()]
    cells.append(share[kept].tolist())
    table = Table(_COLUMNS, tuple(zip(*cells, strict=True)))
    return Figure({"data": [trace], "layout": layout}, table, title, _note(facts, curve))


def _note(facts: Facts, curve: Curve) -> str:
    objectives = facts.study.objectives
    signs = drawing.costs(np.stack([curve.reference, curve.ideal]), [o.direction for o in objectives])
    ends = [
        f"{o.name} {numbers.quantity(float(worst), o.unit)} to {numbers.quantity(float(best), o.unit)}"
        for o, worst, best in zip(objectives, signs[0], signs[1], strict=True)
    ]
    parts = [
        f"share of the box from the reference point to the best of each objective: {', '.join(ends)}",
        "the reference is the worst of the baselines and a tenth of their range beyond",
        "values are of the search part; points beyond the reference count nothing",
    ]
    if len(facts.trials.baselines) < 2:
        parts[1] = "the reference is the worst of the first complete trials and a tenth of their range beyond"
    if curve.estimated:
        parts.append(f"an estimate from {SAMPLES} random points, ±{curve.stderr or 0.0:.2g} at the end")
    return drawing.sentence(parts)
