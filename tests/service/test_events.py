"""Server-sent events, over real connections to a real server."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import shutil
import socket
import threading
import time
import types
from urllib.parse import urlsplit

import httpx
import pytest

from autoq.errors import NotFound
from autoq.measurement import Measurement
from autoq.service import events
from autoq.store import Store


class Follower(threading.Thread):
    """A client that reads events until it is closed; what it got, and when."""

    def __init__(self, url, headers=None):
        super().__init__(daemon=True)
        parts = urlsplit(url)
        self.path = f"{parts.path}?{parts.query}"
        self.headers = headers or {}
        self.events, self.ended = [], False
        self.connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=150)
        self.connection.connect()
        self.socket = self.connection.sock
        self.ready = threading.Event()
        self.start()
        assert self.ready.wait(120)

    def run(self):
        try:
            self.connection.request("GET", self.path, headers=self.headers)
            with self.connection.getresponse() as answer:
                self.status = answer.status
                self.content_type = answer.headers.get("content-type")
                self.ready.set()
                found = {}
                while line := answer.readline():
                    name, _, value = line.decode().rstrip("\n").partition(": ")
                    if name:
                        found[name] = value
                        continue
                    if "data" in found:
                        self.events.append((int(found.get("id", -1)), json.loads(found["data"]), time.monotonic()))
                    found = {}
        except (OSError, http.client.HTTPException):
            pass
        finally:
            self.connection.close()
            self.ended = True
            self.ready.set()

    def wait(self, done, seconds=120):
        until = time.monotonic() + seconds
        while not done(self):
            assert time.monotonic() < until, self.events
            time.sleep(0.01)
        return self

    def close(self):
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.join(20)


def seen_changes(follower):
    return [number for number, _, _ in follower.events]


def numbers(follower):
    return {trial["number"] for _, data, _ in follower.events for trial in data["trials"]}


@pytest.fixture
def quiet(template, tmp_path):
    """A database in which nothing waits: what a server starts by itself would change studies under the test."""
    path = shutil.copy(template, tmp_path / "autoq.db")
    with Store.open(str(path)) as store:
        for export in store.queue.exports():
            store.queue.set_export(export.id, "failed", ("queued",), "not in this test")


@pytest.fixture
def served(quiet, serve, tmp_path):
    process = serve()
    with Store.open(str(tmp_path / "autoq.db")) as store:
        yield process.url, store


def add(store, study, number):
    known = store.trial(study.id, 3)
    trial = store.start_trial(study.id, number, known.assignment, "sampler")
    assert store.finish_trial(trial.id, 1, searched(known), {}, 1.0, "w")


def searched(trial):
    return [m for (_, part), m in trial.measurements.items() if part == "search"]


def test_what_changes_comes_at_once_and_a_reconnect_misses_nothing(served):
    url, store = served
    study = store.study("mine")
    address = f"{url}/api/v1/studies/mine/events"
    first = Follower(address).wait(lambda f: f.events)
    assert first.content_type.startswith("text/event-stream")
    assert first.events[0][0] == study.changes, "how it stands comes first"
    assert first.events[0][1]["study"]["study"] == "mine"
    sent = time.monotonic()
    add(store, study, 9)
    end = store.study("mine").changes
    first.wait(lambda f: seen_changes(f)[-1:] == [end])
    assert 9 in numbers(first)
    assert first.events[-1][2] - sent < events.HEARTBEAT
    last = seen_changes(first)[-1]
    first.close()
    for number in range(10, 14):
        add(store, study, number)
    store.remarks.put(study.id, 3, "x", [], None)
    again = Follower(address, {"Last-Event-ID": str(last)})
    again.wait(lambda f: seen_changes(f)[-1:] == [store.study("mine").changes])
    assert numbers(again) == {10, 11, 12, 13}
    assert again.events[0][1]["since"] == last
    again.close()


def test_everybody_gets_everything_and_one_poller_asks(served, monkeypatch):
    url, store = served
    study = store.study("mine")
    start = study.changes
    followers = [Follower(f"{url}/api/v1/studies/mine/events?since={start}") for _ in range(12)]
    for number in range(9, 24):
        add(store, study, number)
    end = store.study("mine").changes
    for follower in followers:
        follower.wait(lambda f: seen_changes(f)[-1:] == [end])
        assert numbers(follower) >= set(range(9, 24))
        assert seen_changes(follower) == sorted(set(seen_changes(follower)))
        starts = [data["since"] for _, data, _ in follower.events]
        assert starts[0] == start
        assert all(since <= before for since, before in zip(starts[1:], seen_changes(follower), strict=False)), "no gap"
        follower.close()


def test_a_long_history_comes_in_chunks(served, monkeypatch):
    url, store = served
    follower = Follower(f"{url}/api/v1/studies/mine/events?since=0")
    follower.wait(lambda f: seen_changes(f)[-1:] == [store.study("mine").changes])
    assert numbers(follower) == set(range(9))
    odd = Follower(f"{url}/api/v1/studies/mine/events", {"Last-Event-ID": "999999"})
    odd.wait(lambda f: numbers(f) == set(range(9)))
    word = Follower(f"{url}/api/v1/studies/mine/events", {"Last-Event-ID": "x"})
    word.wait(lambda f: numbers(f) == set(range(9)))
    for one in (follower, odd, word):
        one.close()


def test_the_list_of_studies_is_followed(served):
    from autoq.spec import build_spec

    url, store = served
    follower = Follower(f"{url}/api/v1/events").wait(lambda f: f.events)
    assert {study["study"] for study in follower.events[0][1]["studies"]} == {"mine", "theirs", "nobodys"}
    store.create_study(build_spec({"model": {"id": "tiny"}, "name": "new"}), [("x", "u", "minimize")])
    follower.wait(lambda f: [study["study"] for study in f.events[-1][1]["studies"]] == ["new"])
    store.set_state(store.study("new").id, "running")
    follower.wait(lambda f: [study["state"] for study in f.events[-1][1]["studies"]] == ["running"])
    again = Follower(f"{url}/api/v1/events", {"Last-Event-ID": str(seen_changes(follower)[-1])})
    store.set_state(store.study("new").id, "failed", "why")
    again.wait(lambda f: f.events)
    # Where it was so before the first look, all studies come.
    assert {study["study"]: study["state"] for study in again.events[-1][1]["studies"]}["new"] == "failed"
    for one in (follower, again):
        one.close()


def test_a_client_that_reads_nothing_holds_nobody_up(served):
    url, store = served
    study = store.study("mine")
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        request = f"GET /api/v1/studies/mine/events?since=0 HTTP/1.1\r\nHost: localhost:{port}\r\n\r\n"
        deaf.sendall(request.encode())
        quick = Follower(f"{url}/api/v1/studies/mine/events")
        for number in range(9, 40):
            add(store, study, number)
        quick.wait(lambda f: 39 in numbers(f))
        assert httpx.get(f"{url}/healthz").status_code == 200
    quick.close()


def test_streams_end_with_the_token(quiet, serve, tmp_path):
    process = serve()
    with Store.open(str(tmp_path / "autoq.db")) as store:
        secret, record = store.accounts.create("x", "ada", "viewer")
        headers = {"Authorization": f"Bearer {secret}"}
        assert Follower(f"{process.url}/api/v1/studies/theirs/events", headers).wait(lambda f: f.ended).status == 404
        assert Follower(f"{process.url}/api/v1/events").wait(lambda f: f.ended).status == 401
        lists = Follower(f"{process.url}/api/v1/events", headers).wait(lambda f: f.events)
        assert [study["study"] for study in lists.events[0][1]["studies"]] == ["mine"]
        lists.close()
        follower = Follower(f"{process.url}/api/v1/studies/mine/events", headers).wait(lambda f: f.events)
        store.accounts.revoke(record.id)
        time.sleep(events.HEARTBEAT / 2 + 0.5)
        store.remarks.put(store.study("mine").id, 3, "y", [], None)
        follower.wait(lambda f: f.ended)
        assert len(follower.events) == 1, "what came after the token had ended was not told"


def test_a_measurement_is_told_with_all_its_parts(served):
    url, store = served
    follower = Follower(f"{url}/api/v1/studies/mine/events?since=0").wait(lambda f: 3 in numbers(f))
    told = next(t for _, data, _ in follower.events for t in data["trials"] if t["number"] == 3)
    assert told == store.trial(store.study("mine").id, 3, with_assignments=False).to_json()
    follower.close()
    assert isinstance(searched(store.trial(store.study("mine").id, 3))[0], Measurement)


def test_a_study_that_is_removed_between_two_looks_keeps_no_other_waiting(monkeypatch):
    """It is among the changes, and gone once they are read: those who follow another study are told of theirs."""

    class Feed:
        def versions(self, ids):
            return dict.fromkeys(ids, 2)

    hub = events.Hub(types.SimpleNamespace(feed=Feed()), None, 9, 9)
    hub._followed = {1: events._Followed(1), 2: events._Followed(1)}

    def read(study_id, since):
        if study_id == 1:
            raise NotFound("there is no study 1")
        return 2, b"change"

    monkeypatch.setattr(hub, "_read", read)
    assert asyncio.run(hub._look())
    assert hub._followed[1].version == -1
    assert (hub._followed[2].version, hub._followed[2].after(1)) == (2, (2, b"change"))
