"""Sensitivities for people: per kind of module, the layers at both ends, and the frontier they predict."""

from __future__ import annotations

import csv
import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from autoq.display import numbers
from autoq.display.tables import plain

if TYPE_CHECKING:
    from autoq.search.survey import Survey

ENDS = 5  # layers shown at either end
_CELL = 14  # columns of a terminal that one scheme takes
_NUMBERED = re.compile(r"^.*\.\d+\.")


def module_kind(layer: str) -> str:
    """What a layer is in its block: `model.layers.3.self_attn.q_proj` is `self_attn.q_proj`."""
    return _NUMBERED.sub("", layer)


def by_kind(losses: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Module kind -> scheme -> summed loss."""
    sums: dict[str, dict[str, float]] = {}
    for layer, own in losses.items():
        row = sums.setdefault(module_kind(layer), {})
        for scheme, loss in own.items():
            row[scheme] = row.get(scheme, 0.0) + loss
    return sums


def rows(survey: Survey) -> list[tuple[str, str, float, int, float | None]]:
    """Layer, scheme, loss, bytes, and loss per byte saved (None where nothing is saved), one per choice."""
    found = []
    for layer, losses in survey.layers.items():
        for scheme, loss in losses.items():
            size = survey.sizes[layer][scheme]
            saved = survey.kept[layer] - size
            found.append((layer, scheme, loss, size, loss / saved if saved > 0 else None))
    return found


def to_csv(survey: Survey) -> str:
    """`rows` as comma-separated values; losses are predicted."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(["layer", "scheme", "predicted_loss", "unit", "size_bytes", "predicted_loss_per_byte_saved"])
    for layer, scheme, loss, size, per_byte in rows(survey):
        writer.writerow([layer, scheme, loss, survey.unit, size, "" if per_byte is None else per_byte])
    return out.getvalue()


def tables(survey: Survey, width: int) -> list[RenderableType]:
    """All of it, `width` columns wide."""
    parts: list[RenderableType] = [
        Text(f"Predicted loss in {survey.unit}, summed over the layers of a kind, and its share of the scheme's total")
    ]
    sums = by_kind(survey.layers)
    schemes = list(dict.fromkeys(scheme for row in sums.values() for scheme in row))
    room = max(1, (width - max(map(len, [*sums, "all"])) - 2) // (_CELL + 2))
    for start in range(0, len(schemes), room):
        parts += [Text(), _kinds(sums, schemes[start : start + room])]
    return [*parts, Text(), *_ends(survey), Text(), *_frontier(survey)]


def _kinds(sums: Mapping[str, Mapping[str, float]], schemes: Sequence[str]) -> RenderableType:
    totals = {scheme: sum(row.get(scheme, 0.0) for row in sums.values()) for scheme in schemes}

    def cell(row: Mapping[str, float], scheme: str) -> str:
        if scheme not in row:
            return ""
        share = row[scheme] / totals[scheme] if totals[scheme] > 0 else 0.0
        return f"{row[scheme]:.3g} {share:>4.0%}"

    body = [[kind, *(cell(row, scheme) for scheme in schemes)] for kind, row in sums.items()]
    body.append(["all", *(f"{totals[scheme]:.3g}     " for scheme in schemes)])
    headers = ["", *("\n".join(textwrap.wrap(scheme, _CELL)) for scheme in schemes)]
    return plain(headers, body, right=range(1, len(schemes) + 1))


def _ends(survey: Survey) -> list[RenderableType]:
    """Layers under their lightest scheme by loss per byte saved: the dearest, then the cheapest."""
    lightest: dict[str, tuple[int, str, float, float]] = {}
    for layer, scheme, loss, size, per_byte in rows(survey):
        if per_byte is not None and (layer not in lightest or size < lightest[layer][0]):
            lightest[layer] = (size, scheme, loss, per_byte)
    ranked = sorted(lightest.items(), key=lambda item: -item[1][3])
    if not ranked:
        return [Text("no choice of any layer saves a byte")]
    shown = ranked if len(ranked) <= 2 * ENDS else [*ranked[:ENDS], *ranked[-ENDS:]]
    body = [[name, scheme, f"{loss:.3g}", f"{1e6 * per:.3g}"] for name, (_, scheme, loss, per) in shown]
    if len(shown) < len(ranked):
        body.insert(ENDS, [f"… {len(ranked) - len(shown)} more", "", "", ""])
    title = Text("Most and least sensitive layers, each under its lightest scheme: loss per MB saved")
    return [title, Text(), plain(["layer", "scheme", "loss", "per MB"], body, right=(2, 3))]


def _frontier(survey: Survey) -> list[RenderableType]:
    axis = "size" if survey.axis == "size_bytes" else survey.axis.removesuffix("_bytes").replace("_", " ")
    title = Text(f"Predicted frontier of the whole model: least loss ({survey.unit}) within each {axis}")
    body = []
    for point in survey.frontier:
        uniform = "" if point.baseline is None else f"{_loss(point.baseline_loss)}  {point.baseline}"
        sure = "" if point.exact else "≤"
        bits = numbers.number(point.bits_per_weight, "")
        body.append([numbers.size(point.budget_bytes), bits, sure + _loss(point.loss), uniform])
    parts: list[RenderableType] = [
        title,
        Text(),
        plain([axis, "bits/weight", "predicted loss", "uniform, predicted"], body, right=(0, 1, 2)),
        Text("\nThese are predictions, not measurements; autoq search measures.", style="dim"),
    ]
    if not all(point.exact for point in survey.frontier):
        parts.append(Text("≤  the best found; not proved to be the least", style="dim"))
    return parts


def _loss(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
