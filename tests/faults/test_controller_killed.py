"""Controllers that are killed or stopped at random moments, and others that take over: nothing is lost, nothing comes
twice, and the study ends as one that nobody disturbed."""

from __future__ import annotations

import collections
import contextlib
import os
import queue
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from autoq.search.controller import create_study
from autoq.search.holding import LEASE_SECONDS
from autoq.spec import build_spec
from autoq.store import Store

TESTS = Path(__file__).parent.parent
DONE, BUSY, LOST = 0, 75, 76  # of controllers.py
KILLED = -signal.SIGKILL
PAUSE = 0.02  # seconds of a trial
PATIENCE = 120.0  # a limit for what must happen; no verdict depends on how fast it did


class Controllers:
    """Starts controllers, and knows how they ended."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(TESTS / "support" / "controllers.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert self.process.stdout is not None
        self.started: queue.Queue[int] = queue.Queue()
        self.ends: dict[int, queue.Queue[tuple[int, str]]] = {}
        assert self.process.stdout.readline() == "ready\n"
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            what, pid, *rest = line.rstrip("\n").split(" ", 3)
            if what == "started":
                self.ends[int(pid)] = queue.Queue()
                self.started.put(int(pid))
            else:
                self.ends[int(pid)].put((int(rest[0]), rest[1]))

    def start(self, study: Study, host: str = "-", pause: float = PAUSE, lease: float = 0.0) -> int:
        """A controller's process id. `host` is the machine it takes itself to be on."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{host} {pause} {lease} {study.id} {study.store.address}\n")
        self.process.stdin.flush()
        return self.started.get(timeout=PATIENCE)

    def ended(self, pid: int, seconds: float = PATIENCE) -> tuple[int, str] | None:
        """Exit code and last words; None while it has not ended after so many seconds."""
        try:
            return self.ends[pid].get(timeout=seconds)
        except queue.Empty:
            return None

    def close(self) -> None:
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()
        self.reader.join()


@pytest.fixture(scope="module")
def server(postgresql: ModuleType) -> Iterator[Any]:
    """A PostgreSQL server of our own."""
    server = postgresql.Server(postgresql.binaries())
    yield server
    server.stop()


