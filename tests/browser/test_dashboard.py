"""The dashboard as people use it, in a real Chromium."""

from __future__ import annotations

import json
import random
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import FloatRect, Locator, Page, Route, expect

from autoq.display import numbers
from autoq.errors import AutoQError
from autoq.store import Store
from autoq.store import models as m
from autoq.study import pick

pytestmark = pytest.mark.timeout(900)
Opened = Callable[..., Page]


def until(page: Page, script: str, seconds: float = 120) -> Any:
    """Wait for an expression to be true. Playwright's own waiting evaluates text, which the pages' policy forbids."""
    end = time.monotonic() + seconds
    while not (found := page.evaluate(script)):
        assert time.monotonic() < end, script
        page.wait_for_timeout(50)
    return found


def still(locator: Locator) -> FloatRect:
    """Where on the screen something is that finds its place: the same for some frames."""
    found: list[FloatRect | None] = [None]
    while found[-1] is None or len(found) < 6 or found[-6:] != [found[-1]] * 6:
        found.append(locator.bounding_box())
        locator.page.evaluate("new Promise(requestAnimationFrame)")
    return found[-1]


def drawn(page: Page, selector: str = "#frontier .plot") -> None:
    """Wait for a plot."""
    expect(page.locator(f"{selector}.js-plotly-plot")).to_be_visible()
    until(page, f"!!document.querySelector('{selector}')._fullLayout?.xaxis?._length")


def axes(page: Page) -> list[float]:
    found: list[float] = page.evaluate(
        "(() => { const {xaxis, yaxis} = document.querySelector('#frontier .plot')._fullLayout;"
        " return [...xaxis.range, ...yaxis.range]; })()"
    )
    return found


def point(page: Page, number: int) -> tuple[float, float]:
    """Where on the screen the marker of a trial is."""
    at = page.evaluate(
        """(number) => {
          const plot = document.querySelector('#frontier .plot');
          const {xaxis, yaxis} = plot._fullLayout;
          const box = plot.getBoundingClientRect();
          for (const trace of plot._fullData) {
            const i = trace.customdata ? Array.from(trace.customdata).indexOf(number) : -1;
            if (i < 0) continue;
            const [left, top] = [box.left + xaxis._offset, box.top + yaxis._offset];
            return [left + xaxis.d2p(trace.x[i]), top + yaxis.d2p(trace.y[i])];
          }
          return null;
        }""",
        number,
    )
    assert at is not None, number
    return at[0], at[1]


def zoom(page: Page) -> list[float]:
    """Drag a rectangle on the plot, on which a trial is selected; what the axes show then."""
    # Drawn anew while it is dragged on, it would forget where that began.
    until(page, "document.querySelector('#frontier .plot')._fullData.some(t => t.name === 'selected' && t.x.length)")
    page.evaluate("scrollTo(0, 0)")
    box = page.locator("#frontier .plot").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + 150, box["y"] + 60)
    page.mouse.down()
    page.mouse.move(box["x"] + 500, box["y"] + 300, steps=5)
    page.mouse.up()
    until(page, "new URL(location).searchParams.has('zoom')")
    return axes(page)


def addressed(page: Page) -> None:
    """Wait until the address says what is looked at, as it does a little later."""
    script = page.evaluate("document.querySelector('script[src$=\"study.js\"]').src").replace("study.js", "view.js")
    until(page, f"import('{script}').then(v => v.address() === location.pathname + location.search + location.hash)")


def opacities(page: Page) -> dict[int, float]:
    """Trial -> opacity of its marker."""
    found = page.evaluate(
        """() => {
          const found = [];
          for (const trace of document.querySelector('#frontier .plot')._fullData) {
            if (!trace.customdata) continue;
            const own = trace.marker.opacity;
            Array.from(trace.customdata).forEach((number, i) => found.push([number, own.length ? own[i] : own]));
          }
          return found;
        }"""
    )
    return {int(number): opacity for number, opacity in found}


