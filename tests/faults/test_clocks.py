"""Clocks that are set forward and back by hours, in some of the processes that share a database and in others not."""

from __future__ import annotations

import ast
import os
import random
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from autoq.search.controller import create_study, run_study
from autoq.spec import build_spec
from autoq.store import Prepared, Store, WorkerRecord, clock, holders

HOUR = 3600.0
PRODUCT = Path(__file__).parents[2]

# A process whose clock is off by as many seconds as a file says at the moment: the C functions behind `time.time` and
# `datetime.now` are the only ones that read it here.
SHIFTED = """
import datetime as module, os, sys, time

true, now, place = time.time, module.datetime.now, os.environ["CLOCK_FILE"]

def offset():
    with open(place) as file:
        return float(file.read() or 0)

class Shifted(module.datetime):
    @classmethod
    def now(cls, tz=None):
        return now(tz) + module.timedelta(seconds=offset())

module.datetime = Shifted
time.time = lambda: true() + offset()
"""
CONTROLLER = """
import importlib.util
from autoq.search import holding as holdings
from autoq.search.controller import run_study
from autoq.store import Store
found = importlib.util.spec_from_file_location("made_up", sys.argv[1])
made_up = importlib.util.module_from_spec(found)
sys.modules["made_up"] = made_up
found.loader.exec_module(made_up)
holdings.LEASE_SECONDS, holdings.BEAT_SECONDS = 60.0, 0.05

def each(trial):
    print(trial.number, flush=True)
    sys.stdin.readline()

with Store.open(sys.argv[2]) as store:
    run_study(store, int(sys.argv[3]), made_up.Witness(each), made_up.make)
"""


@pytest.fixture(scope="module")
def server(postgresql):
    server = postgresql.Server(postgresql.binaries())
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    return str(tmp_path / "autoq.db") if request.param == "sqlite" else request.getfixturevalue("server").fresh()


