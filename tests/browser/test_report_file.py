"""The report in a browser, from a file: every picture is drawn, in both themes, and nothing is asked for."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from autoq.dashboards import palette, report
from autoq.store import Store

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def written(site: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("report") / "laptop.html"
    with Store.open(str(site.db)) as store:
        report.write(store, store.study("laptop").id, path)
    return path.as_uri()


def background(page: Page, selector: str, name: str) -> str:
    found: str = page.eval_on_selector(selector, f"each => getComputedStyle(each).getPropertyValue('{name}')")
    return found


def rgb(color: str) -> str:
    return "rgb({}, {}, {})".format(*bytes.fromhex(color.lstrip("#")))


@pytest.mark.parametrize("theme", palette.THEMES)
def test_every_picture_is_drawn(opened: Callable[..., Page], written: str, theme: str) -> None:
    page = opened("", url=written, color_scheme=theme)
    expect(page.locator("html[data-drawn]")).to_be_attached()
    figures = page.locator("section.figure")
    names = [each.get_attribute("data-figure") for each in figures.all()]
    assert {"frontier", "savings", "layer_map", "sensitivity_map", "hypervolume", "progress"} <= set(names)
    for figure in figures.all():
        expect(figure.locator(".plot .main-svg").first).to_be_attached()
        assert figure.locator(".plot").bounding_box()["height"] > 100  # type: ignore[index]
    assert background(page, "body", "background-color") == rgb(palette.GROUND[theme])  # type: ignore[index]
    # Wide tables scroll inside themselves, and the page does not.
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")


def test_the_theme_and_the_scales_can_be_switched(opened: Callable[..., Page], written: str) -> None:
    page = opened("", url=written, color_scheme="light")
    expect(page.locator("html[data-drawn]")).to_be_attached()
    page.get_by_role("button", name="Dark").click()
    expect(page.locator("html")).to_have_attribute("data-theme", "dark")
    assert background(page, "body", "background-color") == rgb(palette.GROUND["dark"])
    plot = "section[data-figure=frontier] .plot"
    assert page.eval_on_selector(plot, "each => each.layout.yaxis.type") == "log"
    page.get_by_role("button", name="Switch y scale").click()
    scale = "each => each.layout.yaxis.type"
    end = time.monotonic() + 120
    while page.eval_on_selector(plot, scale) != "linear":
        assert time.monotonic() < end
        page.wait_for_timeout(50)


def test_the_table_has_the_numbers_of_the_picture(opened: Callable[..., Page], written: str) -> None:
    page = opened("", url=written)
    expect(page.locator("html[data-drawn]")).to_be_attached()
    section = page.locator("section[data-figure=frontier]")
    section.locator("summary").click()
    expect(section.locator("table")).to_be_visible()
    drawn = page.eval_on_selector(
        "section[data-figure=frontier] .plot",
        "each => each.data.filter(t => t.customdata).reduce((sum, t) => sum + t.customdata.length, 0)",
    )
    assert section.locator("tbody tr").count() == drawn


def test_a_narrow_screen_does_not_scroll_sideways(opened: Callable[..., Page], written: str) -> None:
    page = opened("", url=written, viewport={"width": 390, "height": 800})
    expect(page.locator("html[data-drawn]")).to_be_attached()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_is_printed_with_a_light_ground(opened: Callable[..., Page], written: str, tmp_path: Path) -> None:
    page = opened("", url=written, color_scheme="dark")
    expect(page.locator("html[data-drawn]")).to_be_attached()
    page.emulate_media(media="print")
    assert background(page, "body", "background-color") == "rgb(255, 255, 255)"
    assert page.locator("#theme").is_hidden()
    printed = tmp_path / "report.pdf"
    page.pdf(path=str(printed))
    assert printed.stat().st_size > 20_000