@pytest.fixture(scope="module")
def controllers() -> Iterator[Controllers]:
    """Where controllers are started."""
    found = Controllers()
    yield found
    found.close()


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Store]:
    """A database of each kind."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path_factory.mktemp('controlled')}/autoq.db"
    else:
        url = request.getfixturevalue("server").fresh()
    with Store.open(url) as store:
        yield store


@dataclass(frozen=True)
class Study:
    """A study of one database."""

    store: Store
    id: int
    budget: int

    def results(self) -> dict[int, tuple[Any, ...]]:
        """What is acknowledged, by trial: nothing of it may ever change."""
        found = self.store.trials(self.id, states=("complete", "stopped", "failed", "duplicate"))
        searched = [{k: m for k, m in t.measurements.items() if k[1] == "search"} for t in found]
        return {
            t.number: (t.state, t.hash, t.attempt, t.origin, t.worker, t.seconds, t.finished_at, values)
            for t, values in zip(found, searched, strict=True)
        }

    def outcome(self) -> list[Any]:
        """All of it that does not depend on clocks and attempts."""
        trials = [
            (t.number, t.state, t.hash, t.origin, t.baseline, t.duplicate_of, t.measurements)
            for t in self.store.trials(self.id)
        ]
        return [*trials, [t.number for t in self.store.frontier(self.id)]]

    def struck_twice(self) -> bool:
        """Whether the trial that runs was struck twice: a third time would be held against it, as it should be."""
        return any(trial.attempt > 2 for trial in self.store.running_trials(self.id))

    def moment(self, dice: random.Random, controllers: Controllers, pid: int) -> None:
        """Wait for some of what a controller writes next, or for its end, and then for less than a trial takes."""
        until = self.store.study(self.id).changes + dice.randrange(25)
        while self.store.study(self.id).changes < until and controllers.ends[pid].empty():
            time.sleep(PAUSE / 20)
        time.sleep(dice.uniform(0, PAUSE))

    def check_whole(self, seen: Mapping[int, tuple[Any, ...]]) -> None:
        """Nothing lost, nothing twice, a frontier that its trials have, and a study that is finished."""
        assert self.store.study(self.id).state == "finished"
        final = self.results()
        assert {number: final.get(number) for number in seen} == seen, "an acknowledged result was lost or changed"
        trials = self.store.trials(self.id)
        assert [t.number for t in trials] == list(range(len(trials)))
        counted = [t for t in trials if t.state != "duplicate"]
        assert len({t.hash for t in counted}) == len(counted), "an assignment has two final results"
        assert (len(counted), {t.state for t in counted} - {"complete", "stopped"}) == (self.budget, set())
        assert [t.number for t in self.store.frontier(self.id)] == self.store.recompute_frontier(self.id)


@pytest.fixture
def new_study(store: Store, tiny_model_dir: Callable[[str], Path]) -> Callable[..., Study]:
    """A study that nobody has run yet."""

    def make(seed: int = 0, budget: int = 24) -> Study:
        tree = {
            "model": {"id": str(tiny_model_dir("llama")), "dtype": "float32"},
            "target": {"name": "generic"},
            "space": {"schemes": ["rtn-int2-g32", "rtn-int3-g32", "rtn-int4-g32", "rtn-int8-g32"]},
            "objectives": ["kl_nats_per_token", "size_bytes"],
            "sampler": {"seed": seed},
            "budget": {"trials": budget},
        }
        return Study(store, create_study(store, build_spec(tree)).id, budget)

    return make


@pytest.mark.slow
def test_killed_again_and_again(controllers, new_study, rounds) -> None:
    dice, references, moments = random.Random(7), {}, collections.Counter()
    studies = 0
    while (left := rounds(5, 100) - moments.total()) > 0:
        if (seed := studies % 4) not in references:
            whole = new_study(seed)
            assert controllers.ended(controllers.start(whole, pause=0.0)) == (DONE, "finished")
            references[seed] = whole.outcome()
        study, seen, end = new_study(seed), {}, None
        while end is None:
            pid = controllers.start(study)
            # From before the lease is taken to after the last report.
            study.moment(dice, controllers, pid)
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                freeze(pid)  # so that the trial that is struck is the one that is looked at
                os.kill(pid, signal.SIGCONT if left == 0 or study.struck_twice() else signal.SIGKILL)
            if (found := controllers.ended(pid))[0] == KILLED:
                left -= 1
                moments[len(study.results())] += 1
                assert study.results().items() >= seen.items()
                seen = study.results()
            else:
                end = found
        assert end == (DONE, "finished")
        studies += 1
        study.check_whole(seen)
        assert study.outcome() == references[seed]
    print(f"\nseed 7: controller killed {moments.total()} times in {studies} studies, 0 lost, 0 doubled; kills by the")
    print(f"results that were stored: {sorted(moments.items())}")


def take_over(controllers: Controllers, study: Study, lease: float) -> int:
    """Two controllers want the study, again and again, until one has finished it; how many wanted it."""
    wanted = 0
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        both = [controllers.start(study, host, lease=lease) for host in ("-", "third")]
        wanted += 2
        ends = [controllers.ended(pid) for pid in both]
        # On a busy machine one may lose it to the other, or come when that has finished it.
        assert all(code in (BUSY, LOST) or (code, said) == (DONE, "finished") for code, said in ends), ends
        if any(code == DONE for code, _ in ends):
            return wanted
    raise AssertionError("nobody could take the study over")


def freeze(pid: int) -> None:
    """Stop a process and all of its threads. One that is in the kernel stops when it comes out."""
    os.kill(pid, signal.SIGSTOP)
    for task in Path(f"/proc/{pid}/task").glob("*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            while task.read_text().rpartition(") ")[2][0] not in "TtZX":
                time.sleep(0.001)


def stop(study: Study, pid: int) -> None:
    """Stop a process, but not while it writes to SQLite: its lock on the file would hold everybody up."""
    while True:
        freeze(pid)
        if not study.store.address.startswith("sqlite"):
            return
        probe = sqlite3.connect(study.store.address.removeprefix("sqlite:///"), timeout=0.2, isolation_level=None)
        try:
            probe.execute("BEGIN IMMEDIATE")
            return
        except sqlite3.OperationalError:
            os.kill(pid, signal.SIGCONT)
        finally:
            probe.close()


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_another_takes_over_and_the_first_changes_nothing_any_more(controllers, new_study, rounds, how) -> None:
    """The first one's machine is another one: that it died is known by its lease alone."""
    dice, lease = random.Random(int(how)), rounds(2, LEASE_SECONDS)
    whole = new_study()
    assert controllers.ended(controllers.start(whole, pause=0.0)) == (DONE, "finished")
    taken = wanted = 0
    while taken < rounds(1, 12):
        study = new_study()
        first = controllers.start(study, "elsewhere", pause=3 * PAUSE, lease=lease)
        study.moment(dice, controllers, first)
        with contextlib.suppress(ProcessLookupError):
            stop(study, first) if how is signal.SIGSTOP else freeze(first)
        if study.store.study(study.id).state == "finished":  # before it was struck
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGCONT)
            assert controllers.ended(first) == (DONE, "finished")
            continue
        os.kill(first, how)
        seen = study.results()
        wanted += take_over(controllers, study, lease)
        taken += 1
        study.check_whole(seen)
        changes = study.store.study(study.id).changes
        if how is signal.SIGSTOP:
            os.kill(first, signal.SIGCONT)
            code, said = controllers.ended(first)
            assert code == LOST or said.startswith("the database"), said
        else:
            assert controllers.ended(first)[0] == KILLED
        assert study.outcome() == whole.outcome()
        assert study.store.study(study.id).changes == changes, "who has lost the study has written to it"
    print(f"{how.name}: {taken} of {wanted} took over (lease {lease:g} s)")
