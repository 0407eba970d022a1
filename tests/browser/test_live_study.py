"""A real study under way, watched from the list to its end."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from autoq.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_a_running_study_is_watched_to_its_end(
    opened: Callable[..., Page],
    served: Callable[..., str],
    tiny_model_dir: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    db = tmp_path / "live.db"
    Store.open(str(db)).close()
    page = opened("/", url=served(db))
    expect(page.locator(".empty")).to_be_visible()
    spec: dict[str, Any] = {
        "name": "live",
        "model": {"id": str(tiny_model_dir("llama"))},
        "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 64, "window_tokens": 32},
        "target": {"name": "torch-cpu", "threads": 1, "prompt_tokens": 16},
        "space": {"schemes": ["rtn-int4-g32", "rtn-int8-channel-sym"]},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        "sampler": {"name": "random"},
        "budget": {"trials": 24, "report_points": 2},
    }
    (tmp_path / "spec.yaml").write_text(json.dumps(spec))
    command = [sys.executable, "-c", "from autoq.cli import main; main()", "search", "spec.yaml", "--db", str(db)]
    with (tmp_path / "search.log").open("wb") as log:
        search = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    try:
        # It appears by itself, and its first point too.
        page.get_by_role("link", name="live", exact=True).click(timeout=300_000)
        several = re.compile(r"(?<!\d)([3-9]|\d\d) on the frontier")
        expect(page.locator("#facts")).to_contain_text(several, timeout=300_000)
        expect(page.locator("#frontier .plot.js-plotly-plot")).to_be_visible()
        page.locator("#frontier .plot").focus()
        shown = page.locator("#selected h3 span").first
        deadline = time.monotonic() + 120
        while not shown.is_visible() and time.monotonic() < deadline:
            page.keyboard.press("ArrowRight")
            page.wait_for_timeout(250)
        chosen = shown.inner_text()
        expect(page.locator("#state")).to_have_text("finished", timeout=300_000)
        expect(page.locator("#selected h3 span").first).to_have_text(chosen)
    finally:
        code = search.wait(timeout=300)
    assert code == 0, (tmp_path / "search.log").read_text()
    with Store.open(str(db)) as store:
        study = store.study("live")
        frontier = store.frontier(study.id)
    expect(page.locator("#facts")).to_contain_text(f"{len(frontier)} on the frontier")
    wanted, drawn, end = {trial.number for trial in frontier}, set(), time.monotonic() + 120
    while not wanted <= drawn | {0}:  # 0, unquantized, may be out of sight; the picture comes after the numbers
        assert time.monotonic() < end, (wanted, drawn)
        page.wait_for_timeout(50)
        drawn = set(
            page.evaluate(
                "document.querySelector('#frontier .plot')._fullData.filter(t => t.meta?.status === 'frontier'"
                " || t.meta?.status === 'baseline').flatMap(t => Array.from(t.customdata))"
            )
        )
    page.goto("about:blank")