def test_from_the_list_to_a_shipped_trial(opened: Opened, site: Any) -> None:
    page = opened("/")
    expect(page.get_by_role("heading", name="Studies", exact=True)).to_be_visible()
    row = page.locator("article", has_text="laptop")
    expect(row.locator(".said")).to_contain_text("× the KL divergence of uniform-int4")
    expect(row.locator("path.line")).to_have_count(1)
    page.get_by_role("searchbox").fill("LAP")
    expect(page.locator("article")).to_have_count(1)
    expect(page).to_have_url(re.compile(r"q=LAP"))
    page.get_by_role("link", name="laptop", exact=True).click()

    # A click on a point selects it.
    drawn(page)
    document = page.request.get(f"{site.url}/api/v1/studies/laptop/points").json()
    columns, values = document["columns"], document["measured"]
    sizes = dict(zip(columns["number"], values["size_bytes"]["value"], strict=True))
    facts = zip(columns["number"], columns["on_frontier"], columns["baseline"], strict=True)
    number = max((n for n, frontier, baseline in facts if frontier and not baseline), key=lambda n: sizes[n])
    page.mouse.click(*point(page, number))
    expect(page.locator("#selected")).to_contain_text(f"Selected: trial {number}")
    expect(page).to_have_url(re.compile(rf"pick={number}\b"))

    # A slider greys out what fails, and names what Python would pick.
    slider = page.get_by_role("slider", name="Size, at most")
    slider.focus()
    for _ in range(12):
        slider.press("ArrowLeft")
    expect(page.locator("#pick h3")).to_contain_text("Best:")
    addressed(page)
    limit = float(page.evaluate("new URL(location).searchParams.get('max.size_bytes')"))
    with Store.open(str(site.db)) as store:
        study = store.study("laptop")
        expected = pick(study, store.frontier(study.id), {"size_bytes": limit}, {}, None)
    expect(page.locator("#pick h3")).to_have_text(f"Best: {expected.baseline or f'trial {expected.number}'}")
    until(page, "document.querySelector('#frontier .plot')._fullData.some(t => Array.isArray(t.marker?.opacity))")
    shown = opacities(page)
    assert {n for n, opacity in shown.items() if opacity < 0.2} == {n for n in shown if sizes[n] > limit}

    # A brush on an axis of the parallel coordinates is a limit, and its lines follow.
    page.get_by_role("tab", name="Trade-offs").click()
    field = page.locator(".parallel .field").nth(0)
    expect(field).to_be_visible()
    page.evaluate("document.getElementById('panels').scrollIntoView({block: 'end'})")
    box = still(field)
    off = page.locator(".parallel path.off").count()
    page.mouse.move(box["x"] + 16, box["y"] + box["height"] - 5)
    page.mouse.down()
    page.mouse.move(box["x"] + 16, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    until(page, "new URL(location).searchParams.has('min.kl_nats_per_token')")
    until(page, f"document.querySelectorAll('.parallel path.off').length > {off}")

    # The trial: numbers with their provenance, a note that stays, the assignment as a file.
    page.goto(f"{site.url}/studies/laptop/trials/{expected.number}")
    expect(page.locator("#measurements")).to_contain_text("predicted")
    page.get_by_role("textbox", name="Note").fill("ship this <img src=x onerror=alert(1)>")
    page.get_by_role("textbox", name="Tags").fill("shipped, laptop")
    page.get_by_role("button", name="Save").click()
    expect(page.locator("#remarks")).to_contain_text("Saved.")
    page.reload()
    expect(page.get_by_role("textbox", name="Note")).to_have_value("ship this <img src=x onerror=alert(1)>")
    with page.expect_download() as download:
        page.locator("#assignment").get_by_role("button", name="JSON").click()
    with Store.open(str(site.db)) as store:
        record = store.trial(study.id, expected.number)
    assert record.assignment is not None
    assert json.loads(download.value.path().read_text()) == record.assignment.to_dict()

    # Against another one.
    page.goto(f"{site.url}/studies/laptop/diff?a={number}&b=uniform-int4")
    expect(page.get_by_role("region", name="What the difference costs")).to_contain_text("Size")
    expect(page.get_by_role("region", name="Layers that differ")).to_contain_text("rtn-int8-channel-sym")

    # An export is a job of the server's queue.
    page.goto(f"{site.url}/studies/laptop/trials/{expected.number}")
    page.get_by_label("For").select_option("torch-cpu")
    page.get_by_role("button", name="Export", exact=True).click()
    expect(page.locator("#export .pick")).to_contain_text("queued")
    check = {"name": "kl_nats_per_token", "promised": "0.0312", "found": "0.0313", "ok": True, "note": ""}
    lines = [{"title": "run it", "text": "python run.py laptop-small"}]
    result = {"verify": {"ok": True, "message": None, "checks": [check]}, "bytes": 81_200_000, "lines": lines}
    with Store.open(str(site.db)) as store, store._database.writing() as connection:
        connection.execute(sa.update(m.exports).values(state="finished", result=result))
    expect(page.locator("#export .pick")).to_contain_text("verified in its runtime")
    expect(page.locator("#export .pick")).to_contain_text("python run.py laptop-small")
    expect(page.get_by_role("link", name="Download")).to_have_attribute("href", re.compile(r"/exports/\d+/download$"))


def test_a_shared_address_shows_the_same_view(opened: Opened) -> None:
    page = opened("/studies/laptop")
    drawn(page)
    page.locator("#axis-x").select_option("latency_decode_ms")
    until(page, "document.querySelector('#frontier .plot')._fullLayout.meta.x === 'latency_decode_ms'")
    page.get_by_label("Logarithmic x axis").click()
    until(page, "document.querySelector('#frontier .plot')._fullLayout.xaxis.type === 'log'")
    page.get_by_label("Size", exact=True).fill("90MB")
    page.get_by_label("Size", exact=True).press("Enter")
    page.locator("#best-by").select_option("latency_decode_ms")
    page.get_by_role("tab", name="Trials").click()
    page.get_by_role("button", name="Select trial 7", exact=True).click()
    best = page.locator("#pick h3").inner_text()
    zoomed = zoom(page)

    addressed(page)
    again = opened(page.evaluate("location.pathname + location.search"))
    drawn(again)
    expect(again.locator("#pick h3")).to_have_text(best)
    expect(again.locator("#selected")).to_contain_text("Selected: trial 7")
    expect(again.locator("#axis-x")).to_have_value("latency_decode_ms")
    expect(again.get_by_label("Size", exact=True)).to_have_value("90.00MB")
    expect(again.get_by_role("tab", name="Trials")).to_have_attribute("aria-selected", "true")
    plot = "document.querySelector('#frontier .plot')"
    until(again, f"Math.abs({plot}._fullLayout.xaxis.range[0] - {zoomed[0]}) < 1e-3")
    assert axes(again) == pytest.approx(zoomed, rel=1e-4)


def test_what_is_new_shows_by_itself_and_the_view_stays(opened: Opened, site: Any, believable: Any) -> None:
    page = opened("/studies/under-way")
    drawn(page)
    page.get_by_role("tab", name="Trials").click()
    page.get_by_role("button", name="Select trial 5", exact=True).click()
    zoomed = zoom(page)
    with Store.open(str(site.db)) as store:
        study = store.study("under-way")
        writer = believable.Writer(store, study, seed=9)
        before = len(store.trials(study.id))
        writer.propose(3)
    expect(page.locator("#facts")).to_contain_text(f"{before + 3} of 96 trials")
    expect(page.locator("#live")).to_contain_text("trials complete")  # said when all is drawn
    assert axes(page) == pytest.approx(zoomed)
    expect(page.locator("#selected")).to_contain_text("Selected: trial 5")


def test_colours_follow_the_system_and_the_switch(opened: Opened) -> None:
    page = opened("/studies/laptop", color_scheme="dark")
    drawn(page)
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    ink = "document.querySelector('#frontier .plot')._fullLayout.font.color"
    first = page.evaluate(ink)
    page.get_by_role("button", name="Colours: as the system").click()
    expect(page.get_by_role("button", name="Colours: light")).to_be_visible()
    until(page, f"getComputedStyle(document.body).backgroundColor !== '{dark}'")
    until(page, f"{ink} !== '{first}'")
    page.reload()
    expect(page.get_by_role("button", name="Colours: light")).to_be_visible()
    until(page, f"getComputedStyle(document.body).backgroundColor !== '{dark}'")


def test_the_keyboard_is_enough(opened: Opened) -> None:
    page = opened("/")
    expect(page.locator("article").first).to_be_visible()
    page.keyboard.press("Tab")
    until(page, "document.activeElement.className === 'skip'")
    page.keyboard.press("Enter")
    until(page, "document.activeElement.id === 'main'")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog")).to_contain_text("Keyboard shortcuts")
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.keyboard.press("/")
    page.keyboard.type("laptop")
    expect(page.locator("article")).to_have_count(1)
    for _ in range(3):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("**/studies/laptop")
    drawn(page)
    page.locator("#frontier .plot").focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#selected h3")).to_contain_text("Selected:")
    page.keyboard.press("2")
    expect(page.get_by_role("tab", name="Trade-offs")).to_have_attribute("aria-selected", "true")
    page.get_by_role("tab", name="Trade-offs").focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_role("tab", name="Trials")).to_be_focused()
    page.keyboard.press("o")
    page.wait_for_url("**/trials/*")


