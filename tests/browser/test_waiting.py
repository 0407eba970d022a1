"""What the scheduler knows stands on the pages: which studies wait for how many places, and who has them."""

from __future__ import annotations

import re
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from autoq.spec import build_spec
from autoq.store import Prepared, Store

pytestmark = pytest.mark.timeout(900)

RUNNER = """
import os, sys, time
from autoq.search.holding import StopRequested, holding
from autoq.store import Store

with Store.open(os.environ["AUTOQ_DB"]) as store, holding(store, int(sys.argv[1]), queued=True) as hold:
    hold.store.set_state(int(sys.argv[1]), "running")
    try:
        while True:
            hold.watch()
            time.sleep(0.05)
    except StopRequested as stop:
        hold.store.queue.settle(int(sys.argv[1]), hold.state_after(stop, "interrupted"))
"""
SERVER = """
import signal, socket, sys, uvicorn
from pathlib import Path
from autoq.service.app import create_app
from autoq.service.scheduler import Scheduler
from autoq.store import Store
db, listening, runner = sys.argv[1:]
with Store.open(db) as store:
    scheduler = Scheduler(store, 2, folder=Path(db).parent / "server", quantum=1e6, runner=(sys.executable, runner))
    scheduler.start()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # uvicorn raises it once more at its end: runners end, too
    try:
        app = create_app(store, scheduler=scheduler)
        config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run([socket.socket(fileno=int(listening))])
    finally:
        scheduler.stop(5)
"""


def submit(store: Store, name: str, workers: dict[str, Any] | None = None) -> int:
    tree = {"model": {"id": "m"}, "name": name, "budget": {"trials": 8}} | ({"workers": workers} if workers else {})
    prepared = Prepared([("size_bytes", "bytes", "minimize")], {"layers": {}})
    return store.queue.submit(None, None, "f", build_spec(tree), prepared, 0)[0].id


@pytest.fixture
def place(
    tmp_path: Path, start_server: Callable[..., tuple[subprocess.Popen[bytes], str]]
) -> Iterator[tuple[str, Store]]:
    """A server with two places. One study has one of them, one needs both, and one waits behind that."""
    (tmp_path / "runner.py").write_text(RUNNER)
    with Store.open(str(tmp_path / "autoq.db")) as store:
        submit(store, "small")
        server, url = start_server(SERVER, tmp_path / "log", str(tmp_path / "autoq.db"), str(tmp_path / "runner.py"))
        try:
            end = time.monotonic() + 120
            while True:
                assert server.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < end, "the first study does not start"
                try:
                    urllib.request.urlopen(f"{url}/healthz", timeout=5).close()
                    if store.study("small").state == "running":
                        break
                except OSError:
                    pass
                time.sleep(0.1)
            submit(store, "wide", {"executor": "ray", "count": 2})
            submit(store, "patient")
            yield url, store
        finally:
            server.terminate()
            server.wait(timeout=60)


def test_a_study_that_waits_says_for_what_and_who_has_it(opened: Callable[..., Page], place: tuple[str, Store]) -> None:
    url, store = place
    page = opened("/", url=url)
    row = {
        name: page.locator("article", has=page.get_by_role("link", name=name, exact=True))
        for name in ("wide", "patient")
    }
    expect(row["wide"]).to_contain_text("waits for 2 of 2 places of this server: 1 is free; small has 1.")
    expect(row["wide"]).to_contain_text("number 1 in line")
    expect(row["patient"]).to_contain_text("1 study comes before it")
    expect(row["patient"]).to_contain_text("number 2 in line")

    study = opened("/studies/patient", url=url)
    expect(study.locator("#queue")).to_contain_text("Queued, number 2 in line.")
    study.goto(f"{url}/studies/wide")
    expect(study.locator("#queue")).to_contain_text("small has 1")
    expect(study.locator("#queue").get_by_role("link", name="small")).to_have_attribute("href", "/studies/small")

    # What moves the line shows by itself, on both pages.
    store.queue.cancel(store.study("small").id)
    expect(study.locator("#state")).to_have_text("running")
    expect(study.locator("#queue")).to_be_hidden()
    expect(row["patient"]).to_contain_text(re.compile("Next in line.*wide has 2"))
    expect(row["patient"]).to_contain_text("number 1 in line")
    study.goto("about:blank")
    page.goto("about:blank")
