"""Layers of a trial by the loss that their last bytes avoid, and beside it what more bytes would.

In an exact solution for one budget every layer's last step pays more per byte than any layer's next step would: the
two meet at one price. Bars below that price are bytes that another layer would use better, by these predictions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from autoq.display import numbers

from .. import drawing, palette
from ..losses import Choice, choices, loss_unit
from ..picks import default_trial
from . import Cell, Column, Facts, Figure, Table
from .options import Count, Option, TrialName

MOST = 24
OPTIONS: Mapping[str, Option] = {"trial": TrialName(), "most": Count(2, 200)}


def build(facts: Facts, trial: int | None = None, most: int = MOST) -> Figure:
    """The layers at both ends of a trial's ranking; unless told otherwise of the knee of the frontier."""
    unit = f"{loss_unit(facts)}/MB"
    columns = (
        *(Column("layer"), Column("scheme"), Column("instead of"), Column("paid for", "bytes")),
        *(Column("loss avoided", unit), Column("next"), Column("would cost", "bytes"), Column("would avoid", unit)),
    )
    trial = default_trial(facts) if trial is None else trial
    assignment = None if trial is None else facts.trial(trial).assignment
    title = f"{facts.study.name}: which layers pay" + ("" if trial is None else f" in {facts.trials.label(trial)}")
    found = [] if assignment is None else choices(assignment, facts.layers, facts.sensitivity)
    ranked = sorted((each for each in found if each.paid), key=lambda each: (-_rate(each), each.layer))
    if not ranked:
        message = (
            "no feasible trial is complete yet"
            if trial is None
            else "no layer has a lighter scheme whose loss was predicted"
        )
        return Figure(drawing.empty(message), Table(columns, ()), title, drawing.sentence([message]))
    head = most - most // 3
    shown = ranked if len(ranked) <= most else [*ranked[:head], *ranked[-(most // 3) :]]
    names = drawing.distinct((each.layer for each in shown), 40)
    texts = [f"{drawing.safe(each.paid.lighter)} → {drawing.safe(each.scheme)}" for each in shown if each.paid]
    traces: list[dict[str, Any]] = [
        {
            "type": "bar",
            "orientation": "h",
            "name": "avoided by the last step",
            "x": [_rate(each) for each in shown],
            "y": names,
            "marker": {"color": palette.BLUE},
            "hovertext": texts,
            "hovertemplate": _hover(f"{unit} avoided"),
        }
    ]
    offered = [(name, each.offered) for name, each in zip(names, shown, strict=True) if each.offered is not None]
    if offered:
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": "would be avoided by the next",
                "x": [step.rate for _, step in offered],
                "y": [name for name, _ in offered],
                "marker": {"symbol": "diamond", "size": 8, "color": palette.VERMILLION},
                "hovertext": [f"{drawing.safe(step.lighter)} → {drawing.safe(step.heavier)}" for _, step in offered],
                "hovertemplate": _hover(f"{unit} more"),
            }
        )
    layout = {
        "xaxis": drawing.axis(f"predicted loss avoided ({drawing.safe(unit)})", ""),
        "yaxis": {"type": "category", "autorange": "reversed", "showgrid": False},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "height": 20 * len(shown) + 140,
        "margin": {"t": 56},
        "meta": {"trial": trial},
    }
    table = Table(columns, tuple(_row(each) for each in shown))
    return Figure({"data": traces, "layout": layout}, table, title, _note(ranked, shown))


def _hover(unit: str) -> str:
    return f"%{{y}}<br>%{{hovertext}}<br>%{{x:.3~g}} {drawing.safe(unit)}, predicted<extra></extra>"


def _rate(choice: Choice) -> float:
    return 0.0 if choice.paid is None else choice.paid.rate


def _row(choice: Choice) -> tuple[Cell, ...]:
    paid, offered = choice.paid, choice.offered
    assert paid is not None
    following: tuple[Cell, ...] = (None, None, None)
    if offered is not None:
        following = (offered.heavier, offered.nbytes, offered.rate)
    return (choice.layer, choice.scheme, paid.lighter, paid.nbytes, paid.rate, *following)


def _note(ranked: list[Choice], shown: list[Choice]) -> str:
    parts = ["bars: loss that a layer's last step to a heavier scheme avoids per MB, predicted, not measured"]
    parts.append(
        "diamonds: what the next step would avoid; a diamond beyond another layer's bar is a trade worth trying"
    )
    if len(shown) < len(ranked):
        parts.append(f"{len(ranked) - len(shown)} layers between the two ends are not drawn")
    spent = sum(each.paid.nbytes for each in ranked if each.paid)
    parts.append(f"the last steps of all layers take {numbers.size(spent)}")
    return drawing.sentence(parts)
