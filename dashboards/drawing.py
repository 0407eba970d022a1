"""What figures share: axes with units, numbers for Plotly, text that cannot be taken for markup."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from autoq.display import numbers

if TYPE_CHECKING:
    from autoq.store import StudyObjective

PACKED = 500  # numbers from which an array is sent as base64
MANY = 2000  # points from which WebGL draws them
SPREAD = 10.0  # largest over smallest from which an axis is logarithmic
VANISHING = 100.0  # how far below all searched values a baseline is no longer in sight on a logarithmic axis
LONGEST = 48  # characters of a name in a picture


def short(text: object, most: int = LONGEST) -> str:
    """A name in one line, cut where it is long."""
    shown = " ".join(str(text).split())
    return shown if len(shown) <= most else f"{shown[: most - 1]}…"


_TURNS = {code: f"⟨U+{code:X}⟩" for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def visible(text: str) -> str:
    """A text whose marks that turn the order of letters around, also of those after it, can be seen."""
    return text.translate(_TURNS)


def safe(text: object, most: int = LONGEST) -> str:
    """A name as Plotly shows it literally: it takes tags and entities of a text for markup. Long ones are cut."""
    return html.escape(visible(short(text, most)), quote=False)


def distinct(names: Iterable[object], most: int = LONGEST) -> list[str]:
    """Names as categories of an axis: literal, and cut from the left so that no two are the same."""
    found: list[str] = []
    taken: set[str] = set()
    for name in names:
        whole = visible(" ".join(str(name).split()))
        shown, count = whole if len(whole) <= most else f"…{whole[1 - most :]}", 1
        while shown in taken:
            count += 1
            shown = f"{whole[: most - 6]}… ({count})"
        taken.add(shown)
        found.append(html.escape(shown, quote=False))
    return found


def array(values: Sequence[float] | NDArray[Any]) -> Any:
    """Finite numbers for Plotly: a list, or from `PACKED` on its typed array, `{"dtype", "bdata"}`."""
    whole = np.asarray(values)
    assert np.isfinite(whole).all(), "a missing value has no place in an array"
    if len(whole) < PACKED:
        found: list[float] = whole.tolist()
        return found
    small = whole.dtype.kind in "iu" and abs(whole).max() < 2**31
    kind = "i4" if small else "f8"
    little = np.ascontiguousarray(whole.astype(f"<{kind}"))
    return {"dtype": kind, "bdata": base64.b64encode(little.tobytes()).decode()}


def unpacked(values: Any) -> list[float]:
    """The inverse of `array`."""
    if isinstance(values, dict):
        kind = f"<{values['dtype']}"
        found: list[float] = np.frombuffer(base64.b64decode(values["bdata"]), kind).tolist()
        return found
    return list(values)


def is_log(scale: str, values: NDArray[np.float64]) -> bool:
    """Whether an axis is logarithmic: as `scale` says (`log`, `linear`), or for `auto` by the spread of positive ones.

    What is not positive has no place on a logarithmic axis; where that is all there is, it is linear.
    """
    positive = values[values > 0]
    if scale == "linear" or not len(positive):
        return False
    return scale == "log" or bool(positive.max() / positive.min() >= SPREAD)


def words(objective: str, unit: str) -> str:
    """An axis title: the objective's name with its unit."""
    return f"{safe(objective)} ({safe(unit)})" if unit and unit != "bytes" else safe(objective)


def axis(title: str, unit: str, log: bool = False, values: NDArray[np.float64] | None = None) -> dict[str, Any]:
    """An axis: its title, ticks that read well, bytes as 120MB. `values` are what a logarithmic one must show."""
    made: dict[str, Any] = {"title": {"text": title}}
    if unit == "bytes":
        made |= {"tickformat": "~s", "ticksuffix": "B"}
    if log:
        made |= {"type": "log", "minor": {"ticks": "outside", "ticklen": 2}}
        positive = np.array([]) if values is None else values[values > 0]
        # 1, 2, 5 in every decade; of many decades their beginnings.
        if unit != "bytes":
            made["tickformat"] = "~g"
        made["dtick"] = "D2" if len(positive) and positive.max() / positive.min() < 2000 else 1
    else:
        made |= {"type": "linear"}
    return made


