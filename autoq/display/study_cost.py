"""A study's predicted costs for people: a table, and what it rests on."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from autoq.display import numbers
from autoq.display.tables import plain

if TYPE_CHECKING:
    from autoq.search.costing import Figure, StudyCost


def _value(figure: Figure) -> str:
    if figure.unit != "s":
        return numbers.number(figure.value, figure.unit)
    if figure.value >= 60:
        return numbers.duration(figure.value)
    return f"{figure.value:.3g} s"


def tables(found: StudyCost) -> list[RenderableType]:
    """All of it."""
    workers = f"{found.workers} worker{'s' * (found.workers > 1)}"
    rows = [(figure.what, _value(figure), figure.basis, figure.how) for figure in found.figures]
    return [
        Text(f"Predicted for {found.study}: {found.trials:,} trials of {found.model} on {found.target}, {workers}"),
        Text(),
        plain(("", "predicted", "basis", "how"), rows, right=(1,)),
        Text(),
        *(Text(f"- {line}") for line in found.assumptions),
    ]
