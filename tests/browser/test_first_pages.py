"""What somebody sees who comes first: a database without studies, and a server that asks who is there."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from autoq.store import Store

pytestmark = pytest.mark.timeout(900)
Opened = Callable[..., Page]


def test_an_empty_database_says_what_to_do(opened: Opened, served: Callable[..., str], tmp_path: Any) -> None:
    Store.open(str(tmp_path / "empty.db")).close()
    page = opened("/", url=served(tmp_path / "empty.db"))
    expect(page.locator(".empty")).to_contain_text("autoq search demo")
    page.goto("about:blank")


def test_a_token_opens_the_pages(opened: Opened, served: Callable[..., str], believable: Any, tmp_path: Any) -> None:
    with Store.open(str(tmp_path / "closed.db")) as store:
        believable.Writer.new(store, "hidden")
        secret, _ = store.accounts.create("laptop", "ada", "admin")
    page = opened("/studies/hidden?tab=trials", url=served(tmp_path / "closed.db"), allowed=("401",))
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
    page.get_by_label("Token").fill("autoq_wrong")
    page.get_by_role("button", name="Sign in").click()
    expect(page.locator("#problem")).to_contain_text("token: is not valid")
    page.get_by_label("Token").fill(secret)
    page.get_by_role("button", name="Sign in").click()
    expect(page.get_by_role("heading", name="hidden")).to_be_visible()
    expect(page.get_by_role("tab", name="Trials")).to_have_attribute("aria-selected", "true")
    expect(page.locator("#user")).to_contain_text("ada, admin")
    page.get_by_role("button", name="sign out").click()
    expect(page.get_by_role("heading", name="Sign in")).to_be_visible()
