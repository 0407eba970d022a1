"""A register and its answers, and banks that ask, without Ray."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from autoq.bank import Bank, pack
from autoq.errors import NotFinite
from autoq.scheme import parse_scheme
from autoq.workers import exchange
from autoq.workers.exchange import Register, Shelf

SCHEME = parse_scheme("rtn-int4-g32")
WEIGHT = torch.linspace(-1, 1, 64 * 64).reshape(64, 64)


def stored(root: Path) -> str:
    """The name of the one entry below a folder."""
    (path,) = root.rglob("*.safetensors")
    return path.stem


def test_an_entry_is_made_by_one_and_read_by_all_others() -> None:
    register = Register()
    for machine in "AB":
        register.shelf(machine, [f"shelf {machine}"])
    assert register.ask("e", "a1").what == "make"
    assert register.ask("e", "a1").what == "make"  # it was interrupted, and begins anew
    assert [register.ask("e", worker).what for worker in ("a2", "b1")] == ["wait"] * 2
    register.has("e", "A")
    assert register.ask("e", "b1") == ("read", "shelf A", "A")
    register.lacks("e", "A")
    assert register.ask("e", "b1").what == "make"
    register.lacks("e", "A")  # said twice, or late: B is at it
    assert register.ask("e", "b2").what == "wait"


@pytest.mark.parametrize("how", ["failed", "gone"])
def test_an_entry_of_a_maker_that_does_not_make_it_is_anothers(how: str) -> None:
    register = Register()
    assert register.ask("e", "a1").what == "make"
    register.failed("e", "b1")  # not its own
    assert register.ask("e", "b1").what == "wait"
    if how == "gone":
        register.gone("a1")
    else:
        register.failed("e", "a1")
    assert register.ask("e", "b1").what == "make"


def test_a_register_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "NAMES", 3)
    register = Register()
    register.shelf("A", ["shelf A"])
    for name in "abcd":
        register.has(name, "A")
    assert [register.ask(name, "b").what for name in "abcd"] == ["make", "read", "read", "read"]


def test_a_shelf_reads_entries_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path))
    bank = Bank(tmp_path / "bank", 10**9, 0)
    bank.quantized(WEIGHT, "w", SCHEME)
    shelf, name = Shelf("elsewhere", None), stored(tmp_path)
    monkeypatch.setattr(exchange, "CHUNK_BYTES", 100)
    parts = []
    while part := shelf.read(name, 100 * len(parts)):
        parts.append(part)
    assert len(parts) > 2
    assert b"".join(parts) == next(tmp_path.rglob(f"{name}.*")).read_bytes()
    assert shelf.read("0" * 40, 0) is None
    for wrong in ("../" * 13 + "x", "/etc/passwd", "A" * 40):
        with pytest.raises(AssertionError):
            shelf.read(wrong, 0)


class Others:
    """Neighbours that have one thing, and keep what they are told."""

    def __init__(self, content: bytes | None) -> None:
        self.content = content
        self.told: list[tuple[str, str]] = []

    def fetch(self, name: str) -> bytes | None:
        self.told.append(("fetch", name))
        return self.content

    def has(self, name: str) -> None:
        self.told.append(("has", name))

    def failed(self, name: str) -> None:
        self.told.append(("failed", name))


def test_a_bank_takes_what_a_neighbour_has(tmp_path: Path) -> None:
    made = Bank(tmp_path / "theirs", 10**9, 0).quantized(WEIGHT, "w", SCHEME)
    for content, fetched, corrupt in ((pack(made), 1, 0), (pack(made)[:-1], 0, 1), (None, 0, 0)):
        bank = Bank(tmp_path / f"own{fetched}{corrupt}", 10**9, 0)
        others = bank.neighbours = Others(content)
        found = bank.quantized(WEIGHT, "w", SCHEME)
        assert torch.equal(found.dequantize(), made.dequantize())
        assert (bank.fetched, bank.corrupt, bank.made) == (fetched, corrupt, 1 - fetched)
        name = stored(tmp_path / f"own{fetched}{corrupt}")
        assert others.told == [("fetch", name), ("has", name)]
        assert bank.quantized(WEIGHT, "w", SCHEME).scheme == SCHEME
        assert bank.hits == 1


def test_a_bank_asks_only_for_what_takes_long(tmp_path: Path) -> None:
    bank = Bank(tmp_path, 10**9, 0)
    others = bank.neighbours = Others(None)
    bank.quantized(WEIGHT, "first", SCHEME)  # nobody knows yet how long it takes
    bank.ask_seconds = 3600.0
    bank.quantized(WEIGHT, "second", SCHEME)
    assert [what for what, _ in others.told] == ["fetch", "has"]


def test_who_cannot_make_an_entry_says_so(tmp_path: Path) -> None:
    bank = Bank(tmp_path, 10**9, 0)
    others = bank.neighbours = Others(None)
    with pytest.raises(NotFinite):
        bank.quantized(torch.full((64, 64), torch.nan), "w", SCHEME)
    assert [what for what, _ in others.told] == ["fetch", "failed"]
    small = Bank(tmp_path / "small", 100, 0)  # has no room for it, so others cannot read it there
    others = small.neighbours = Others(None)
    small.quantized(WEIGHT, "w", SCHEME)
    assert [what for what, _ in others.told] == ["fetch", "failed"]