def test_arrow_keys_go_along_what_is_drawn(opened: Opened, site: Any) -> None:
    """Also where the points are newer than the picture, and none that is on it is on their frontier any more."""
    page = opened("/", url=site.url)

    def newer(route: Route) -> None:
        answer = route.fetch()
        document = answer.json()
        columns = document["columns"]
        columns["on_frontier"] = [False] * len(columns["number"])
        route.fulfill(response=answer, json=document)

    page.route("**/studies/*/points*", newer)
    page.goto(f"{site.url}/studies/laptop")
    drawn(page)
    along = page.evaluate(
        """() => {
          const traces = document.querySelector('#frontier .plot')._fullData;
          const front = traces.filter((t) => t.meta?.status === 'frontier');
          const points = front.flatMap((t) => Array.from(t.customdata, (number, i) => [t.x[i], -t.y[i], number]));
          return points.sort((a, b) => a[0] - b[0] || a[1] - b[1]).map((each) => each[2]);
        }"""
    )
    assert len(along) > 5
    page.locator("#frontier .plot").focus()
    selected = page.locator("#selected h3")
    for key, number in (("Right", along[0]), ("Right", along[1]), ("Left", along[0]), ("Left", along[0])):
        page.keyboard.press(f"Arrow{key}")
        expect(selected).to_contain_text(f"Selected: trial {number}")
    page.keyboard.press("Escape")
    expect(selected).to_have_count(0)
    page.keyboard.press("ArrowLeft")
    expect(selected).to_contain_text(f"Selected: trial {along[-1]}")
    page.unroute_all(behavior="ignoreErrors")
    page.goto("about:blank")


