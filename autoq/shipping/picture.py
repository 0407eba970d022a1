"""The frontier as an SVG for the model card: no library, no fonts, nothing to load.

Light and dark: colours follow the reader's scheme where the viewer tells it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 720, 420
LEFT, RIGHT, TOP, BOTTOM = 78, 24, 44, 58
_STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#333}.axis{stroke:#bbb}.grid{stroke:#eee}.front{fill:#2563eb}"
    ".line{fill:none;stroke:#2563eb;stroke-opacity:.45}.base{fill:none;stroke:#c2410c;stroke-width:1.6}"
    ".bar{stroke:#2563eb;stroke-opacity:.5}.pick{fill:none;stroke:#16a34a;stroke-width:2.5}.small{font-size:11px}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}.axis{stroke:#666}.grid{stroke:#333}}"
)


@dataclass(frozen=True)
class Dot:
    """One trial: `x` and `y` with the standard error of `y`; `name` for a baseline; `picked` for the exported."""

    x: float
    y: float
    error: float = 0.0
    name: str | None = None
    picked: bool = False


class _Axis:
    """From values to pixels; logarithmic where all values are positive and span more than a factor of 5."""

    def __init__(self, values: Sequence[float], start: float, end: float) -> None:
        low, high = min(values), max(values)
        self.log = low > 0 and high / low > 5
        self._start, self._end = start, end
        a, b = (math.log10(low), math.log10(high)) if self.log else (low, high)
        room = (b - a) * 0.06 or abs(a) * 0.06 or 1.0
        self._low, self._high = a - room, b + room

    def __call__(self, value: float) -> float:
        position = math.log10(max(value, 1e-300)) if self.log else value
        share = (position - self._low) / (self._high - self._low)
        return self._start + min(max(share, 0.0), 1.0) * (self._end - self._start)

    def ticks(self) -> list[float]:
        """Four to nine round numbers within the axis."""
        if self.log:
            found = [m * 10.0**e for e in range(math.floor(self._low), math.ceil(self._high)) for m in (1, 2, 5)]
            found = [tick for tick in found if self._low <= math.log10(tick) <= self._high]
            return found if len(found) <= 9 else [tick for tick in found if f"{tick:e}"[0] == "1"]
        span = self._high - self._low
        step = 10 ** math.floor(math.log10(span / 4))
        step *= next(m for m in (1, 2, 5, 10) if span / (step * m) <= 7)
        first = math.ceil(self._low / step)
        return [index * step for index in range(first, math.floor(self._high / step) + 1)]


def _in_sight(dots: Sequence[Dot]) -> list[Dot]:
    searched = [dot.y for dot in dots if dot.name is None and dot.y > 0]
    floor = min(searched, default=0.0) / 100
    return [dot for dot in dots if dot.picked or dot.name is None or dot.y >= floor]


def svg(dots: Sequence[Dot], title: str, x_label: str, y_label: str, x_factor: float = 1.0) -> str:
    """An SVG document of dots that are better the lower and the further left: those without a name that no other
    one beats in both are joined, baselines are rings with their names, the picked one is circled. `x_factor`
    divides the numbers on the x axis (10**6 for megabytes).

    A dot that all but vanishes on a logarithmic scale (an unquantized model, whose loss is rounding) is left out,
    unless it is picked: it would press all others into a corner.
    """
    assert dots
    dots = _in_sight(dots)
    x = _Axis([dot.x for dot in dots], LEFT, WIDTH - RIGHT)
    y = _Axis([dot.y for dot in dots], HEIGHT - BOTTOM, TOP)
    front: list[Dot] = []
    for dot in sorted((dot for dot in dots if dot.name is None), key=lambda dot: (dot.x, dot.y)):
        if not front or dot.y < front[-1].y:
            front.append(dot)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text x="{LEFT}" y="24" font-weight="600">{escape(title)}</text>',
    ]
    for tick in x.ticks():
        at = x(tick)
        parts.append(f'<line class="grid" x1="{at:.1f}" y1="{TOP}" x2="{at:.1f}" y2="{HEIGHT - BOTTOM}"/>')
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 18}" text-anchor="middle">{tick / x_factor:g}</text>')
    for tick in y.ticks():
        at = y(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" y1="{at:.1f}" x2="{WIDTH - RIGHT}" y2="{at:.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{tick:g}</text>')
    parts.append(f'<path class="axis" fill="none" d="M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}"/>')
    center, middle = (LEFT + WIDTH - RIGHT) / 2, (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text x="{center}" y="{HEIGHT - 16}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(
        f'<text x="18" y="{middle}" text-anchor="middle" transform="rotate(-90 18 {middle})">{escape(y_label)}</text>'
    )
    if len(front) > 1:
        path = "L".join(f"{x(dot.x):.1f},{y(dot.y):.1f}" for dot in front)
        parts.append(f'<path class="line" d="M{path}"/>')
    for dot in dots:
        across, up = x(dot.x), y(dot.y)
        if dot.error:
            low, high = y(dot.y - dot.error), y(dot.y + dot.error)
            parts.append(f'<path class="bar" d="M{across:.1f},{low:.1f}V{high:.1f}"/>')
        if dot.name is None:
            parts.append(f'<circle class="front" cx="{across:.1f}" cy="{up:.1f}" r="4"/>')
        else:
            anchor, shift = ("end", -9) if across > WIDTH - 190 else ("start", 9)
            parts.append(f'<circle class="base" cx="{across:.1f}" cy="{up:.1f}" r="4.5"/>')
            parts.append(
                f'<text class="small" x="{across + shift:.1f}" y="{up + 4:.1f}" text-anchor="{anchor}">'
                f"{escape(dot.name)}</text>"
            )
        if dot.picked:
            parts.append(f'<circle class="pick" cx="{across:.1f}" cy="{up:.1f}" r="9"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"
