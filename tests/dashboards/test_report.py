"""The report is one file that asks for nothing, shows every figure, and lets no name become markup or script."""

from __future__ import annotations

import html
import json
import re
from html.parser import HTMLParser

import plotly.graph_objects as go
import pytest

from autoq.dashboards import report
from autoq.errors import AutoQError, NotFound
from autoq.store import Store

VOID = {"meta", "link", "br", "img", "input"}


class Page(HTMLParser):
    """What a browser makes of a page: elements, scripts with their texts, cells of tables."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.scripts, self.tables = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            kind, text = self.scripts[-1]
            self.scripts[-1] = (kind, text + data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data


SHOWN = ("ordinary", "one", "names that are markup", "infeasible", "maximized", "four objectives", "zeros")


@pytest.fixture(params=SHOWN)
def page(request, database):
    store, ids = database
    text = report.html(store, ids[request.param])
    return store.study(ids[request.param]), text, Page(text)


def test_is_well_formed_and_asks_for_nothing(page):
    _, _, parsed = page
    assert parsed.open == []
    policy = next(a["content"] for t, a in parsed.elements if t == "meta" and a.get("http-equiv"))
    assert "default-src 'none'" in policy
    tags = {tag for tag, _ in parsed.elements}
    assert tags & {"img", "iframe", "object", "embed", "link", "base", "form", "a"} == set()
    attributes = {name for _, own in parsed.elements for name in own}
    assert attributes & {"src", "href", "srcset", "action", "data"} == set()
    assert not any(name.startswith("on") for name in attributes)


def test_every_picture_is_whole_and_has_its_table(page):
    _, _, parsed = page
    figures = [json.loads(text) for kind, text in parsed.scripts if kind == "application/json"]
    assert figures
    assert len(figures) == len(parsed.tables)
    for figure, table in zip(figures, parsed.tables, strict=True):
        assert go.Figure(figure).data
        header, *rows = table
        assert rows
        assert all(len(row) == len(header) for row in rows)


def test_no_name_becomes_a_script(page):
    """Our own scripts are three kinds: a picture's data, Plotly, and the page's code."""
    _, _, parsed = page
    programs = [text for kind, text in parsed.scripts if kind is None]
    assert len(programs) == 2
    assert "alert(" not in programs[1]


def test_names_survive_literally(database):
    store, ids = database
    parsed = Page(report.html(store, ids["names that are markup"]))
    cells = {cell for table in parsed.tables for row in table for cell in row}
    assert any(cell.startswith("<img src=x onerror=alert(1)></script>") for cell in cells)


def test_says_what_came_and_how(database):
    store, ids = database
    text = html.unescape(report.html(store, ids["ordinary"]))
    assert re.search(r"Trial \d+ against uniform-int4: .* × its kl_nats_per_token", text)
    assert "the three parts are disjoint" in text
    assert "predicted on the search part for 20 trials" in text
    assert "autoq export ordinary" in text
    assert "name: ordinary" in text
    assert "demo:smollm2" in text


def test_refuses_what_has_nothing_to_show(database):
    store, ids = database
    for name in ("empty", "failed"):
        with pytest.raises(AutoQError, match="has no complete trial: there is nothing to report yet"):
            report.html(store, ids[name])
    with pytest.raises(NotFound):
        report.html(store, 10**6)


def test_says_what_is_not_installed(database, monkeypatch):
    store, ids = database
    real = report.importlib.util.find_spec
    for package in ("jinja2", "plotly"):

        def without(name, missing=package):
            return None if name == missing else real(name)

        monkeypatch.setattr(report.importlib.util, "find_spec", without)
        with pytest.raises(AutoQError, match=rf"{package} is not installed: pip install 'autoq\[serve\]'"):
            report.html(store, ids["one"])


def test_cannot_be_written_everywhere(database, tmp_path):
    store, ids = database
    with pytest.raises(AutoQError, match=r"cannot write .*no/such"):
        report.write(store, ids["one"], tmp_path / "no" / "such" / "file.html")
    out = tmp_path / "report.html"
    assert report.write(store, ids["one"], out) == out.stat().st_size
    assert isinstance(store, Store)
