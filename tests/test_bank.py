"""The bank: made once, shared, bounded, and never wrong whatever happens to its files."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path

import pytest
import torch

from autoq import bank as bank_module
from autoq.bank import Bank
from autoq.errors import AutoQError, NotFinite, SchemeRefused
from autoq.scheme import parse_scheme

SCHEME = parse_scheme("rtn-int4-g64")


def weight(seed: int = 0, shape=(64, 128)) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def ask(bank: Bank, w: torch.Tensor, scheme=SCHEME):
    return bank.quantized(w, Bank.weight_hash(w), scheme)


@pytest.fixture
def bank(tmp_path) -> Bank:
    return Bank(tmp_path / "bank", 10**8, 10**6)


def test_made_once_then_read(bank, tmp_path):
    first = ask(bank, weight())
    assert (bank.hits, bank.misses, bank.made) == (0, 1, 1)
    other = Bank(tmp_path / "bank", 10**8, 0)
    again = ask(other, weight())
    assert (other.hits, other.misses, other.made) == (1, 0, 0)
    assert torch.equal(first.dequantize(), again.dequantize())
    assert [path.suffix for path in files(tmp_path)] == [".safetensors"]


def test_keep_is_never_stored(bank, tmp_path):
    w = weight()
    assert torch.equal(ask(bank, w, parse_scheme("keep")).dequantize(torch.bfloat16), w)
    assert torch.equal(bank.dequantized(w, Bank.weight_hash(w), parse_scheme("keep"), torch.bfloat16), w)
    assert files(tmp_path) == []


def test_hash_sees_numbers_shape_and_dtype_and_not_strides():
    w = weight()
    known = Bank.weight_hash(w)
    assert Bank.weight_hash(w.t().contiguous().t()) == known
    changed = w.clone()
    changed[3, 3] = changed[3, 3].nextafter(torch.tensor(9.0).bfloat16())
    for other in (changed, w.view(128, 64), w.view(torch.float16), w.float()):
        assert Bank.weight_hash(other) != known


def test_key_depends_on_all_its_parts():
    base = ("a", SCHEME, "c", 1)
    keys = {Bank.key(*base), Bank.key("b", *base[1:]), Bank.key("a", parse_scheme("rtn-int4-g32"), "c", 1)}
    keys |= {Bank.key("a", SCHEME, "d", 1), Bank.key("a", SCHEME, "c", 2)}
    assert len(keys) == 5
    assert Bank.key(*base) == Bank.key(*base)


@pytest.mark.parametrize("where", ["start", "header", "middle", "end", "length"])
def test_a_flipped_bit_is_found_and_the_entry_rebuilt(bank, tmp_path, where):
    good = ask(bank, weight()).dequantize()
    (path,) = files(tmp_path)
    content = bytearray(path.read_bytes())
    header = content.index(b'"codes"')
    place = {"start": 8, "header": header + 2, "middle": len(content) // 2, "end": -1, "length": 0}[where]
    content[place] ^= 4
    path.write_bytes(content)
    assert torch.equal(ask(bank, weight()).dequantize(), good)
    assert (bank.made, bank.hits, bank.corrupt) == (2, 0, 1)
    assert torch.equal(ask(bank, weight()).dequantize(), good)
    assert bank.hits == 1


@pytest.mark.parametrize("kept", [0, 1, 7, 8, 9, 100, 0.5, -1])
def test_a_truncated_entry_is_rebuilt(bank, tmp_path, kept):
    good = ask(bank, weight()).dequantize()
    (path,) = files(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    assert torch.equal(ask(bank, weight()).dequantize(), good)
    assert bank.corrupt == 1
    assert torch.equal(ask(Bank(tmp_path / "bank", 10**8, 0), weight()).dequantize(), good)
    assert path.stat().st_size == len(content)


@pytest.mark.parametrize("content", [b"\x80\x04N.", b"[]", (2).to_bytes(8, "little") + b"{}", b"\xff" * 64])
def test_a_foreign_file_is_replaced(bank, tmp_path, content):
    good = ask(bank, weight()).dequantize()
    (path,) = files(tmp_path)
    path.write_bytes(content)
    assert torch.equal(ask(bank, weight()).dequantize(), good)
    assert bank.corrupt == 1


def test_a_valid_entry_under_another_name_is_not_believed(bank, tmp_path):
    """Same shape, same scheme kind: only the checksum's scheme tells them apart."""
    ask(bank, weight(), parse_scheme("rtn-int4-g64-sym"))
    (sym,) = files(tmp_path)
    ask(bank, weight(), parse_scheme("rtn-int4-g64-sym-a8dyn"))
    (dynamic,) = [path for path in files(tmp_path) if path != sym]
    dynamic.write_bytes(sym.read_bytes())
    ask(bank, weight(), parse_scheme("rtn-int4-g64-sym-a8dyn"))
    assert bank.corrupt == 1


def test_the_disk_limit_holds_and_the_oldest_goes_first(tmp_path):
    size = None
    bank = Bank(tmp_path, 60_000, 0)
    for seed in range(40):
        ask(bank, weight(seed))
        now = time.time() - 1000 + seed
        for path in files(tmp_path):
            size = path.stat().st_size
            if path.stat().st_mtime > time.time() - 500:
                os.utime(path, (now, now))
        assert sum(path.stat().st_size for path in files(tmp_path)) <= 60_000
    kept = len(files(tmp_path))
    assert bank.evicted == 40 - kept
    assert kept >= 60_000 * 3 // 4 // size
    hits = bank.hits
    for seed in range(40 - kept, 40):
        ask(bank, weight(seed))
    assert bank.hits - hits == kept


