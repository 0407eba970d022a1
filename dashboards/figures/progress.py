"""How trials ended over time, and how fast they came.

Above, ended trials stacked by how they ended; below, trials per minute. A duplicate is an assignment that had its
result already: a hit of the cache, which costs nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from autoq.display.numbers import duration
from autoq.store import TrialState

from .. import drawing, palette
from . import Cell, Column, Facts, Figure, Table, finite
from .options import Option

OPTIONS: Mapping[str, Option] = {}
BINS = 40
_ENDED: tuple[TrialState, ...] = ("complete", "stopped", "duplicate", "failed")
_SAID = {"complete": "complete", "stopped": "stopped early", "duplicate": "duplicate (no cost)", "failed": "failed"}
_COLOR = {"complete": palette.BLUE, "stopped": palette.GREEN, "duplicate": palette.PURPLE, "failed": palette.VERMILLION}
_PATTERN = {"complete": "", "stopped": "/", "duplicate": ".", "failed": "x"}
_COLUMNS = (
    *(Column("until", "min"), *(Column(_SAID[state]) for state in _ENDED)),
    *(Column("trials per minute"), Column("median of a trial", "s")),
)


def build(facts: Facts) -> Figure:
    """From the first trial's start to the last one's end, in at most 40 equal spans."""
    trials = facts.trials
    title = f"{facts.study.name}: progress"
    ended = trials.states(*_ENDED)
    # What ended before it began was finished when it was made.
    finished = np.where(np.isfinite(trials.finished), trials.finished, trials.created)
    if not ended.any():
        message = "no trial has ended yet"
        return Figure(drawing.empty(message), Table(_COLUMNS, ()), title, drawing.sentence([message]))
    began = float(np.nanmin(trials.created))
    minutes = np.maximum((finished - began) / 60, 0.0)
    last = float(minutes[ended].max()) or 1 / 60
    bins = int(min(BINS, max(1, ended.sum())))
    edges = np.linspace(0.0, last, bins + 1)
    edges[-1] = np.nextafter(last, np.inf)
    counts = {s: np.histogram(minutes[trials.states(s)], edges)[0] for s in _ENDED}
    # Duplicates take no time: they are no part of a rate.
    per_minute = sum(counts[s] for s in _ENDED if s != "duplicate") / np.diff(edges)
    edges[-1] = last
    sums = {s: np.concatenate([[0], np.cumsum(counts[s])]) for s in _ENDED}
    where = np.digitize(minutes, edges[1:-1])
    lasted = trials.states("complete") & np.isfinite(trials.seconds)
    medians = [_median(trials.seconds[lasted & (where == index)]) for index in range(bins)]
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": _SAID[state],
            "x": drawing.array(edges),
            "y": drawing.array(sums[state]),
            "stackgroup": "ended",
            "line": {"width": 1.5, "color": _COLOR[state]},
            "fillpattern": {"shape": _PATTERN[state], "size": 6, "solidity": 0.3},
            "hovertemplate": f"%{{x:.3~g}} min: %{{y}} {_SAID[state]}<extra></extra>",
        }
        for state in _ENDED
        if counts[state].any()
    ]
    traces.append(
        {
            "type": "bar",
            "name": "trials per minute",
            "x": drawing.array((edges[1:] + edges[:-1]) / 2),
            "y": drawing.array(per_minute),
            "width": float(last / bins),
            "xaxis": "x",
            "yaxis": "y2",
            "marker": {"color": palette.GREY},
            "showlegend": False,
            "hovertemplate": "%{y:.3~g} trials per minute<extra></extra>",
        }
    )
    layout = {
        "xaxis": {**drawing.axis("time since the first trial (min)", ""), "anchor": "y2"},
        "yaxis": {**drawing.axis("ended trials", ""), "domain": [0.38, 1.0], "rangemode": "tozero"},
        "yaxis2": {**drawing.axis("per minute", ""), "domain": [0.0, 0.28], "rangemode": "tozero"},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "traceorder": "normal"},
        "margin": {"t": 56},
        "bargap": 0.1,
    }
    columns: list[list[Cell]] = [edges[1:].tolist(), *(sums[state][1:].tolist() for state in _ENDED)]
    columns += [per_minute.tolist(), [*medians]]
    table = Table(_COLUMNS, tuple(zip(*columns, strict=True)))
    return Figure({"data": traces, "layout": layout}, table, title, _note(facts, last))


def _median(values: Any) -> float | None:
    return finite(float(np.median(values))) if len(values) else None


def _note(facts: Facts, last: float) -> str:
    trials = facts.trials
    count = {state: int(trials.states(state).sum()) for state in (*_ENDED, "running")}
    every = sum(count[state] for state in _ENDED)
    evaluated = every - count["duplicate"]
    parts = [f"{every} {'trial' if every == 1 else 'trials'} in {duration(60 * last)}"]
    if evaluated:
        parts.append(f"{count['stopped'] / evaluated:.0%} of those evaluated were stopped early")
    if count["duplicate"]:
        parts.append(f"{count['duplicate'] / every:.0%} had a result already")
    if count["failed"]:
        parts.append(f"{count['failed']} failed")
    lasted = trials.seconds[trials.states("complete") & np.isfinite(trials.seconds)]
    if len(lasted):
        parts.append(f"a complete trial took {float(np.median(lasted)):.3g} s (median)")
    if count["running"]:
        parts.append(f"{count['running']} running")
    return drawing.sentence(parts)
