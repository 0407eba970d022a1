"""A server whose database goes away: it says so, and all of it goes on when the database is back."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import threading
import time

import httpx
import pytest

from autoq.store import Store
from autoq.store import database as databases

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

AUTOQ = "import sys; from autoq.cli import main; sys.exit(main())"


@pytest.fixture
def server(postgresql):
    server = postgresql.Server(postgresql.binaries())
    yield server
    server.stop()


def until(true, seconds=180.0):
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)
    return found


class Follower(threading.Thread):
    """Follows the events of a study as a browser does: when a stream breaks off it comes back with what it has seen."""

    def __init__(self, url):
        super().__init__(daemon=True)
        self.url, self.seen, self.told, self.ended = url, 0, {}, threading.Event()

    def run(self):
        while not self.ended.is_set():
            try:
                headers = {"Last-Event-ID": str(self.seen)} if self.seen else {}
                with httpx.stream("GET", self.url, headers=headers, timeout=30) as stream:
                    for line in stream.iter_lines():
                        if line.startswith("id: "):
                            self.seen = int(line[4:])
                        elif line.startswith("data: "):
                            self.told |= {t["number"]: t["state"] for t in json.loads(line[6:]).get("trials", ())}
                        if self.ended.is_set():
                            return
            except httpx.HTTPError:
                time.sleep(0.05)


def test_a_server_waits_for_its_database(server, tiny_model_dir, tmp_path, rounds, record_testsuite_property):
    environment = os.environ | {"AUTOQ_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment["AUTOQ_DB"] = address = server.fresh()
    spec = {
        "name": "whole",
        "model": {"id": str(tiny_model_dir("llama"))},
        "data": {"calibration_tokens": 128, "search_tokens": 128, "report_tokens": 128, "window_tokens": 64},
        "target": {"name": "generic"},
        "space": {"schemes": ["rtn-int4-g32", "rtn-int8-channel-sym", "keep"]},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        "sampler": {"name": "random", "seeds": 0},
        "budget": {"trials": rounds(8, 120), "report_points": 2},
        "workers": {"cpus": 1},
    }
    command = [sys.executable, "-c", AUTOQ, "serve", "--port", "0", "--slots", "1", "--cpus", "1"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(command, env=environment, cwd=tmp_path, stderr=log, stdout=log)
    try:
        said = until(lambda: re.search(r"http://[\d.]+:\d+", (tmp_path / "log").read_text()))[0]
        dice, faults, refused = random.Random(0), 0, 0
        with httpx.Client(base_url=said, timeout=300) as client, Store.open(address) as store:
            made = client.post("/api/v1/studies", json={"spec": spec})
            assert made.status_code == 201, made.text
            follower = Follower(f"{said}/api/v1/studies/whole/events?since=0")
            follower.start()
            until(lambda: store.study("whole").state == "running")
            for turn in range(rounds(1, 12)):
                had = len(store.trials(1, states=["complete"])) if store.study("whole").state == "running" else None
                if had is not None:  # in the middle of its trials
                    until(lambda had=had: len(store.trials(1, states=["complete"])) > had or _ended(store))
                server.halt(["immediate", "fast"][turn % 2])
                faults += 1
                answer = until(lambda: (a := client.get("/api/v1/studies")).status_code != 200 and a)
                assert answer.status_code == 503
                assert int(answer.headers["Retry-After"]) > 0
                assert answer.json() == {"error": {"message": "the database cannot be used at the moment"}}
                assert client.get("/healthz").status_code == 200
                assert client.get("/readyz").json()["database"] is False
                refused += 1
                time.sleep(dice.uniform(0, 2))
                server.start()
                assert until(lambda: (a := client.get("/api/v1/studies")).status_code == 200 and a).json()["studies"]
                until(lambda: client.get("/readyz").json()["ready"])
            until(lambda: _ended(store), 900)
            study = client.get("/api/v1/studies/whole").json()
            assert study["state"] == "finished", study["message"]
            trials = {
                t["number"]: t["state"] for t in client.get("/api/v1/studies/whole/trials?limit=500").json()["trials"]
            }
            assert list(trials) == list(range(len(trials)))
            until(lambda: follower.told == trials)
            follower.ended.set()
            found = store.study("whole")
            # Its process waited: nobody took it for dead, and nothing was sent out again.
            assert {trial.attempt for trial in store.trials(found.id)} == {1}
            assert store.queue.lease(found.id).epoch == 1
            assert [t.number for t in store.frontier(found.id)] == store.recompute_frontier(found.id)
            # The backroom, too, answers.
            asked = client.post("/api/v1/specs:check", json={"spec": spec, "deep": True})
            assert asked.json()["ok"] is True, asked.text
            text = (tmp_path / "log").read_text()
            assert "Traceback" not in text, text
            assert "s3cret" not in text
        process.terminate()
        assert process.wait(timeout=180) == 0
    finally:
        process.kill()
        process.wait()
    record_testsuite_property("served", f"{faults} outages, {refused} refusals")


def _ended(store):
    return store.study("whole").state not in ("queued", "running")


def test_a_connection_is_asked_whether_it_lives_only_where_it_may_not(server, monkeypatch):
    """What the server has ended is made anew without a word, however lately it was used; what was used lately and has
    heard nothing since is used as it is."""
    with Store.open(server.fresh()) as store:
        dialect, asked = store._database._engine.dialect, []
        ping = dialect.do_ping
        monkeypatch.setattr(dialect, "do_ping", lambda connection: asked.append(1) or ping(connection))
        monkeypatch.setattr(databases, "TRUSTED_SECONDS", 3600.0)
        for _ in range(20):
            assert store.studies() == []
        assert not asked
        for restarts in (False, True) * 5:
            if restarts:
                server.halt("immediate")
                server.start()
            else:
                server.terminate()
                until(lambda: not server.backends())
            before = len(asked)
            assert store.studies() == []
            assert len(asked) == before + 1
            assert store.studies() == []
            assert len(asked) == before + 1
        monkeypatch.setattr(databases, "TRUSTED_SECONDS", -1.0)
        before = len(asked)
        assert store.studies() == []
        assert len(asked) == before + 1