def hover(letter: str, unit: str) -> str:
    """How a value reads in a hover text."""
    return f"%{{{letter}:.4s}}B" if unit == "bytes" else f"%{{{letter}:.4~g}} {safe(unit)}".rstrip()


def ends(values: NDArray[np.float64], log: bool, room: float = 0.06) -> list[float]:
    """Ends of an axis around its values; of a logarithmic one in decades."""
    if log:
        values = np.log10(values[values > 0])
    low, high = float(values.min()), float(values.max())
    margin = (high - low) * room or (0.1 if log else abs(low) * 0.1 or 1.0)
    return [float(f"{low - margin:.6g}"), float(f"{high + margin:.6g}")]


def log_ticks(low: float, high: float, most: int = 7) -> tuple[list[float], list[str]]:
    """Ticks of a scale of log10 values that Plotly takes for a linear one, and their texts."""
    first, last = int(np.floor(low)), int(np.ceil(high))
    decades = range(int(np.ceil(low)), int(np.floor(high)) + 1)
    exact = [(float(d), f"{10.0**d:g}") for d in decades]
    if len(exact) < 3:
        places = [(d + float(np.log10(m)), f"{m * 10.0**d:g}") for d in range(first, last + 1) for m in (1, 2, 5)]
        exact = [(at, text) for at, text in places if low - 1e-9 <= at <= high + 1e-9]
    step = -(-len(exact) // most) if exact else 1
    kept = exact[::step] or [(low, f"{10.0**low:.2g}")]
    return [at for at, _ in kept], [text for _, text in kept]


def size_ticks(low: float, high: float, most: int = 6) -> tuple[list[float], list[str]]:
    """Round numbers of bytes between two, and their texts."""
    span = max(high - low, 1.0)
    step = 10.0 ** np.floor(np.log10(span / most))
    step *= next(factor for factor in (1, 2, 5, 10) if span / (step * factor) <= most)
    found = np.arange(np.ceil(low / step), np.floor(high / step) + 1) * step
    return found.tolist(), [f"{numbers.size(value)}" for value in found.tolist()]


def costs(values: NDArray[np.float64], directions: Sequence[str]) -> NDArray[np.float64]:
    """Points (n, objectives) turned so that less is better."""
    turned: NDArray[np.float64] = values * np.array([1.0 if each == "minimize" else -1.0 for each in directions])
    return turned


def staircase(x: NDArray[np.float64], y: NDArray[np.float64], directions: tuple[str, str]) -> NDArray[np.intp]:
    """Indices of the points that no other one beats in both, by rising x; of equal ones the first."""
    turned = costs(np.stack([x, y], 1), directions)
    order = np.lexsort((turned[:, 1], turned[:, 0]))
    kept: list[int] = []
    best = np.inf
    for index in order:
        if turned[index, 1] < best:
            best = turned[index, 1]
            kept.append(int(index))
    return np.array(sorted(kept, key=lambda index: x[index]), dtype=np.intp)


def step_shape(x_direction: str) -> str:
    """How Plotly joins a staircase: what a point reaches, everything worse in x reaches too."""
    return "hv" if x_direction == "minimize" else "vh"


def direction_of(objectives: Iterable[StudyObjective], name: str) -> str | None:
    """`minimize` or `maximize`; None for what is no objective of the study."""
    return next((o.direction for o in objectives if o.name == name), None)


def sentence(parts: Iterable[str]) -> str:
    """Parts of a note as sentences."""
    return " ".join(f"{_begun(part)}." for part in parts if part)


def _begun(part: str) -> str:
    """With a capital, unless it begins with a name."""
    first = part.split(maxsplit=1)[0]
    return part if "_" in first or "." in first[:-1] else part[0].upper() + part[1:]


def empty(message: str) -> dict[str, Any]:
    """A picture of nothing, which says why."""
    note = {"text": safe(message, 200), "showarrow": False, "xref": "paper", "yref": "paper", "x": 0.5, "y": 0.5}
    hidden = {"visible": False}
    return {"data": [], "layout": {"annotations": [note], "xaxis": hidden, "yaxis": hidden}}