def test_every_picture_has_its_table(opened: Opened) -> None:
    page = opened("/studies/laptop")
    drawn(page)
    page.locator("#frontier summary").click()
    rows = page.locator("#frontier table tbody tr")
    expect(rows.first).to_be_visible()
    shown = page.evaluate(
        "document.querySelector('#frontier .plot')._fullData"
        ".filter(trace => trace.customdata).reduce((sum, trace) => sum + trace.x.length, 0)"
    )
    assert rows.count() >= shown > 20
    with page.expect_download() as download:
        page.locator("#frontier").get_by_role("button", name="CSV", exact=True).click()
    lines = download.value.path().read_text().splitlines()
    assert len(lines) == rows.count() + 1
    with page.expect_download() as download:
        page.locator("#frontier").get_by_role("button", name="SVG", exact=True).click()
    assert download.value.path().read_text().startswith("<svg")
    with page.expect_download() as download:
        page.locator("#frontier").get_by_role("button", name="PNG", exact=True).click()
    assert download.value.path().read_bytes().startswith(b"\x89PNG")


def test_a_failure_is_shown_as_text(opened: Opened, site: Any) -> None:
    with Store.open(str(site.db)) as store:
        (failed,) = store.trials(store.study("laptop").id, states=("failed",))
    page = opened(f"/studies/laptop/trials/{failed.number}")
    expect(page.locator("#error")).to_contain_text("<script>alert('layer 7')</script>")
    expect(page.locator("#measurements")).to_contain_text("failed before anything was measured")


PAGES = (
    "/",
    "/new",
    "/studies/laptop",
    "/studies/laptop?tab=trials&pick=7",
    "/studies/laptop?tab=health",
    "/studies/laptop?tab=tradeoffs",
    "/studies/laptop?tab=whatif",
    "/studies/tonight",
    "/studies/laptop/trials/7",
    "/studies/laptop/diff?a=7&b=uniform-int4",
    "/compare?studies=laptop,four-bit",
    "/login",
    "/studies/nothing",
)


@pytest.mark.parametrize("path", PAGES)
def test_no_barrier_and_nothing_too_wide(opened: Opened, settled: Callable[[Page], None], path: str) -> None:
    """axe finds nothing serious in light or dark, and at 360 pixels nothing has to be scrolled sideways."""
    page = opened(path, allowed=("404",) if "nothing" in path else ())
    expect(page.locator("h1")).to_be_visible()
    settled(page)
    for scheme in ("light", "dark"):
        page.emulate_media(color_scheme=scheme, reduced_motion="reduce")  # type: ignore[arg-type]
        settled(page)
        found = Axe().run(page).response["violations"]
        serious = [
            f"{scheme}: {each['id']}: {each['help']}: {[node['html'][:160] for node in each['nodes']][:3]}"
            for each in found
            if each["impact"] in ("serious", "critical")
        ]
        assert not serious, "\n".join(serious)
    page.set_viewport_size({"width": 360, "height": 780})
    until(page, "document.documentElement.scrollWidth <= 360")


