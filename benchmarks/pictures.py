"""The README's pictures of the dashboard, of a study on a server that runs.

    autoq serve --db demo.db --port 8765 &
    python benchmarks/pictures.py http://127.0.0.1:8765 demo --pick 31 --against 10 --max size_bytes=125000000

It writes `dashboards/pictures/study.png` (the study with a limit and a picked trial) and `diff.png` (two trials side by
side), as a Chromium of 1440 pixels shows them.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from urllib.parse import quote, urlencode

from playwright.sync_api import Page, sync_playwright

CHROMIUM = os.environ.get("AUTOQ_CHROMIUM", "/usr/bin/chromium")
PICTURES = Path(__file__).parents[1] / "dashboards" / "pictures"
WIDTH, HEIGHT = 1440, 1560


def drawn(page: Page, address: str) -> None:
    """Open a page and wait until every figure of it is there."""
    page.goto(address)
    page.locator(".js-plotly-plot").first.wait_for()
    while page.evaluate("!!document.querySelector('[aria-busy=true]')"):
        page.wait_for_timeout(100)
    page.wait_for_timeout(1000)  # the last marks are put on after the figures are there


def main() -> None:
    """Take both pictures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("server")
    parser.add_argument("study")
    parser.add_argument("--pick", required=True, help="the trial that is picked")
    parser.add_argument("--against", required=True, help="the trial that it is compared with")
    parser.add_argument("--max", action="append", default=[], metavar="OBJECTIVE=VALUE")
    given = parser.parse_args()
    limits = {f"max.{name}": value for name, _, value in (text.partition("=") for text in given.max)}
    study = f"{given.server}/studies/{quote(given.study)}"
    with sync_playwright() as found:
        browser = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        drawn(page, f"{study}?{urlencode({'pick': given.pick, **limits})}")
        page.screenshot(path=PICTURES / "study.png")
        drawn(page, f"{study}/diff?{urlencode({'a': given.pick, 'b': given.against})}")
        page.screenshot(path=PICTURES / "diff.png", full_page=True)
        browser.close()


if __name__ == "__main__":
    main()
