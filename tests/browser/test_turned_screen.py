"""A page whose screen is turned while it is open."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from playwright.sync_api import Page, expect

LIES = """() => {
  const plot = document.querySelector('#frontier .plot');
  return plot._fullLayout.coloraxis.colorbar.orientation === 'h';
}"""


def test_a_picture_has_one_scale_of_colours_however_wide_it_becomes(opened: Callable[..., Page], site: Any) -> None:
    page = opened("/studies/laptop", viewport={"width": 1440, "height": 900})
    title = page.locator("#frontier .infolayer .colorbar text", has_text="(")
    expect(title).to_have_count(1)
    for width, lies in ((390, True), (1440, False)):
        page.set_viewport_size({"width": width, "height": 844})
        until = time.monotonic() + 120
        while page.evaluate(LIES) is not lies:
            assert time.monotonic() < until, "it is not drawn for this width"
            page.wait_for_timeout(50)
        expect(title).to_have_count(1)
