"""Colours, for light and dark, that people with any colour vision can tell apart.

Categories are of Okabe and Ito ("Color Universal Design", 2008), of whose eight colours four stand out from white
and from near-black alike (at least 3 : 1, WCAG 2.2 success criterion 1.4.11); ordered quantities are cividis
(Nuñez, Anderton & Renslow 2018, doi:10.1371/journal.pone.0199239). Nothing is told by colour alone.

What depends on the page's background stands in a Plotly template and not in the figures: `template(theme)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

Theme = Literal["light", "dark"]
THEMES: tuple[Theme, ...] = get_args(Theme)

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
CATEGORIES = (BLUE, VERMILLION, GREEN, PURPLE)
GREY = "#808080"

# Symbols beside colours: a study, a state.
SYMBOLS = ("circle", "square", "diamond", "cross", "triangle-up", "star", "hexagon", "pentagon")

# Less, nothing, more: blue to grey to vermillion.
DIVERGING = (BLUE, "#b8b8b8", VERMILLION)

GROUND: dict[Theme, str] = {"light": "#ffffff", "dark": "#15181d"}
INK: dict[Theme, str] = {"light": "#1f2328", "dark": "#e6e8eb"}
_FAINT: dict[Theme, str] = {"light": "#e3e5e8", "dark": "#32373e"}
_LINE: dict[Theme, str] = {"light": "#8a9099", "dark": "#79808a"}


def template(theme: Theme) -> dict[str, Any]:
    """A Plotly template with all that a background decides: paper, ink, grids, outlines."""
    ground, ink, faint, line = GROUND[theme], INK[theme], _FAINT[theme], _LINE[theme]
    axis = {
        "gridcolor": faint,
        "zerolinecolor": faint,
        "linecolor": line,
        "tickcolor": line,
        "ticks": "outside",
        "showline": True,
        "automargin": True,
        "title": {"standoff": 8},
    }
    bar = {"outlinewidth": 0, "ticks": "outside", "tickcolor": line, "thickness": 12}
    return {
        "layout": {
            "paper_bgcolor": ground,
            "plot_bgcolor": ground,
            "font": {"color": ink, "family": "system-ui, sans-serif", "size": 13},
            "xaxis": axis,
            "yaxis": axis,
            "colorway": list(CATEGORIES),
            "coloraxis": {"colorbar": bar, "colorscale": _ordered(theme)},
            "hoverlabel": {"bgcolor": ground, "bordercolor": line, "font": {"color": ink}, "align": "left"},
            "legend": {"bgcolor": "rgba(0,0,0,0)"},
            "hovermode": "closest",
            "margin": {"l": 60, "r": 20, "t": 24, "b": 48},
        },
        "data": {
            "heatmap": [{"colorbar": bar}],
            "scatter": [{"marker": {"line": {"color": ink}}}],
            "scattergl": [{"marker": {"line": {"color": ink}}}],
            "parcoords": [{"labelfont": {"color": ink}, "tickfont": {"color": ink}, "rangefont": {"color": ink}}],
        },
    }


def _ordered(theme: Theme) -> list[list[float | str]]:
    """Cividis without the end that the ground swallows."""
    return scale(_CIVIDIS[0:8] if theme == "light" else _CIVIDIS[3:10])


def scale(stops: Sequence[str] = ()) -> list[list[float | str]]:
    """A Plotly colour scale of evenly spaced stops (default: cividis)."""
    known = stops or _CIVIDIS
    return [[round(index / (len(known) - 1), 4), color] for index, color in enumerate(known)]


def spread(count: int) -> list[str]:
    """`count` colours of cividis, evenly from dark to light; one alone is from the middle."""
    return [at(index / (count - 1) if count > 1 else 0.5) for index in range(count)]


def at(place: float, stops: Sequence[str] | None = None) -> str:
    """The colour at a place, 0 to 1, between evenly spaced `stops` (default: cividis)."""
    known = [tuple(bytes.fromhex(stop.lstrip("#"))) for stop in stops or _CIVIDIS]
    low = min(int(place * (len(known) - 1)), len(known) - 2)
    share = place * (len(known) - 1) - low
    mixed = [round(a + share * (b - a)) for a, b in zip(known[low], known[low + 1], strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def luminance(color: str) -> float:
    """Relative luminance of an sRGB colour, 0 to 1 (WCAG 2.2)."""
    parts = [channel / 255 for channel in bytes.fromhex(color.lstrip("#"))]
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(a: str, b: str) -> float:
    """Contrast ratio of two colours, 1 to 21 (WCAG 2.2)."""
    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def ink_on(color: str) -> str:
    """White or black, whichever reads better on a colour."""
    return max(("#ffffff", "#000000"), key=lambda ink: contrast(ink, color))


# Ten stops, as Plotly has them.
_CIVIDIS = (
    *("#00224e", "#123570", "#3b496c", "#575d6d", "#707173"),
    *("#8a8678", "#a59c74", "#c3b369", "#e1cc55", "#fee838"),
)
