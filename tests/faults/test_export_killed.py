"""Exports that are killed at random moments, or run into a limit of the file system, as real processes."""

from __future__ import annotations

import random
import signal
import time

import pytest

from autoq.search.controller import create_study, run_study
from autoq.shipping.verify import verify
from autoq.spec import build_spec
from autoq.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def folder(tiny_model_dir, tmp_path_factory):
    """A folder with the database of a finished study, and its cache."""
    folder = tmp_path_factory.mktemp("killed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOQ_CACHE", str(folder / "cache"))
        spec = build_spec(
            {
                "name": "tiny",
                "model": {"id": str(tiny_model_dir("llama"))},
                "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 64, "window_tokens": 32},
                "objectives": ["kl_nats_per_token", "size_bytes"],
                "budget": {"trials": 8},
                "workers": {"cpus": 1},
            }
        )
        with Store.open(str(folder / "autoq.db")) as store:
            run_study(store, create_study(store, spec).id)
        yield folder


@pytest.fixture
def export(commands, folder):
    """Start an export into a folder."""

    def start(out, **options):
        arguments = ("export", "tiny", "uniform-int4", "--out", str(out), "--db", "autoq.db")
        return commands.start(*arguments, cwd=folder, **options)

    return start


def ended(process):
    """Its exit code and what it said on standard error."""
    _, told = process.communicate(timeout=250)
    return process.returncode, told


def test_a_killed_export_leaves_nothing_under_its_name(export, folder):
    start = time.monotonic()
    assert ended(export(folder / "whole")) == (0, "loading model and data …\nquantizing …\nwriting …\n")
    took = time.monotonic() - start
    dice = random.Random(0)
    for index, ending in enumerate([signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL]):
        out = folder / f"out{index}"
        process = export(out)
        time.sleep(took * dice.uniform(0.0, 1.0))
        process.send_signal(ending)
        ended(process)
        # Either it was through already, or nothing has that name.
        assert not out.exists() or verify(out, latency=False).ok
    if not (folder / "out0").exists():
        assert ended(export(folder / "out0"))[0] == 0
    assert verify(folder / "out0", latency=False).ok
    assert not list(folder.glob(".out0.partial-*"))


def test_a_file_that_grows_beyond_what_may_be_written(export, folder):
    code, told = ended(export(folder / "full", file_bytes=40_000))
    assert code == 1
    (line,) = [line for line in told.splitlines() if line.startswith("autoq: ")]
    assert "export" in line
    assert not (folder / "full").exists()
    assert not list(folder.glob(".full.partial-*"))
