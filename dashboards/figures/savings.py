"""The search against uniform baselines: what the best searched points have of a baseline's size, time and loss."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoq.display.compare import Gain, gains

from .. import drawing, palette
from . import Cell, Column, Facts, Figure, Table
from .options import Option

OPTIONS: Mapping[str, Option] = {}
_COLUMNS = (
    *(Column("trial"), Column("baseline"), Column("objective"), Column("unit"), Column("point")),
    *(Column("of the baseline"), Column("ratio", "×")),
)
_PATTERNS = ("", "/", ".", "x")


def found(facts: Facts) -> list[Gain]:
    """What `gains` gives of a study's stored frontier and baselines."""
    trials = facts.trials
    names = [o.name for o in facts.study.objectives]
    there = trials.complete(names)
    points = trials.number[trials.on_frontier & there].tolist()
    bases = trials.number[trials.is_baseline & there].tolist()
    records = {record.number: record for record in facts.records(list(dict.fromkeys([*points, *bases])))}
    return gains([records[n] for n in points], [records[n] for n in bases], facts.study.objectives)


def build(facts: Facts) -> Figure:
    """One group of bars for each comparison, best first; 1 is the baseline."""
    title = f"{facts.study.name}: against uniform baselines"
    known = found(facts)
    if not known:
        message = "no searched point has less loss than a uniform baseline of its size, beyond noise"
        return Figure(drawing.empty(message), Table(_COLUMNS, ()), title, drawing.sentence([message]))
    names = [o.name for o in facts.study.objectives if any(o.name in gain.ratios for gain in known)]
    groups = drawing.distinct((f"trial {gain.point.number} / {gain.baseline.baseline}" for gain in known), 40)
    traces: list[dict[str, Any]] = []
    for index, name in enumerate(names):
        there = [(group, gain.ratios[name]) for group, gain in zip(groups, known, strict=True) if name in gain.ratios]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": drawing.safe(name),
                "y": [group for group, _ in there],
                "x": [ratio for _, ratio in there],
                "text": [f"{drawing.safe(name)}  {ratio:.2f} ×" for _, ratio in there],
                "textposition": "outside",
                "cliponaxis": False,
                "marker": {
                    "color": palette.CATEGORIES[index % len(palette.CATEGORIES)],
                    "pattern": {"shape": _PATTERNS[index % len(_PATTERNS)], "solidity": 0.2},
                },
                "hovertemplate": "%{y}<br>%{x:.3f} × of %{fullData.name}<extra></extra>",
            }
        )
    reach = max(ratio for gain in known for ratio in gain.ratios.values())
    one = {"type": "line", "xref": "x", "yref": "paper", "x0": 1, "x1": 1, "y0": 0, "y1": 1}
    layout = {
        "xaxis": {**drawing.axis("times the baseline (×)", ""), "range": [0, max(reach, 1.0) * 1.7]},
        "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
        "shapes": [{**one, "line": {"dash": "dash", "width": 1.5, "color": palette.GREY}}],
        "barmode": "group",
        "showlegend": False,
        "height": 60 + len(known) * (26 * len(names) + 24) + 60,
    }
    units = {o.name: o.unit for o in facts.study.objectives}
    rows: list[tuple[Cell, ...]] = []
    for name in names:
        for gain in known:
            if name in gain.ratios:
                ours, theirs = gain.point.best_measurements()[name], gain.baseline.best_measurements()[name]
                values = (ours.value, theirs.value, gain.ratios[name])
                rows.append((gain.point.number, gain.baseline.baseline, name, units[name], *values))
    part = known[0].point.best_measurements()[known[0].quality].part
    parts = [drawing.short(known[0], 200), f"measured on the {part} part, points chosen by the search part"]
    parts.append("less is better; a gain is claimed only beyond twice the combined standard error")
    return Figure({"data": traces, "layout": layout}, Table(_COLUMNS, tuple(rows)), title, drawing.sentence(parts))
