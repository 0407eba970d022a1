"""A real Chromium on a real server: what the pages ask for, and what they may not do.

Every page is watched: an error on the console, a broken security policy, or a request that would leave the machine
fails its test.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest
from playwright.sync_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Page,
    Playwright,
    Request,
    expect,
    sync_playwright,
)

from autoq.store import Store

# Far more than a page needs, for machines that do other things besides.
SECONDS = 120
expect.set_options(timeout=1000 * SECONDS)

CHROMIUM = Path(os.environ.get("AUTOQ_CHROMIUM", "/usr/bin/chromium"))
SERVER = """
import socket, sys, uvicorn
from autoq.service.app import create_app
from autoq.store import Store
with Store.open(sys.argv[1]) as store:
    config = uvicorn.Config(create_app(store), log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run([socket.socket(fileno=int(sys.argv[2]))])
"""


@dataclass
class Site:
    """A server, the database that it serves, and what was written into it."""

    url: str
    db: Path
    studies: dict[str, Any] = field(default_factory=dict)


def start(program: str, log: Path, db: str, *arguments: str) -> tuple[subprocess.Popen[bytes], str]:
    """A server of `program`, and its address.

    It is given a socket that listens already, as a descriptor after the database: a port that is looked up first, and
    is free until the server has it, is somebody else's now and then.
    """
    with log.open("wb") as out, socket.create_server(("127.0.0.1", 0)) as own:
        command = [sys.executable, "-c", program, db, str(own.fileno()), *arguments]
        server = subprocess.Popen(command, stdout=out, stderr=out, cwd=log.parent, pass_fds=[own.fileno()])
        return server, f"http://127.0.0.1:{own.getsockname()[1]}"


def until_it_answers(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + SECONDS
    while True:
        try:
            return urllib.request.urlopen(f"{url}/healthz", timeout=5).close()
        except OSError:
            assert server.poll() is None, log.read_text()
            assert time.monotonic() < end, f"the server does not come up:\n{log.read_text()}"
            time.sleep(0.1)


def serve(db: Path, log: Path) -> Iterator[str]:
    """A server process on a database, until the generator is closed; its address."""
    server, url = start(SERVER, log, str(db))
    try:
        until_it_answers(url, server, log)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=SECONDS)


@pytest.fixture(scope="session")
def start_server() -> Callable[..., tuple[subprocess.Popen[bytes], str]]:
    return start


@pytest.fixture(scope="session")
def serving() -> Callable[[Path, Path], Iterator[str]]:
    """`serving(db, log)`: a server as above."""
    return serve


@pytest.fixture(scope="session")
def site(believable: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A server with two finished studies, one that runs, one that failed, and one that waits."""
    folder = tmp_path_factory.mktemp("site")
    found = Site("", folder / "autoq.db")
    with Store.open(str(found.db)) as store:
        found.studies["laptop"] = believable.whole(store, "laptop", 60, seed=1)
        found.studies["four-bit"] = believable.whole(store, "four-bit", 40, seed=2)
        running = believable.Writer.new(store, "under-way", 96, seed=3)
        running.baselines()
        running.propose(6)
        broken = believable.Writer.new(store, "no-model", 40, seed=4)
        store.set_state(broken.study.id, "failed", "the model 'gpt2' could not be loaded: no such file")
        waiting = believable.Writer.new(store, "tonight", 200, seed=5)
        store.set_state(waiting.study.id, "queued")
    serving = serve(found.db, folder / "server.log")
    found.url = next(serving)
    yield found
    serving.close()  # type: ignore[attr-defined]


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Callable[[Path], str]]:
    """`served(db)`: the address of another server, on another database."""
    running: list[Iterator[str]] = []

    def start(db: Path) -> str:
        running.append(serve(db, tmp_path / f"server-{len(running)}.log"))
        return next(running[-1])

    yield start
    for one in running:
        one.close()  # type: ignore[attr-defined]


@pytest.fixture(scope="session")
def _playwright() -> Iterator[Playwright]:
    if not CHROMIUM.is_file():
        message = f"no Chromium at {CHROMIUM}: apt install chromium, or set AUTOQ_CHROMIUM"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as found:
        yield found


