"""A disk that is full: a real file system of a few megabytes, filled at random moments and freed again."""

from __future__ import annotations

import errno
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from autoq.bank import Bank, weight_hash
from autoq.cache import build_once
from autoq.cli import app
from autoq.errors import AutoQError, StoreError
from autoq.scheme import parse_scheme
from autoq.search.controller import create_study, run_study
from autoq.shipping.export import export
from autoq.shipping.verify import verify
from autoq.spec import build_spec
from autoq.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


class Disk:
    """A small file system. `fill` leaves `free` bytes, `clear` gives back what was taken."""

    def __init__(self, root: Path) -> None:
        self.root, self.ballast = root, root / "ballast"

    def fill(self, free: int = 0) -> None:
        with self.ballast.open("ab", buffering=0) as file:
            for piece in (1 << 16, 4096, 512, 1):
                while True:
                    try:
                        file.write(b"x" * piece)
                    except OSError as problem:
                        if problem.errno != errno.ENOSPC:
                            raise
                        break
        if free:
            os.truncate(self.ballast, max(0, self.ballast.stat().st_size - free))

    def clear(self) -> None:
        self.ballast.unlink(missing_ok=True)


@pytest.fixture
def disk(tmp_path):
    """A mounted tmpfs of 8 MB."""
    root = tmp_path / "disk"
    root.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"a file system may not be mounted here: {done.stderr.strip()}")
    yield Disk(root)
    subprocess.run(["umount", "-l", str(root)], check=True)


def test_a_database_on_a_full_disk_loses_nothing_and_goes_on(
    disk, made_up, tiny_model_dir, tmp_path, rounds, record_testsuite_property
):
    spec = made_up.spec(tiny_model_dir("llama"), 24)
    with Store.open(str(tmp_path / "calm.db")) as calm:
        study = create_study(calm, spec)
        run_study(calm, study.id, make=made_up.make)
        whole = made_up.outcome(calm, study)
    dice, full = random.Random(0), 0
    for turn in range(rounds(1, 25)):
        path = disk.root / f"{turn}.db"
        with Store.open(str(path)) as store:
            study = create_study(store, spec)
        acknowledged, said = {}, []
        while True:
            moment = dice.randrange(0, 24)

            def each(trial, moment=moment):
                if trial.number == moment:
                    # Room for nothing at all, or for a few pages, so that it ends in the middle of a transaction.
                    disk.fill(dice.choice([0, 4096, 20_000, 60_000]))

            witness = made_up.Witness(each)
            with Store.open(str(path)) as store:
                try:
                    run_study(store, study.id, witness, made_up.make)
                except StoreError as problem:
                    said.append(str(problem))
                acknowledged |= witness.acknowledged
                # It can be read while there is no room.
                stored = {trial.number: trial for trial in store.trials(study.id)}
                for number, told in acknowledged.items():
                    assert stored[number].measurements.keys() >= told.measurements.keys()
                assert [t.number for t in store.frontier(study.id)] == store.recompute_frontier(study.id)
                disk.clear()
                line = f"the database '{path}' cannot grow: the disk is full; free some space and go on, "
                assert set(said) <= {line + "what was stored before is intact"}
                if store.study(study.id).state == "finished":
                    made_up.check(store, study, None, whole)
                    break
        for left in disk.root.glob(f"{turn}.db*"):
            left.unlink()
        full += len(said)
    assert full > 0
    record_testsuite_property("full disks", f"{full}")


def test_a_bank_on_a_full_disk_gives_what_it_would_and_stores_again_later(disk):
    torch.manual_seed(0)
    weights = [torch.randn(256, 256) for _ in range(4)]
    scheme = parse_scheme("rtn-int4-g64")
    bank, other = Bank(disk.root / "bank", 10**9, 0), Bank(disk.root / "other", 10**9, 0)
    wanted = [other.quantized(weight, weight_hash(weight), scheme).dequantize() for weight in weights]
    disk.fill(10_000)  # enough for a part of an entry
    for weight, dequantized in zip(weights, wanted, strict=True):
        assert torch.equal(bank.quantized(weight, weight_hash(weight), scheme).dequantize(), dequantized)
    assert (bank.disk_full, bank.hits) == (4, 0)
    assert not [path for path in (disk.root / "bank").rglob("*") if path.is_file()]
    disk.clear()
    for _ in range(2):
        for weight, dequantized in zip(weights, wanted, strict=True):
            assert torch.equal(bank.quantized(weight, weight_hash(weight), scheme).dequantize(), dequantized)
    assert (bank.disk_full, bank.hits, bank.corrupt) == (4, 4, 0)


