"""A server that is killed under load: what was submitted is there once, runners outlive it, and all studies end."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from autoq.store import Store

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

PATIENCE = 600.0
TRIALS = 4

# The real application, queue, scheduler and process model; nobody looks at a model, and trials are made up.
SERVER = """
import sys
from pathlib import Path
from autoq.service.app import create_app
from autoq.service.scheduler import Scheduler
from autoq.service.serving import listen, run
from autoq.service.settings import Limits, Settings
from autoq.store import Prepared, Store

class Desk:
    def known(self, spec):
        return None

    async def prepare(self, spec):
        return Prepared([("size_bytes", "bytes", "minimize")], {"layers": {}}, {})

_, url, port, runner, folder = sys.argv
limits = Limits(requests_per_second=1e6, burst=10**6, waiting_studies=None)
with Store.open(url) as store, listen("127.0.0.1", int(port)) as listening:
    scheduler = Scheduler(store, 2, folder=Path(folder), runner=(sys.executable, runner))
    scheduler.start()
    run(create_app(store, Settings(limits=limits), Desk(), scheduler), listening, lambda: print("up", flush=True))
    scheduler.stop()
"""

RUNNER = """
import os, sys, time
from autoq.assignment import Assignment
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.search.holding import holding
from autoq.store import Store

study_id = int(sys.argv[1])
with Store.open(os.environ["AUTOQ_DB"]) as store, holding(store, study_id, queued=True) as hold:
    study = hold.store.study(study_id)
    if study.state not in ("queued", "running"):
        sys.exit(0)
    hold.store.set_state(study_id, "running")
    left = {trial.number: trial for trial in hold.store.running_trials(study_id)}
    done = len(hold.store.trials(study_id)) - len(left)
    for number in range(done, study.spec["budget"]["trials"]):
        if (trial := left.get(number)) is not None:
            attempt = hold.store.retry_trial(trial.id)
        else:
            assignment = Assignment({"layer": parse_scheme(f"rtn-int{2 + number}-g64")})
            trial, attempt = hold.store.start_trial(study_id, number, assignment, "sampler"), 1
        time.sleep(0.1)
        found = [Measurement("size_bytes", float(number), "bytes", "computed", "search")]
        assert hold.store.finish_trial(trial.id, attempt, found, {}, 0.1, str(os.getpid()))
    hold.store.queue.settle(study_id, "finished")
"""


class Server:
    """A server on one port, started again whenever it is killed."""

    def __init__(self, folder: Path, url: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (folder / "runner.py").write_text(RUNNER)
        told = [url, str(self.port), str(folder / "runner.py"), str(folder / "server")]
        self.command = [sys.executable, "-c", SERVER, *told]
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self.command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "up\n"

    def kill(self) -> None:
        """SIGKILL. Its runners stay."""
        with self.process:
            self.process.kill()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[Server, Store]]:
    url = f"sqlite:///{tmp_path}/autoq.db"
    with Store.open(url) as store:
        server = Server(tmp_path, url)
        yield server, store
        with server.process:
            server.process.terminate()


def submit(port: int, name: str, key: str) -> tuple[int, int]:
    """Send a submission until it is answered; the study's id, and how often it was sent."""
    spec = {"model": {"id": "m"}, "name": name, "budget": {"trials": TRIALS}}
    url, until = f"http://127.0.0.1:{port}/api/v1/studies", time.monotonic() + PATIENCE
    sent = 0
    while time.monotonic() < until:
        sent += 1
        try:
            answer = httpx.post(url, json={"spec": spec}, headers={"Idempotency-Key": key}, timeout=30)
        except httpx.TransportError:
            time.sleep(0.05)
            continue
        assert answer.status_code in (200, 201), answer.text
        return int(answer.json()["id"]), sent
    raise AssertionError("the server did not come back")


def runners_of(store: Store) -> list[int]:
    """The processes that hold a study."""
    leases = [lease for _, lease in store.queue.running() if lease is not None and lease.live]
    return [int(lease.holder.split(":")[1]) for lease in leases if lease.holder is not None]


def wait(true: Callable[[], Any]) -> None:
    until = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.02)


def failed(request: Future[int]) -> bool:
    """Whether it ended without an answer; then it is not waited for, and its result says why."""
    return request.done() and request.exception() is not None


def test_submissions_survive_the_server(served, rounds) -> None:
    (server, store), dice = served, random.Random(11)
    kills, many = rounds(3, 30), rounds(10, 150)
    keys = {uuid.UUID(int=dice.getrandbits(128)).hex: f"study-{number % 7}" for number in range(many)}
    answered: dict[str, int] = {}

    def one(key: str) -> int:
        # Each is sent by two at once, as by a client that has given up waiting and its user who has not.
        with ThreadPoolExecutor(2) as pair:
            ids = list(pair.map(lambda _: submit(server.port, keys[key], key), range(2)))
        assert ids[0][0] == ids[1][0]
        answered[key] = ids[0][0]
        return ids[0][1] + ids[1][1]

    adopted = crashes = 0
    with ThreadPoolExecutor(8) as pool:
        requests = [pool.submit(one, key) for key in keys]
        for kill in range(kills):
            enough = 1 + kill * (many // kills)
            wait(lambda enough=enough: len(answered) >= enough or any(failed(request) for request in requests))
            wait(lambda: runners_of(store) or not store.queue.waiting())
            time.sleep(dice.uniform(0, 0.2))
            server.kill()
            runners = runners_of(store)
            if runners and kill % 3 == 2:  # the server and one of its runners, as when a machine is short of memory
                victim = dice.choice(runners)
                if psutil.pid_exists(victim):
                    os.kill(victim, signal.SIGKILL)
                    crashes += 1
                    runners.remove(victim)
            adopted += len(runners)
            server.start()
        total = sum(request.result(PATIENCE) for request in requests)
    assert {key: submit(server.port, keys[key], key)[0] for key in keys} == answered, "a key is a study for ever"
    studies = store.studies()
    assert sorted(study.id for study in studies) == sorted(answered.values()), (
        "a submission was lost, or is there twice"
    )
    wait(lambda: all(study.state not in ("queued", "running") for study in store.studies()))
    for study in store.studies():
        assert (study.state, study.name.rpartition("-")[0] != "") == ("finished", True), study
        trials = store.trials(study.id)
        assert [(t.number, t.state) for t in trials] == [(n, "complete") for n in range(TRIALS)]
        assert [t.number for t in store.frontier(study.id)] == store.recompute_frontier(study.id)
        assert not store.queue.lease(study.id).live
    print(
        f"seed 11: server killed {kills} times under {many} submissions ({total} requests), {adopted} runners outlived"
    )
    print(f"it and {crashes} were killed with it; 0 studies lost, 0 doubled, all finished")