def test_the_second_visit_costs_little(opened: Opened, settled: Callable[[Page], None]) -> None:
    page = opened("/login", viewport={"width": 1440, "height": 900})  # a context with nothing cached
    session = page.context.new_cdp_session(page)
    session.send("Network.enable")
    sizes: list[float] = []
    session.on("Network.loadingFinished", lambda event: sizes.append(event["encodedDataLength"]))
    weights = []
    for _ in range(2):
        sizes.clear()
        page.goto(page.evaluate("location.origin") + "/studies/laptop")
        drawn(page)
        settled(page)
        weights.append(sum(sizes))
    assert weights[0] < 2_000_000
    assert weights[1] < 50_000


def test_the_page_picks_and_writes_as_python_does(opened: Opened, site: Any) -> None:
    """The rule of `autoq pick` and the numbers of the command line, computed in the browser."""
    page = opened("/studies/laptop")
    drawn(page)
    base = page.evaluate("document.querySelector('script[src$=\"study.js\"]').src").removesuffix("study.js")
    document = page.request.get(f"{site.url}/api/v1/studies/laptop/points").json()
    drawn_at = random.Random(3)
    with Store.open(str(site.db)) as store:
        study = store.study("laptop")
        frontier = store.frontier(study.id)
    asked, expected = [], []
    for _ in range(150):
        limits: dict[str, dict[str, float]] = {}
        for objective in study.objectives:
            trial = drawn_at.choice(frontier)
            if drawn_at.random() < 0.6:
                value = trial.best_measurements()[objective.name].value
                side = "max" if drawn_at.random() < 0.8 else "min"
                limits[objective.name] = {side: float(f"{value * drawn_at.uniform(0.9, 1.2):.8g}")}
        best = drawn_at.choice(study.objectives).name
        upper = {name: bound["max"] for name, bound in limits.items() if "max" in bound}
        lower = {name: bound["min"] for name, bound in limits.items() if "min" in bound}
        try:
            chosen: int | None = pick(study, frontier, upper, lower, best).number
        except AutoQError:
            chosen = None
        asked.append([limits, best])
        expected.append(chosen)
    assert len(set(expected)) > 5
    found = page.evaluate(
        """async ([base, document, asked]) => {
          const {Points} = await import(base + 'points.js');
          const points = new Points(document);
          return asked.map(([limits, best]) => points.pick(limits, best)?.number ?? null);
        }""",
        [base, document, asked],
    )
    assert found == expected

    values = [(10 ** drawn_at.uniform(-6, 12), 10 ** drawn_at.uniform(-6, 4)) for _ in range(300)]
    written = page.evaluate(
        "async ([base, values]) => { const f = await import(base + 'format.js');"
        " return values.map(([v, e]) => [f.withError(v, e, 'ms'), f.number(v, 'ms'), f.size(v)]); }",
        [base, values],
    )
    for (value, error), (both, plain, size) in zip(values, written, strict=True):
        assert both.replace(" ± ", " ±").replace("e-", "e-0").replace("e+", "e+0").replace("e-010", "e-10") in (
            numbers.with_error(value, error, "ms"),
            numbers.with_error(value, error, "ms").replace("e+10", "e+010").replace("e+11", "e+011"),
        )
        assert plain.split("e")[0] == numbers.number(value, "ms").split("e")[0]
        assert size == numbers.size(value)


def test_a_spec_is_checked_as_it_is_typed(opened: Opened) -> None:
    page = opened("/new")
    expect(page.get_by_text("The spec is valid.")).to_be_visible()
    page.get_by_label("Trials", exact=True).fill("0")
    problem = page.locator("[id='problem-budget.trials']")
    expect(problem).to_contain_text("budget.trials")
    expect(page.get_by_label("Trials", exact=True)).to_have_attribute("aria-invalid", "true")
    page.get_by_label("Trials", exact=True).fill("24")
    expect(problem).to_be_hidden()
    expect(page.get_by_label("Spec as YAML")).to_have_value(re.compile("trials: 24"))
    text = page.get_by_label("Spec as YAML").input_value()
    page.get_by_label("Spec as YAML").fill(text.replace("trials: 24", "trials: 36").replace("my-study", "typed"))
    expect(page.get_by_label("Trials", exact=True)).to_have_value("36")
    expect(page.get_by_label("Name", exact=True)).to_have_value("typed")
    page.get_by_label("Spec as YAML").fill("name: x\nmodel: {id: demo:smollm2}\nbudgets: {trials: 3}\n")
    expect(page.locator(".verdict .problem")).to_contain_text("budgets")
