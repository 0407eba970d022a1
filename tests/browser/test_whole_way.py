"""The whole way in a browser: submit by the form, watch, ask what if, have it measured, export, and run that."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from autoq.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
PATIENCE = 300_000  # milliseconds for what a process of the server does


@pytest.fixture
def running(tmp_path: Path) -> Iterator[str]:
    """`autoq serve`, with everything; its address."""
    environment = os.environ | {"AUTOQ_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", "from autoq.cli import main; main()", "serve", "--port", "0", "--db", "served.db"]
    with (tmp_path / "serve.log").open("w") as log:
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=log, text=True)
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            assert found, (tmp_path / "serve.log").read_text()
            yield found[0]
        finally:
            server.terminate()
            assert server.wait(timeout=120) == 0, (tmp_path / "serve.log").read_text()
            assert server.stdout is not None
            server.stdout.close()


def test_from_the_form_to_text_that_the_export_writes(
    running: str, opened: Callable[..., Page], tiny_model_dir: Callable[[str], Path], tmp_path: Path
) -> None:
    page = opened("/new", url=running)
    spec = {
        "name": "whole",
        "model": {"id": str(tiny_model_dir("llama"))},
        "data": {"calibration_tokens": 64, "search_tokens": 128, "report_tokens": 64, "window_tokens": 32},
        "target": {"name": "torch-cpu", "threads": 1, "prompt_tokens": 16},
        "space": {"schemes": ["rtn-int4-g32", "rtn-int8-channel-sym"]},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        "budget": {"trials": 12, "report_points": 3},
    }
    text = page.locator("#yaml")
    text.fill(json.dumps({**spec, "budget": {"trials": 0}}))
    expect(page.locator("[id='problem-budget.trials']")).to_contain_text("budget.trials")
    text.fill(json.dumps(spec))
    expect(page.locator(".verdict .good")).to_be_visible()
    page.get_by_role("button", name="Check against the model").click()
    expect(page.locator(".verdict")).to_contain_text("It can run.", timeout=PATIENCE)
    page.get_by_role("button", name="Start the study").click()
    page.wait_for_url(f"{running}/studies/whole", timeout=PATIENCE)

    expect(page.locator("#state")).to_have_text("finished", timeout=PATIENCE)
    expect(page.locator("#frontier .plot.js-plotly-plot")).to_be_visible()

    with Store.open(str(tmp_path / "served.db")) as store:
        study = store.study("whole")
        sizes = sorted(trial.values(["size_bytes"])[0] for trial in store.frontier(study.id))
        before = len(store.trials(study.id))
        budget = (sizes[0] + sizes[-1]) / 2
        page.get_by_role("tab", name="What if").click()
        page.locator("#offer-size_bytes").fill(f"{budget:.0f}")
        answer = page.get_by_text("This is a prediction.").or_(page.get_by_text("This is what was measured as"))
        expect(answer).to_be_visible(timeout=PATIENCE)
        measure = page.get_by_role("button", name="Measure it")
        if measure.is_visible():
            measure.click()
            expect(page.get_by_text("Queued: it is measured")).to_be_visible()

            def measured() -> bool:
                found = store.study(study.id)
                nothing = "nothing untried is likely to be better" in (found.message or "")
                return found.state == "finished" and (nothing or len(store.trials(study.id)) > before)

            end = time.monotonic() + PATIENCE / 1000
            while not measured():
                assert time.monotonic() < end, store.study(study.id)
                page.wait_for_timeout(100)
            expect(page.locator("#state")).to_have_text("finished", timeout=PATIENCE)
            ended = len(store.trials(study.id, states=("complete", "stopped", "failed")))
            expect(page.locator("#facts")).to_contain_text(f"{ended} trials")

        chosen = max(store.frontier(study.id), key=lambda trial: trial.number)
    page.goto(f"{running}/studies/whole/trials/{chosen.number}")
    page.get_by_role("button", name="Export").click()
    expect(page.get_by_text("in its runtime, against what was measured")).to_be_visible(timeout=PATIENCE)
    expect(page.locator(".state.complete", has_text="verified")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    download.value.save_as(tmp_path / "export.tar")
    with tarfile.open(tmp_path / "export.tar") as archive:
        archive.extractall(tmp_path / "export", filter="data")
    (folder,) = {path.parent for path in (tmp_path / "export").rglob("autoq.json")}
    lines = (
        "import autoq, sys\nmodel, tokenizer = autoq.load(sys.argv[1])\n"
        "print(model.generate(**tokenizer('a', return_tensors='pt'), max_new_tokens=3).shape)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", lines, str(folder)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch.Size([1," in done.stdout
