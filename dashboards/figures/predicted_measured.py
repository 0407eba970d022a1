"""What was foretold against what came: by the sampler of its proposals, or by a latency table of assembled models.

Points on the diagonal came out as predicted. Of quality, a trial that was stopped early counts by the estimate of its
full value, as in `autoq.search.sampler_view`; of latency, the search's prediction stands against the timed value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from autoq.display.compare import foretold_by_pairs, quality_objective
from autoq.search.sampler_view import view_of_pairs

from .. import drawing, palette
from ..columns import KINDS, ORIGINS, Floats, Trials
from . import Cell, Column, Facts, Figure, Table, finite
from .options import ObjectiveName, Option, objectives

OPTIONS: Mapping[str, Option] = {"objective": ObjectiveName()}
MOST = 5000  # trials that are drawn and judged
_BAND = (0.1, 0.9)  # quantiles of measured / predicted between which four of five trials came out


def build(facts: Facts, objective: str | None = None) -> Figure:
    """One objective; unless told otherwise the quality, or the first latency of a study without predictions of it."""
    trials, units = facts.trials, objectives(facts)
    quality = quality_objective(facts.study.objectives)
    if objective is None:
        candidates = [*([quality.name] if quality else []), *units]
        known = (name for name in candidates if _places(trials, name, quality and quality.name).any())
        objective = next(known, candidates[0])
    unit, name = units[objective], objective
    values = (Column("predicted", unit), Column("measured", unit), Column("standard error", unit))
    columns = (Column("trial"), Column("name"), *values, Column("state"))
    title = f"{facts.study.name}: {name}, predicted against measured"
    of_sampler = quality is not None and name == quality.name and not _timed(trials, name).any()
    place = np.flatnonzero(_places(trials, name, quality and quality.name))
    if not len(place):
        message = f"no trial has both a prediction and a measurement of {name}"
        return Figure(drawing.empty(message), Table(columns, ()), title, drawing.sentence([message]))
    every = len(place)
    if every > MOST:  # evenly over the study
        place = place[np.linspace(0, every - 1, MOST).round().astype(np.intp)]
    predicted, measured, error = _pairs(trials, name, of_sampler, place)
    both = np.concatenate([predicted, measured])
    log = drawing.is_log("auto", both) and bool(both.min() > 0)
    stopped = trials.states("stopped")[place]
    words, how = drawing.words(name, unit), "by the sampler" if of_sampler else "by the table"
    diagonal = _diagonal(predicted, measured, log)
    traces: list[dict[str, Any]] = [*diagonal]
    for early in (False, True):
        chosen = stopped == early
        if chosen.any():
            traces.append(_trace(trials, place, chosen, predicted, measured, error, early, unit))
    axis = drawing.axis(f"{words}, predicted {how}", unit, log, both)
    scale = unit if unit and unit != "bytes" else words
    layout: dict[str, Any] = {
        "xaxis": axis,
        "yaxis": drawing.axis(f"measured ({scale})", unit, log, both),
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "meta": {"objective": name},
        "margin": {"t": 56},
    }
    states = np.where(stopped, "stopped early, estimated", "complete").tolist()
    rows = zip(
        trials.number[place].tolist(),
        [trials.label(int(number)) for number in trials.number[place]],
        predicted.tolist(),
        measured.tolist(),
        [finite(value) for value in error.tolist()],
        states,
        strict=True,
    )
    cells: tuple[tuple[Cell, ...], ...] = tuple(rows)
    note = _note(name, of_sampler, predicted, measured, error)
    if every > MOST:
        note += f" {MOST} trials of {every}, evenly over the study."
    return Figure({"data": traces, "layout": layout}, Table(columns, cells), title, note)


def _timed(trials: Trials, name: str) -> NDArray[np.bool_]:
    """Trials with a predicted search value and a measured report value."""
    search, report = trials.measured(name, "search"), trials.measured(name, "report")
    timed: NDArray[np.bool_] = (
        (search.kind == KINDS.index("predicted")) & (report.kind == KINDS.index("measured")) & (report.value > 0)
    )
    return timed


def _places(trials: Trials, name: str, quality: str | None) -> NDArray[np.bool_]:
    timed = _timed(trials, name)
    if timed.any() or name != quality:
        return timed
    ended = trials.states("complete", "stopped") & (trials.origin == ORIGINS.index("sampler"))
    there: NDArray[np.bool_] = ended & np.isfinite(trials.predicted) & (trials.measured(name, "search").kind >= 0)
    return there


def _pairs(trials: Trials, name: str, of_sampler: bool, place: NDArray[np.intp]) -> tuple[Floats, Floats, Floats]:
    """Predicted, measured and its standard error (n,)."""
    search, report = trials.measured(name, "search"), trials.measured(name, "report")
    if of_sampler:
        return trials.predicted[place], search.expected[place], search.stderr[place]
    return search.value[place], report.value[place], report.stderr[place]


def _diagonal(predicted: Floats, measured: Floats, log: bool) -> list[dict[str, Any]]:
    """y = x, and where there are ratios the band between two quantiles of them."""
    low, high = float(min(predicted.min(), measured.min())), float(max(predicted.max(), measured.max()))
    ends = np.array([low, high])
    line = {"type": "scatter", "mode": "lines", "hoverinfo": "skip"}
    dashed = {"color": palette.GREY, "dash": "dash", "width": 1.5}
    found = [{**line, "name": "as predicted", "x": ends.tolist(), "y": ends.tolist(), "line": dashed}]
    if len(predicted) >= 8 and (predicted > 0).all() and (measured > 0).all():
        bounds = np.quantile(measured / predicted, _BAND)
        x = np.geomspace(predicted.min(), predicted.max(), 2) if log else np.array([predicted.min(), predicted.max()])
        outline = [*zip(x, x * bounds[0], strict=True), *zip(x[::-1], x[::-1] * bounds[1], strict=True)]
        found.insert(
            0,
            {
                **line,
                "name": "four of five trials",
                "x": [float(a) for a, _ in outline],
                "y": [float(b) for _, b in outline],
                "fill": "toself",
                "line": {"width": 0, "color": palette.BLUE},
                "opacity": 0.25,
            },
        )
    return found


def _trace(
    trials: Trials,
    place: NDArray[np.intp],
    chosen: NDArray[np.bool_],
    predicted: Floats,
    measured: Floats,
    error: Floats,
    early: bool,
    unit: str,
) -> dict[str, Any]:
    color = palette.VERMILLION if early else palette.BLUE
    trace: dict[str, Any] = {
        "type": "scattergl" if chosen.sum() > drawing.MANY else "scatter",
        "mode": "markers",
        "name": "stopped early, estimated" if early else "measured",
        "x": drawing.array(predicted[chosen]),
        "y": drawing.array(measured[chosen]),
        "customdata": drawing.array(trials.number[place][chosen]),
        "marker": {"symbol": "triangle-down-open" if early else "circle", "size": 8, "color": color},
        "hovertemplate": f"trial %{{customdata}}<br>predicted {drawing.hover('x', unit)}<br>"
        f"{'estimated' if early else 'measured'} {drawing.hover('y', unit)}<extra></extra>",
    }
    if np.isfinite(error[chosen]).any():
        bars = drawing.array(np.nan_to_num(error[chosen]))
        trace["error_y"] = {"type": "data", "array": bars, "thickness": 1, "width": 2, "color": palette.GREY}
    return trace


def _note(name: str, of_sampler: bool, predicted: Floats, measured: Floats, error: Floats) -> str:
    pairs = list(zip(predicted.tolist(), measured.tolist(), strict=True))
    parts = []
    if of_sampler:
        view = view_of_pairs(pairs)
        parts.append(str(view) if view else f"{len(pairs)} predictions are too few to judge")
        parts.append("predictions were made before the trial, values are of the search part")
    else:
        found = foretold_by_pairs(name, pairs)
        parts.append(str(found) if found else f"{len(pairs)} predictions are too few to judge")
        parts.append("predictions are sums of the timed table, measured values are of the assembled model")
    known = np.isfinite(error) & (error > 0)
    if known.any():
        within = float((np.abs(measured - predicted)[known] <= 2 * error[known]).mean())
        parts.append(f"{within:.0%} of the measurements are within two of their standard errors of the prediction")
        parts.append("bars are one standard error")
    if len(pairs) >= 8 and (predicted > 0).all() and (measured > 0).all():
        low, high = np.quantile(measured / predicted, _BAND)
        parts.append(f"four of five came out at {low:.2f} to {high:.2f} times the prediction, the shaded band")
    return drawing.sentence(parts)
