"""A study is removed in one browser window while another one looks at it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from playwright.sync_api import Page, expect

from autoq.store import Store


def test_a_study_is_removed_and_whoever_looks_at_it_is_told(
    opened: Callable[..., Page], served: Callable[..., str], believable: ModuleType, tmp_path: Path
) -> None:
    db = tmp_path / "two.db"
    with Store.open(str(db)) as store:
        believable.whole(store, "goes", 24, seed=1)
        believable.whole(store, "stays", 24, seed=2)
    url = served(db)
    looks = opened("/studies/goes", url=url, allowed=("status of 404",))
    listed = opened("/", url=url)
    page = opened("/studies/goes", url=url, allowed=("status of 404",))
    for name in ("goes", "stays"):  # what is asked about a study later would be about one that is not there
        expect(listed.locator("article", has_text=name).locator(".said")).not_to_be_empty()
    button = page.get_by_role("button", name="Remove", exact=True)

    asked: list[str] = []
    page.once("dialog", lambda dialog: (asked.append(dialog.message), dialog.dismiss()))
    button.click()
    while not asked:
        page.wait_for_timeout(50)
    assert asked == ["Remove goes with all its trials, for good?"]
    expect(button).to_be_enabled()

    page.once("dialog", lambda dialog: dialog.accept())
    button.click()
    for each in (page, listed):
        expect(each.locator("article", has_text="stays")).to_be_visible()
        expect(each.locator("article", has_text="goes")).to_have_count(0)
    expect(looks.get_by_text("no study 'goes'")).to_be_visible()
    with Store.open(str(db)) as store:
        assert [study.name for study in store.studies()] == ["stays"]
    for each in (looks, listed, page):
        each.goto("about:blank")  # before its server goes
