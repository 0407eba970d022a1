"""What every figure keeps, of every study: a valid picture, a table of the same numbers, no markup, no NaN."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator
from typing import Any

import plotly.graph_objects as go
import pytest

from autoq.dashboards import drawing, figures, palette
from autoq.dashboards.study_view import View
from autoq.errors import BadInput, UnknownName

TAGS = re.compile(r'<(?!br>|extra></extra>|/extra>|span style="color:#[0f]{6}">|/span>)[^>]*>?')
# Named by us and not by a study.
OURS = {"hovertemplate", "texttemplate"}


def strings(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, inner in value.items():
            if name != "meta":  # for programs
                yield from strings(inner, name)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from strings(inner, key)


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        if set(value) == {"dtype", "bdata"}:
            yield from drawing.unpacked(value)
        else:
            for inner in value.values():
                yield from numbers(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from numbers(inner)
    elif isinstance(value, float | int) and not isinstance(value, bool):
        yield value


@pytest.fixture(params=figures.names())
def figure(request: pytest.FixtureRequest, view: View) -> figures.Figure:
    return view.figure(request.param)


def test_is_a_valid_picture_in_both_themes(figure: figures.Figure) -> None:
    for theme in palette.THEMES:
        made = go.Figure(figure.themed(theme))
        assert len(made.data) == len(figure.plotly["data"])
        assert made.layout.template.layout.paper_bgcolor == palette.GROUND[theme]
    assert "template" not in figure.plotly["layout"]
    with pytest.raises(UnknownName, match="choose from dark, light"):
        figure.themed("sepia")  # type: ignore[arg-type]


def test_says_what_it_shows(figure: figures.Figure) -> None:
    assert figure.title.strip()
    assert re.fullmatch(r"[^\n]+[.:!?)]", figure.note), figure.note
    if not figure.plotly["data"]:
        (annotation,) = figure.plotly["layout"]["annotations"]
        assert annotation["text"]
        assert figure.table.rows == ()
    else:
        assert figure.table.rows


def test_everything_is_json_without_nan(figure: figures.Figure) -> None:
    text = json.dumps(figure.to_json(), allow_nan=False)
    assert json.loads(text)["plotly"] == figure.plotly
    assert all(map(math.isfinite, numbers(figure.plotly)))
    for row in figure.table.rows:
        assert len(row) == len(figure.table.columns)
        assert not any(isinstance(cell, float) and not math.isfinite(cell) for cell in row)
    assert len(figure.table.text()) == len(figure.table.rows)
    assert figure.table.to_json(1)["total"] == len(figure.table.rows)


def test_no_name_is_taken_for_markup(figure: figures.Figure) -> None:
    for key, text in strings(figure.plotly):
        assert not TAGS.search(text), (key, text)
        assert key not in OURS or "long long" not in text


def test_is_the_same_each_time(request: pytest.FixtureRequest, view: View) -> None:
    for name in figures.names():
        first = view.figure(name)
        again = View(view._store, view.id).figure(name)
        assert json.dumps(first.to_json()) == json.dumps(again.to_json())


def test_axes_have_units(figure: figures.Figure) -> None:
    """Each axis that is shown has a title, or is of categories."""
    if not figure.plotly["data"]:
        return
    cartesian = [t for t in figure.plotly["data"] if t["type"] in ("scatter", "scattergl", "bar")]
    for letter in ("x", "y"):
        for name in {t.get(f"{letter}axis", letter).replace(letter, f"{letter}axis", 1) for t in cartesian}:
            axis = figure.plotly["layout"][name]
            assert axis.get("title", {}).get("text") or axis.get("type") == "category" or axis.get("matches"), name


@pytest.mark.parametrize("name", figures.names())
def test_unknown_options_name_the_choices(name: str, views: Callable[[str], View]) -> None:
    with pytest.raises(UnknownName, match=f"no option of figure {name} 'colour'"):
        views("ordinary").figure(name, colour="x")
    _, options = figures.load(name)
    for option in options:
        with pytest.raises(BadInput, match=r"\w") as problem:
            views("ordinary").figure(name, **{option: "no such <value>"})
        assert "\n" not in str(problem.value)
        assert views("ordinary").figure(name, **{option: ""}).table == views("ordinary").figure(name).table


def test_unknown_figures_name_the_choices(views: Callable[[str], View]) -> None:
    with pytest.raises(UnknownName, match="no figure 'frontire'; did you mean 'frontier'"):
        views("ordinary").figure("frontire")


def test_quantized_caches_are_cells_of_their_attention_modules(views: Callable[[str], View]) -> None:
    figure = views("caches").figure("layer_map", trial="3")
    (heatmap,) = figure.plotly["data"]
    column = heatmap["x"].index("self_attn")
    texts = [re.sub(r"<[^>]*>", "", row[column]) for row in heatmap["text"]]
    assert texts == ["8 kv", "8 kv", "", ""]
    rows = {row[0]: row for row in figure.table.rows}
    assert rows["model.layers.0.self_attn"][4:7] == ("kv8", 8, None)
    assert "KV cache" in figure.note
    assert "together" in figure.note