@pytest.fixture(scope="session")
def chromium(_playwright: Playwright) -> Iterator[Browser]:
    """The browser."""
    browser = _playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
    yield browser
    browser.close()


class Traffic:
    """The requests of a context's pages that are out. Streams of events, which have no end, are none."""

    of: ClassVar[dict[Page, set[Request]]] = {}

    def __init__(self, context: BrowserContext) -> None:
        context.on("page", self._page)

    def _page(self, page: Page) -> None:
        out = self.of[page] = set()
        page.on("request", lambda request: None if request.resource_type == "eventsource" else out.add(request))
        page.on("requestfinished", lambda request: out.discard(request))
        page.on("requestfailed", lambda request: out.discard(request))
        page.on("close", lambda _: self.of.pop(page, None))


@pytest.fixture(scope="session")
def traffic() -> Callable[[BrowserContext], Traffic]:
    """`traffic(context)`, before it has a page, for a context whose pages are to be waited for."""
    return Traffic


@pytest.fixture(scope="session")
def settled() -> Callable[[Page], None]:
    """`settled(page)`: wait until it has asked for all that it shows, and shows it."""

    def wait(page: Page) -> None:
        out, end, still = Traffic.of[page], time.monotonic() + SECONDS, 0
        while still < 3:
            assert time.monotonic() < end, [request.url for request in out]
            page.wait_for_timeout(50)
            busy = page.evaluate("document.readyState !== 'complete' || !!document.querySelector('[aria-busy=true]')")
            still = 0 if busy or out else still + 1

    return wait


class Watch:
    """What a page did that it must not."""

    def __init__(self, context: BrowserContext, own: str) -> None:
        self.own, self.found, self.allowed = own, [], []
        Traffic(context)
        context.on("request", self._request)  # to look only: what is routed is not cached
        context.on("console", self._console)
        context.on("weberror", lambda error: self.found.append(f"error: {error.error}"))
        context.add_init_script(
            "document.addEventListener('securitypolicyviolation', e => "
            "console.error('policy', e.violatedDirective, e.blockedURI, e.sourceFile, e.lineNumber))"
        )

    found: list[str]
    allowed: list[str]

    def _request(self, request: Request) -> None:
        if not request.url.startswith((self.own, "data:", "blob:")):
            self.found.append(f"left the machine: {request.url}")

    def _console(self, message: ConsoleMessage) -> None:
        text = f"{message.text} {message.location.get('url', '')}"
        if message.type == "error" and not any(part in text for part in self.allowed):
            self.found.append(f"console: {text}")


@pytest.fixture(scope="session")
def _shared(chromium: Browser, site: Site) -> Iterator[tuple[BrowserContext, Watch]]:
    context = chromium.new_context(viewport={"width": 1440, "height": 900})
    context.set_default_timeout(1000 * SECONDS)
    yield context, Watch(context, site.url)
    context.close()


@pytest.fixture
def opened(chromium: Browser, site: Site, _shared: tuple[BrowserContext, Watch]) -> Iterator[Callable[..., Page]]:
    """`opened(path, url, allowed, **context options)`: a watched page of the site, or of another server.

    Pages share a browser's context, and so what it has cached, unless they ask for another one.
    """
    own: list[tuple[BrowserContext, Watch]] = []
    pages: list[Page] = []
    watch = _shared[1]
    watch.found.clear()
    watch.allowed.clear()

    def open_page(path: str, url: str | None = None, allowed: tuple[str, ...] = (), **options: Any) -> Page:
        context, watched = _shared
        if url is not None or options:
            context = chromium.new_context(**{"viewport": {"width": 1440, "height": 900}, **options})
            context.set_default_timeout(1000 * SECONDS)
            watched = Watch(context, url or site.url)
            own.append((context, watched))
        watched.allowed += allowed
        page = context.new_page()
        pages.append(page)
        page.goto((url or site.url) + path)
        return page

    yield open_page
    for page in pages:
        page.close()
    for context, _ in own:
        context.close()
    found = [line for _, watched in (_shared, *own) for line in watched.found]
    assert not found, "\n".join(found)