def test_use_keeps_an_entry_alive(tmp_path):
    bank = Bank(tmp_path, 60_000, 0)
    ask(bank, weight(0))
    (favourite,) = files(tmp_path)
    for seed in range(1, 40):
        for path in files(tmp_path):
            os.utime(path, (1000 + seed, 1000 + seed)) if path.stat().st_mtime > 10**6 else None
        ask(bank, weight(0))
        ask(bank, weight(seed))
    assert favourite.exists()
    assert bank.hits == 39
    assert bank.evicted > 0


def test_most_writes_list_no_folder(tmp_path, monkeypatch):
    scans = []
    monkeypatch.setattr(Bank, "_evict", lambda self, limit: scans.append(limit))
    bank = Bank(tmp_path, 10**8, 0)
    for seed in range(30):
        ask(bank, weight(seed))
    assert len(scans) == 1


def test_an_entry_larger_than_the_limit_is_made_and_not_stored(tmp_path):
    bank = Bank(tmp_path, 1000, 0)
    assert ask(bank, weight()).shape == (64, 128)
    assert files(tmp_path) == []
    assert bank.disk_full == 1


def test_a_full_disk_fails_nothing(bank, tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(bank_module, "write_atomically", full)
    assert ask(bank, weight()).shape == (64, 128)
    assert (bank.disk_full, bank.made) == (1, 1)
    monkeypatch.undo()
    ask(bank, weight())
    assert len(files(tmp_path)) == 1


def test_a_write_that_breaks_off_leaves_nothing(bank, tmp_path, monkeypatch):
    def broken(self, target):
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Path, "replace", broken)
    ask(bank, weight())
    assert bank.disk_full == 1
    assert files(tmp_path) == []


def test_what_a_dead_writer_left_is_cleared_after_an_hour(tmp_path):
    (tmp_path / "ab").mkdir()
    old, new = tmp_path / "ab" / "x.tmp", tmp_path / "ab" / "y.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    ask(Bank(tmp_path, 10**6, 0), weight())
    assert not old.exists()
    assert new.exists()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AutoQError, match=r"the bank's folder .* cannot be made: Not a directory"):
        Bank(tmp_path / "file" / "bank", 1, 1)


def test_errors_of_methods_pass_through_and_store_nothing(bank, tmp_path):
    with pytest.raises(SchemeRefused):
        ask(bank, weight(), parse_scheme("rtn-int4-g7"))
    bad = weight()
    bad[0, 0] = float("nan")
    with pytest.raises(NotFinite):
        ask(bank, bad)
    assert files(tmp_path) == []


def test_memory_serves_the_same_tensor_and_stays_within_its_bytes(tmp_path):
    one = 64 * 128 * 2
    bank = Bank(tmp_path, 10**8, 2 * one)
    hashes = {seed: Bank.weight_hash(weight(seed)) for seed in range(3)}

    def get(seed, dtype=torch.bfloat16):
        return bank.dequantized(weight(seed), hashes[seed], SCHEME, dtype)

    first = get(0)
    assert get(0) is first
    assert bank.misses == 1
    get(1)
    assert get(0) is first
    get(2)  # pushes 1 out: 0 was used since
    assert get(0) is first
    before = bank.hits
    get(1)
    assert bank.hits == before + 1
    large = get(0, torch.float32)
    assert large.dtype == torch.float32
    assert torch.equal(large.bfloat16(), first)
    assert get(0, torch.float32) is large
    assert bank._memory_used == sum(kept.nbytes for kept in bank._memory.values()) <= 2 * one


def test_no_memory_means_none_is_kept(tmp_path):
    bank = Bank(tmp_path, 10**8, 0)
    w = weight()
    bank.dequantized(w, Bank.weight_hash(w), SCHEME, torch.bfloat16)
    bank.dequantized(w, Bank.weight_hash(w), SCHEME, torch.bfloat16)
    assert (bank.made, bank.hits) == (1, 1)


def _work(root: Path, order: list[int], answers) -> None:
    torch.set_num_threads(1)
    bank = Bank(root, 40_000, 0)
    sums = {}
    for seed in order:
        sums[seed] = float(ask(bank, weight(seed)).dequantize().double().sum())
    answers.put((sums, bank.corrupt))


@pytest.mark.slow
def test_many_writers_and_evictions_at_once_never_disagree(tmp_path):
    context = multiprocessing.get_context("spawn")
    answers = context.SimpleQueue()
    orders = [[(i * step + shift) % 12 for i in range(60)] for step, shift in ((1, 0), (5, 3), (7, 1), (11, 6))]
    workers = [context.Process(target=_work, args=(tmp_path, order, answers)) for order in orders]
    for worker in workers:
        worker.start()
    found = [answers.get() for _ in workers]
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 4
    assert all(corrupt == 0 for _, corrupt in found)
    assert all(sums == found[0][0] for sums, _ in found)
    assert not [path for path in files(tmp_path) if path.suffix == ".tmp"]
    assert sum(path.stat().st_size for path in files(tmp_path)) <= 40_000
