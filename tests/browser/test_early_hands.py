"""What is done before a page has all of its answers, or while one is on its way, counts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from playwright.sync_api import Page, Request, Route, expect

from autoq.store import Store

pytestmark = pytest.mark.timeout(900)


@contextmanager
def held(page: Page, address: str, which: Callable[[Request], bool] = lambda _: True) -> Iterator[Callable[[], Route]]:
    """Requests for an address wait. What it gives lets the first one through, once there is one; the end lets all."""
    waiting: list[Route] = []
    page.route(address, lambda route: waiting.append(route) if which(route.request) else route.continue_())

    def through() -> Route:
        while not waiting:
            page.wait_for_timeout(20)
        waiting[0].continue_()
        return waiting.pop(0)

    yield through
    page.unroute(address)
    for route in waiting:
        route.continue_()


@pytest.fixture
def noted(opened: Callable[..., Page], site: Any) -> Page:
    """A browser that may go to a trial that has a note and a tag."""
    with Store.open(str(site.db)) as store:
        store.remarks.put(store.study("four-bit").id, 5, "keep me", ["kept"], None)
    return opened("/new", url=site.url)


def test_a_tag_that_is_saved_before_the_note_is_there_does_not_empty_it(noted: Page, site: Any) -> None:
    note, tags = noted.get_by_role("textbox", name="Note"), noted.get_by_role("textbox", name="Tags")
    with held(noted, "**/remark", lambda request: request.method == "GET") as through:
        noted.goto(f"{site.url}/studies/four-bit/trials/5")
        tags.fill("early")
        noted.get_by_role("button", name="Save").click()
        through()
        expect(noted.locator("#remarks")).to_contain_text("Saved.")
    expect(note).to_have_value("keep me")
    with Store.open(str(site.db)) as store:
        remark = store.remarks.of(store.study("four-bit").id)[0]
    assert (remark.note, list(remark.tags)) == ("keep me", ["early"])


def test_what_is_typed_while_a_note_is_saved_stays(noted: Page, site: Any) -> None:
    note = noted.get_by_role("textbox", name="Note")
    noted.goto(f"{site.url}/studies/four-bit/trials/5")
    expect(note).to_have_value("keep me")
    with held(noted, "**/remark", lambda request: request.method == "PUT") as through:
        note.fill("first")
        noted.get_by_role("button", name="Save").click()
        note.press_sequentially(", and more")
        through()
        expect(noted.locator("#remarks")).to_contain_text("Saved.")
    expect(note).to_have_value("first, and more")


def test_nobody_signs_in_before_the_page_can(opened: Callable[..., Page], site: Any) -> None:
    page = opened("/new", url=site.url)
    with held(page, "**/login.js") as through:
        page.goto(f"{site.url}/login", wait_until="commit")
        button = page.get_by_role("button", name="Sign in")
        expect(button).to_be_disabled()
        through()
        expect(button).to_be_enabled()


def test_a_field_that_is_changed_before_the_yaml_was_read_changes_the_yaml(
    opened: Callable[..., Page], site: Any
) -> None:
    page = opened("/new", url=site.url)
    expect(page.get_by_text("The spec is valid.")).to_be_visible()
    text = page.get_by_label("Spec as YAML")
    with held(page, "**/specs:check") as through:
        text.fill(text.input_value().replace("my-study", "typed"))
        page.get_by_label("Trials", exact=True).fill("36")
        through()
        expect(page.get_by_label("Name", exact=True)).to_have_value("typed")
    for line in ("name: typed", "trials: 36"):
        expect(text).to_have_value(re.compile(line))
    expect(page.get_by_role("button", name="Start the study")).to_be_enabled()


def test_a_deep_look_is_not_given_up_for_a_shallow_one(opened: Callable[..., Page], site: Any) -> None:
    page = opened("/new", url=site.url)
    expect(page.get_by_text("The spec is valid.")).to_be_visible()
    deep: list[Route] = []
    page.route(
        "**/specs:check",
        lambda route: deep.append(route) if route.request.post_data_json["deep"] else route.continue_(),
    )
    page.evaluate(
        """() => {
          const field = document.getElementById('field-name');
          field.value = 'other';
          field.dispatchEvent(new Event('input', {bubbles: true}));
          [...document.querySelectorAll('button')].find((each) => each.textContent.startsWith('Check')).click();
        }"""
    )
    page.wait_for_timeout(600)  # twice what typing is waited for
    assert len(deep) == 1
    deep[0].fulfill(json={"ok": True, "facts": {"layers": 210}, "message": None, "field": None, "spec": None})
    expect(page.locator(".verdict")).to_contain_text("It can run.")


def test_a_link_is_followed_although_the_list_would_be_drawn_anew_under_the_press(
    opened: Callable[..., Page], served: Callable[..., str], believable: ModuleType, tmp_path: Path
) -> None:
    with Store.open(str(tmp_path / "list.db")) as store:
        writer = believable.Writer.new(store, "first", 40, seed=1)
        writer.baselines()
        page = opened("/", url=served(tmp_path / "list.db"))
        expect(page.locator("article path.line")).to_have_count(1)
        box = page.get_by_role("link", name="first", exact=True).bounding_box()
        assert box is not None
        page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
        page.mouse.down()
        with page.expect_response("**/api/v1/studies?*"):
            writer.propose(1)
        page.wait_for_timeout(300)
        page.mouse.up()
        page.wait_for_url("**/studies/first")
        page.goto("about:blank")