@pytest.fixture
def shifted(tmp_path):
    """Start a program on a clock of its own, which `set` sets."""
    place = tmp_path / "offset"
    place.write_text("0")

    def start(program, *arguments):
        return subprocess.Popen(
            [sys.executable, "-c", SHIFTED + program, *map(str, arguments)],
            env=os.environ | {"CLOCK_FILE": str(place)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def set_clock(seconds):
        partial = tmp_path / "offset.new"
        partial.write_text(str(seconds))
        partial.replace(place)

    start.set = set_clock
    return start


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_controller_whose_clock_jumps_keeps_its_study(
    url, shifted, made_up, tiny_model_dir, tmp_path, rounds, record_testsuite_property
):
    """Somebody with another clock would take the study at any moment at which its lease seems to have ended."""
    trials = rounds(8, 150)
    spec = made_up.spec(tiny_model_dir("llama"), trials, budget={"trials": trials, "wall_time": "20m"})
    with Store.open(str(tmp_path / "whole.db")) as calm:
        study = create_study(calm, spec)
        run_study(calm, study.id, make=made_up.make)
        whole = made_up.outcome(calm, study)
    dice = random.Random(0)
    with Store.open(url) as store:
        study = create_study(store, spec)
        process = shifted(CONTROLLER, made_up.__file__, url, study.id)
        tries = jumps = 0
        for line in process.stdout:
            assert line.strip().isdecimal()
            shifted.set(dice.choice([-1, 1]) * dice.uniform(1, 72) * HOUR)
            jumps += 1
            for _ in range(4):
                assert store.queue.acquire(study.id, "elsewhere:1:0:0", 60) is None
                tries += 1
                time.sleep(dice.uniform(0, 0.05))
            process.stdin.write("\n")
            process.stdin.flush()
        process.communicate(timeout=250)
        assert process.returncode == 0
        made_up.check(store, study, None, whole)
        assert all(trial.attempt == 1 and 0 <= trial.seconds < 60 for trial in store.trials(study.id))
        assert 0 < store.table(study.id, "clock")["seconds"] < 600
    record_testsuite_property(f"clock jumps on {url.partition(':')[0]}", f"{jumps} jumps, {tries} tries to take over")


def test_a_lease_ends_by_a_clock_that_nobody_sets(tmp_path, monkeypatch):
    """On SQLite: hours ahead or back, it lasts as long as it was taken for, and not for hours."""
    from autoq.store import leases

    with Store.open(str(tmp_path / "autoq.db")) as store:
        study = store.create_study(build_spec({"model": {"id": "m"}, "name": "s"}), [("a", "u", "minimize")])
        for hours in (5, -5):
            epoch = store.queue.acquire(study.id, "elsewhere:1:0:0", 30)

            class Shifted(datetime):
                @classmethod
                def now(cls, tz=None, hours=hours):
                    return datetime.now(tz) + timedelta(hours=hours)

            monkeypatch.setattr(clock, "datetime", Shifted)
            assert store.queue.lease(study.id).live
            later = time.monotonic() + 31
            with monkeypatch.context() as patch:
                patch.setattr(leases.time, "monotonic", lambda later=later: later)
                assert not store.queue.lease(study.id).live
            store.queue.release(study.id, epoch)
        # The machine began anew, and its monotonic clock with it.
        assert store.queue.acquire(study.id, "elsewhere:1:0:0", 30)
        with monkeypatch.context() as patch:
            patch.setattr(leases.time, "monotonic", lambda: time.monotonic_ns() / 1e9 - 2 * HOUR)
            assert not store.queue.lease(study.id).live


def test_a_process_is_known_again_after_the_clock_was_set(monkeypatch):
    """psutil makes a date of the moment a process started, by a boot time that moves with the clock."""
    import psutil

    me = holders.holder()
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    its = holders.holder(other.pid)
    monkeypatch.setattr(psutil._pslinux, "boot_time", lambda: 1e9)
    for name in (me, its):
        assert not holders.is_dead(name)
        assert holders.process_of(name) is not None
    other.communicate(b"\n")
    assert holders.is_dead(its)


TOKEN = """
from autoq.store import Store
with Store.open(sys.argv[1]) as store:
    print(store.accounts.create("t", "ann", "viewer", module.timedelta(hours=1))[0])
"""


@pytest.mark.parametrize("hours", [5, -5])
def test_a_token_lasts_as_long_as_was_said_whoever_made_it(server, shifted, hours):
    """Where machines share a database its clock counts."""
    url = server.fresh()
    shifted.set(hours * HOUR)
    made = shifted(TOKEN, url)
    secret = made.communicate(timeout=250)[0].strip()
    with Store.open(url) as store:
        token = store.accounts.find(secret)
        assert token is not None
        assert token.expires_at - token.created_at == timedelta(hours=1)
        assert abs(datetime.now(UTC) - token.created_at) < timedelta(minutes=5)


def test_what_is_queued_keeps_its_place_when_the_clock_is_set_back(tmp_path, monkeypatch):
    with Store.open(str(tmp_path / "autoq.db")) as store:
        order = []
        for hours in (0, 3, -3, 0, -72):

            class Shifted(datetime):
                @classmethod
                def now(cls, tz=None, hours=hours):
                    return datetime.now(tz) + timedelta(hours=hours)

            monkeypatch.setattr(clock, "datetime", Shifted)
            spec = build_spec({"model": {"id": "m"}, "name": f"s{len(order)}"})
            prepared = Prepared([("a", "u", "minimize")], {})
            order.append(store.queue.submit("ann", None, "f", spec, prepared)[0].id)
            assert [study.id for study in store.queue.queued()] == order


def test_workers_of_a_clock_ahead_are_not_seen_for_hours(tmp_path, monkeypatch):
    class Ahead(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(hours=5)

    with Store.open(str(tmp_path / "autoq.db")) as store:
        with monkeypatch.context() as patch:
            patch.setattr(clock, "datetime", Ahead)
            store.queue.beat([WorkerRecord("h:1", "h", "cpu", "idle")])
            assert len(store.queue.workers()) == 1
        assert store.queue.workers() == []
        store.queue.beat([WorkerRecord("h:1", "h", "cpu", "busy")])
        assert [worker.state for worker in store.queue.workers()] == ["busy"]


def test_durations_are_not_measured_by_a_clock_that_can_be_set():
    """`time.time` and `time.localtime` differ by jumps; only dates of files, which are such times, go with them."""
    allowed = {"autoq/bank.py"}
    found = [
        f"{path.relative_to(PRODUCT)}:{node.lineno}"
        for folder in ("autoq", "workers", "dashboards")
        for path in sorted((PRODUCT / folder).rglob("*.py"))
        if path.relative_to(PRODUCT).as_posix() not in allowed
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("time.time", "time.time_ns")
    ]
    assert not found
