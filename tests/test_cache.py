"""The user's cache: where it is, and that a folder in it is whole or not there."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from autoq.cache import build_once, cache_dir
from autoq.errors import AutoQError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "own"))
    return tmp_path / "own"


def test_where_it_is(monkeypatch, tmp_path):
    assert cache_dir() == tmp_path / "own"
    monkeypatch.delenv("AUTOQ_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_dir() == tmp_path / "xdg" / "autoq"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_dir() == tmp_path / "home" / ".cache" / "autoq"


def test_one_builds_and_the_others_wait():
    built: list[int] = []

    def build(folder: Path) -> None:
        built.append(1)
        time.sleep(0.1)
        (folder / "whole").touch()

    found: list[bool] = []
    threads = [
        threading.Thread(target=lambda: found.append((build_once("a/b", build) / "whole").exists())) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (found, built) == ([True] * 4, [1])


def test_what_was_left_half_done_is_done_again(cache):
    def fails(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyError("no")

    with pytest.raises(KeyError):
        build_once("x", fails)
    assert not (cache / "x").exists()
    (cache / ".x.partial").mkdir()
    (cache / ".x.partial" / "left by a killed process").touch()
    folder = build_once("x", lambda folder: (folder / "whole").touch())
    assert [path.name for path in folder.iterdir()] == ["whole"]


def test_a_cache_that_cannot_be_written_says_so(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "file"))
    with pytest.raises(AutoQError, match="set AUTOQ_CACHE to another one"):
        build_once("x", lambda _: None)
