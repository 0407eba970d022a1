"""Where labels stand beside their points so that they cover neither each other nor other points."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 720.0, 300.0  # of a plot, in pixels; a wider one has more room
_LETTER, _LINE, _GAP, _DOT = 7.0, 16.0, 9.0, 5.0
_PLACES = (
    *("middle right", "middle left", "top center", "bottom center"),
    *("top right", "top left", "bottom right", "bottom left"),
)


@dataclass(frozen=True)
class Box:
    """A rectangle in pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """The area that two have in common."""
        across = min(self.right, other.right) - max(self.left, other.left)
        down = min(self.bottom, other.bottom) - max(self.top, other.top)
        return across * down if across > 0 and down > 0 else 0.0


def _box(x: float, y: float, text: str, place: str) -> Box:
    width = len(text) * _LETTER
    vertical, horizontal = place.split()
    left = {"right": x + _GAP, "left": x - _GAP - width, "center": x - width / 2}[horizontal]
    if vertical != "middle" and horizontal != "center":
        left = x if horizontal == "right" else x - width
    top = {"middle": y - _LINE / 2, "top": y - _GAP - _LINE, "bottom": y + _GAP}[vertical]
    return Box(left, top, left + width, top + _LINE)


def place(labels: Sequence[tuple[float, float, str]], dots: Sequence[tuple[float, float]]) -> list[str]:
    """A Plotly `textposition` for each label (x, y, text); x and y are shares of the plot, from left and bottom.

    Greedy, in the order given: of eight places the first that covers least of what is there. What sticks out of the
    plot counts as covered.
    """
    taken = [Box(x * WIDTH - _DOT, (1 - y) * HEIGHT - _DOT, x * WIDTH + _DOT, (1 - y) * HEIGHT + _DOT) for x, y in dots]
    found = []
    for x, y, text in labels:
        boxes = {name: _box(x * WIDTH, (1 - y) * HEIGHT, text, name) for name in _PLACES}
        costs = {name: sum(box.overlap(other) for other in taken) + 4 * _outside(box) for name, box in boxes.items()}
        best = min(_PLACES, key=lambda name: costs[name])
        taken.append(boxes[best])
        found.append(best)
    return found


def _outside(box: Box) -> float:
    area = (box.right - box.left) * (box.bottom - box.top)
    return area - box.overlap(Box(0, 0, WIDTH, HEIGHT))
