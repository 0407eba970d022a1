"""A study's page in a real browser: how soon it is there, and how smoothly a large frontier moves.

    python benchmarks/page.py                          # 20,000 trials

Frames are what `requestAnimationFrame` sees while a mouse drags: at rest one comes every 16.7 ms. The browser draws
without a graphics card, on the processor that the server and the mouse use too. Load is said, for it counts.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from _report import print_table
from playwright.sync_api import Page, sync_playwright
from service import fill, server

from autoq.store import Store

CHROMIUM = os.environ.get("AUTOQ_CHROMIUM", "/usr/bin/chromium")
FRAMES = """() => {
  window.frames_ = []; window.counting = true;
  let last = performance.now();
  const tick = (now) => {
    window.frames_.push(now - last);
    last = now;
    if (window.counting) requestAnimationFrame(tick);
  };
  requestAnimationFrame(tick);
}"""


def drawn(page: Page, url: str) -> float:
    """Seconds from the request to a frontier that answers."""
    began = time.perf_counter()
    page.goto(f"{url}/studies/large", wait_until="commit")
    while not page.evaluate("!!document.querySelector('#frontier .plot')?._fullLayout?.xaxis?._length"):
        page.wait_for_timeout(10)
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done)))")
    return time.perf_counter() - began


def frames(page: Page, moves: Callable[[], None]) -> list[float]:
    """Milliseconds between the frames while something is moved."""
    page.wait_for_timeout(500)
    page.evaluate(FRAMES)
    moves()
    found: list[float] = page.evaluate("(window.counting = false, window.frames_)")
    return found[2:]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20_000)
    parser.add_argument("--moves", type=int, default=120)
    options = parser.parse_args()
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Store.open(str(Path(folder) / "autoq.db")) as store,
        sync_playwright() as found,
    ):
        fill(store, options.trials)
        store.set_state(store.study("large").id, "finished")
        with server(str(Path(folder) / "autoq.db")) as (url, _):
            browser = found.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1440, "height": 900})
            opened = [drawn(page, url) for _ in range(5)]
            box = page.locator("#frontier .nsewdrag").first.bounding_box()
            slider = page.get_by_role("slider").nth(1).bounding_box()
            assert box is not None
            assert slider is not None
            middle, row = (
                (box["x"] + box["width"] / 2, box["y"] + box["height"] / 2),
                slider["y"] + slider["height"] / 2,
            )

            def wander(x: float, y: float, reach: float) -> None:
                for i in range(options.moves):
                    page.mouse.move(x + reach * ((i % 60) / 30 - 1), y + 0.3 * reach * ((i % 40) / 20 - 1))

            def drag(keys: str | None) -> None:
                if keys:
                    page.keyboard.down(keys)
                page.mouse.move(*middle)
                page.mouse.down()
                wander(*middle, 150)
                page.mouse.up()
                if keys:
                    page.keyboard.up(keys)

            def slide() -> None:
                right = slider["x"] + slider["width"] - 6
                page.mouse.move(right, row)
                page.mouse.down()
                for i in range(options.moves):
                    page.mouse.move(right - slider["width"] * 0.8 * i / options.moves, row)
                page.mouse.up()

            for what, moves in (
                ("at rest", lambda: page.wait_for_timeout(1500)),
                ("the pointer over the points", lambda: wander(*middle, 150)),
                ("a pan (Shift and drag)", lambda: drag("Shift")),
                ("a rectangle to zoom to", lambda: drag(None)),
                ("a limit's slider", slide),
            ):
                load = psutil.getloadavg()[0]
                spent = sorted(frames(page, moves))
                p95 = spent[int(0.95 * len(spent))]
                rows.append((what, f"{statistics.median(spent):.1f}", f"{p95:.1f}", f"{len(spent)}", f"{load:.1f}"))
            browser.close()
    print(f"open to a frontier that answers: {opened[0]:.2f} s, again {statistics.median(opened[1:]):.2f} s")
    title = f"Frames of a study of {options.trials:,} trials, milliseconds"
    print_table(title, ("while", "median", "p95", "frames", "load"), rows)


if __name__ == "__main__":
    main()