def test_a_cache_on_a_full_disk_has_no_half_folder(disk, monkeypatch):
    monkeypatch.setenv("AUTOQ_CACHE", str(disk.root / "cache"))

    def build(folder):
        for name in ("a", "b"):
            (folder / name).write_bytes(b"x" * 100_000)

    (disk.root / "cache").mkdir()
    disk.fill(120_000)
    with pytest.raises(
        AutoQError, match=r"^the cache folder '\S+' cannot be used: [^\n]*No space left[^\n]*AUTOQ_CACHE"
    ):
        build_once("thing", build)
    assert not (disk.root / "cache" / "thing").exists()
    disk.clear()
    assert {path.name for path in build_once("thing", build).iterdir()} == {"a", "b"}


def test_an_export_and_a_report_on_a_full_disk_are_there_whole_or_not_at_all(
    disk, tiny_model_dir, tmp_path, rounds, monkeypatch
):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    spec = build_spec(
        {
            "name": "tiny",
            "model": {"id": str(tiny_model_dir("llama"))},
            "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 64, "window_tokens": 32},
            "objectives": ["kl_nats_per_token", "size_bytes"],
            "sampler": {"name": "random", "seeds": 0},
            "budget": {"trials": 6},
            "workers": {"cpus": 1},
        }
    )
    dice = random.Random(0)
    db = str(tmp_path / "autoq.db")
    with Store.open(db) as store:
        study = create_study(store, spec)
        run_study(store, study.id)
        study = store.study(study.id)
        trial = store.frontier(study.id, with_assignments=True)[0]
        out = disk.root / "out"
        export(store, study, trial, tmp_path / "whole")
        size = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*") if path.is_file())
        for _ in range(rounds(2, 50)):
            disk.fill(dice.randrange(0, size))
            with pytest.raises(AutoQError, match=r"\A[^\n]+\Z"):
                export(store, study, trial, out)
            assert [path.name for path in disk.root.iterdir()] == ["ballast"]
            disk.clear()
        export(store, study, trial, out)
        assert verify(out, latency=False).ok
        shutil.rmtree(out)
        page = disk.root / "report.html"
        assert CliRunner().invoke(app, ["report", "tiny", "--out", str(page), "--db", db]).exit_code == 0
        former = page.read_bytes()
        disk.fill(1000)
        done = CliRunner().invoke(app, ["report", "tiny", "--out", str(page), "--db", db])
        assert done.exit_code == 1
        assert done.stderr == f"autoq: cannot write {str(page)!r}: No space left on device\n"
        assert page.read_bytes() == former
        assert {path.name for path in disk.root.iterdir()} == {"ballast", "report.html"}


def test_a_database_on_a_disk_that_turns_read_only(disk, made_up, tiny_model_dir):
    """As file systems do that have met an error."""
    path = disk.root / "autoq.db"
    with Store.open(str(path)) as store:
        study = create_study(store, made_up.spec(tiny_model_dir("llama"), 12))
    subprocess.run(["mount", "-o", "remount,ro", str(disk.root)], check=True)
    try:
        shape = r"^the database '\S+' (is read-only|cannot be (opened|read or written))"
        with pytest.raises(StoreError, match=shape), Store.open(str(path)) as store:
            run_study(store, study.id, None, made_up.make)
    finally:
        subprocess.run(["mount", "-o", "remount,rw", str(disk.root)], check=True)
    with Store.open(str(path)) as store:
        run_study(store, study.id, None, made_up.make)
        assert store.study(study.id).state == "finished"
