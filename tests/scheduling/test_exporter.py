"""Exports: their process may die, hang or be left behind; what is old goes; no path comes from a client."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from autoq.assignment import Assignment
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.service import exporting
from autoq.service.exporting import Exporter
from autoq.store import holders

WRITES = """
import os, sys, time
from pathlib import Path
from autoq.store import Store, holders
store, export_id, folder = Store.open(os.environ["AUTOQ_DB"]), int(sys.argv[1]), Path(sys.argv[2])
attempt = (store.queue.export(export_id).progress or {}).get("attempt", 0) + 1
store.queue.set_export(export_id, "running", ["queued"], None, {"holder": holders.holder(), "attempt": attempt})
"""
DONE = """
(folder / str(export_id)).mkdir()
(folder / str(export_id) / "file").write_text("x")
store.queue.set_export(export_id, "finished", ["running"], None, {"stage": "finished"}, {"lines": []})
"""


@pytest.fixture
def exporter(store, tmp_path):
    """Make an exporter whose process runs `body` after it has said that it runs."""
    made = []

    def make(body=DONE, **options):
        script = tmp_path / f"write{len(made)}.py"
        script.write_text(WRITES + body)
        folder = tmp_path / "exports"
        folder.mkdir(exist_ok=True)
        environment = {"AUTOQ_DB": store.address}
        made.append(Exporter(store, folder, environment, command=(sys.executable, str(script)), **options))
        return made[-1]

    yield make
    for each in made:
        each.stop()


@pytest.fixture
def export(store, submit):
    """Ask for an export of another trial of one study; its id."""
    study = submit("ann")

    def one(number=0):
        schemes = {f"l{place}": parse_scheme(f"rtn-int{2 + number // 7**place % 7}-g64") for place in range(3)}
        trial = store.start_trial(study, number, Assignment(schemes), "sampler")
        store.finish_trial(trial.id, 1, [Measurement("size_bytes", 1.0, "bytes", "computed", "search")], {}, 1.0, "w")
        return store.queue.add_export(study, number).id

    return one


def look_until(exporter, store, export_id, *states):
    end = time.monotonic() + 120
    while store.queue.export(export_id).state not in states:
        assert time.monotonic() < end
        exporter.look()
        time.sleep(0.02)
    return store.queue.export(export_id)


def test_one_at_a_time_in_order_and_there_when_finished(store, exporter, export, tmp_path):
    first, second = export(0), export(1)
    writes = exporter()
    look_until(writes, store, first, "finished")
    assert store.queue.export(second).state == "queued"
    assert writes.path(second) is None
    look_until(writes, store, second, "finished")
    assert writes.path(first) == tmp_path / "exports" / str(first)
    writes._process.wait()
    writes.look()
    assert list((tmp_path / "exports").glob("*.log")) == []


def test_a_process_that_dies_is_tried_once_more_and_then_the_export_failed(store, exporter, export):
    asked = export()
    dies = exporter("sys.stderr.write('out of luck\\n'); sys.stderr.flush(); os.kill(os.getpid(), 9)")
    found = look_until(dies, store, asked, "failed")
    assert found.message == (
        "its process ended by SIGKILL (killed from outside, or for want of memory): out of luck"
    )  # fmt: skip
    assert found.progress["attempt"] == 2


def test_one_that_never_ran_is_tried_twice_too(store, exporter, export):
    asked = export()
    broken = exporter()
    broken._command = (sys.executable, "-c", "raise SystemExit('no module')")
    found = look_until(broken, store, asked, "failed")
    assert found.message == "its process ended with code 1; its log says why: no module"


def test_one_that_takes_too_long_is_ended(store, exporter, export):
    asked = export()
    found = look_until(exporter("time.sleep(600)", limit_seconds=3.0), store, asked, "failed")
    assert found.message == "it took longer than 3 s"


def test_stopped_in_the_middle_it_waits_again_and_that_is_no_failure(store, exporter, export):
    asked = export()
    slow = exporter("time.sleep(600)")
    look_until(slow, store, asked, "running")
    slow.stop()
    assert (store.queue.export(asked).state, store.queue.export(asked).progress) == ("queued", {"attempt": 0})
    look_until(exporter(), store, asked, "finished")


def test_what_a_killed_server_left_is_waited_for_while_it_lives_and_begun_again_when_not(store, exporter, export):
    asked = export()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        told = {"holder": holders.holder(process.pid), "attempt": 1}
        assert store.queue.set_export(asked, "running", ["queued"], None, told)
        writes = exporter()
        writes.look()
        assert store.queue.export(asked).state == "running"
        process.kill()
    assert look_until(writes, store, asked, "finished").started_at is not None


def test_what_is_too_many_or_too_old_is_removed_and_so_is_what_belongs_to_none(store, exporter, export, tmp_path):
    ids = [export(i) for i in range(4)]
    writes = exporter(kept=2)
    for each in ids:
        look_until(writes, store, each, "finished")
    folder = tmp_path / "exports"
    writes._process.wait()
    writes.look()
    (folder / "77").mkdir()
    (folder / "78.work").mkdir()
    (folder / "notes").mkdir()
    writes.clean()
    assert [store.queue.export(each).state for each in ids] == ["removed"] * 2 + ["finished"] * 2
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [*map(str, ids[2:]), "notes"]
    assert writes.path(ids[0]) is None
    writes._kept_days *= 0
    writes.clean()
    assert [path.name for path in folder.iterdir() if path.is_dir()] == ["notes"]


@pytest.mark.slow
def test_what_cannot_be_exported_fails_in_one_line_and_leaves_nothing(store, export, tmp_path):
    """The real writer, on a study whose model is nowhere."""
    asked = export()
    assert not exporting.write(store, asked, tmp_path)
    found = store.queue.export(asked)
    assert found.state == "failed"
    assert found.message
    assert "\n" not in found.message
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(str(asked))] == []
    assert not exporting.write(store, asked, tmp_path)  # it does not wait any more


def test_what_is_finished_while_it_cleans_stays(store, exporter, export, tmp_path, monkeypatch):
    asked = export()
    writes = exporter()
    folder = tmp_path / "exports" / str(asked)
    assert store.queue.set_export(asked, "running", ["queued"], None, {"attempt": 1})
    folder.mkdir()
    looked = type(store.queue).exports

    def look(self, *arguments, **named):
        found = looked(self, *arguments, **named)
        store.queue.set_export(asked, "finished", ["running"], None, {"stage": "finished"}, {"lines": []})
        return found

    monkeypatch.setattr(type(store.queue), "exports", look)
    writes.clean()
    assert store.queue.export(asked).state == "finished"
    assert folder.is_dir()
