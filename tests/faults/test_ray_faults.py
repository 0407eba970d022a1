"""A study on a Ray cluster whose workers and nodes are killed at random moments, nodes join, and the head dies."""

from __future__ import annotations

import contextlib
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from autoq.search.controller import create_study, run_study
from autoq.search.executors import LocalExecutor
from autoq.spec import build_spec
from autoq.store import Store, TrialRecord

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]  # Ray starts a dozen processes

SUPPORT = Path(__file__).parent.parent / "support"
PATIENCE = 240.0
BUDGET, PAUSE = 24, 0.4

CLUSTER = """
import sys
import psutil
from ray.cluster_utils import Cluster
at = {"node_ip_address": sys.argv[1]} if sys.argv[1] else {}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False, **at})
nodes = [cluster.add_node(num_cpus=1, **at) for _ in range(2)]
print(cluster.address, flush=True)

def below(node):
    raylet = psutil.Process(node.all_processes["raylet"][0].process.pid)
    return [process.pid for process in raylet.children(recursive=True)]

for line in sys.stdin:
    hit = below(nodes[0]) if line in ("remove\\n", "lame\\n") else []
    if line == "add\\n":
        nodes.append(cluster.add_node(num_cpus=1, **at))
    elif line == "remove\\n":
        cluster.remove_node(nodes.pop(0), allow_graceful=False)
    elif line == "head\\n":
        cluster.head_node.kill_gcs_server()
    else:  # of the head, which a study's process has for its own node, or of another one
        node = cluster.head_node if line == "raylet\\n" else nodes.pop(0)
        raylet = node.all_processes["raylet"][0].process
        raylet.kill()
        raylet.wait()  # its workers see that it is gone, as they do not while it is a zombie
    print("done", *hit, flush=True)
cluster.shutdown()
"""

STUDY = """
import functools, os, sys, time
from pathlib import Path
from ray import cloudpickle
from autoq.errors import AutoQError
from autoq.search import ahead, holding
from autoq.search.controller import run_study
from autoq.search.observer import Observer
from autoq.store import Store
from autoq.workers import session
from autoq.workers.executor import RayExecutor
import controllers
_, url, study_id, address, pause, silent = sys.argv
folder = Path(url.removeprefix("sqlite:///")).parent
cloudpickle.register_pickle_by_value(controllers)
controllers.Evaluator.pause = float(pause)
holding.BEAT_SECONDS = 0.1
session.SILENT_SECONDS = float(silent)
ahead.LATE_SECONDS = 3600  # a study that passes a late trial over depends on when that was

class Evaluator(controllers.Evaluator):
    def measure(self, *arguments, **named):
        found = super().measure(*arguments, **named)
        while Path(folder, "hold").exists():
            time.sleep(0.02)
        with Path(folder, str(os.getpid())).open("a") as measured:
            measured.write("once\\n")
        return found

def make(spec):
    workers = spec.workers.model_copy(update={"executor": "ray", "address": address, "cpus": 1})
    return RayExecutor(spec.model_copy(update={"workers": workers}), Evaluator)

with Store.open(url) as store:
    try:
        run_study(store, int(study_id), Observer(), make)
    except AutoQError as problem:
        sys.exit(f"autoq: {problem}")
"""


# Ray by itself writes a node off that has not answered for a minute.
HEALTH = {"initial_delay_ms": 1000, "period_ms": 500, "timeout_ms": 2000, "failure_threshold": 4}


def environment() -> dict[str, str]:
    """That of a cluster's processes, with a token of its own."""
    ray = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    ray |= {f"RAY_health_check_{name}": str(value) for name, value in HEALTH.items()}
    return os.environ | ray | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)}


class Cluster:
    """A head without room and two nodes of one worker each, in processes of their own, where another network reaches
    them if there is one."""

    def __init__(self, network: Any) -> None:
        self.network = network
        self.environment = environment()
        here = getattr(network, "here", "")
        for _ in range(5):  # a node whose agents take more than 15 seconds to come up dies of it (ray #65983)
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", CLUSTER, here], env=self.environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            assert self.process.stdout is not None
            self.address = self.process.stdout.readline().strip()
            if self.address:
                return
            self.close()
        raise AssertionError("Ray does not start on this machine")

    def do(self, what: str) -> set[int]:
        """`add` or `remove` a node, kill the `head`, or only the `raylet` of its machine or of a node (`lame`).

        The processes that a node had which is gone then.
        """
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        word, *hit = self.process.stdout.readline().split()
        assert word == "done"
        return set(map(int, hit))

    def join(self, turn: int) -> None:
        """A node of one worker in the other network, by `ray start` there, as whoever looks after it does."""
        ray = [sys.executable, "-W", "ignore", "-c", "from ray.scripts.scripts import main; main()", "start"]
        where = [f"--address={self.address}", f"--node-ip-address={self.network.there}"]
        for attempt in range(5):  # as above; with ports that it is told, a node need not wait for its agents' word
            first = 20000 + 100 * turn + 10 * attempt
            names = ("metrics-export", "dashboard-agent-grpc", "dashboard-agent-listen", "runtime-env-agent")
            ports = [f"--{name}-port={port}" for port, name in enumerate(names, first)]
            done = subprocess.run(
                [*self.network.inside, *ray, *where, *ports, "--num-cpus=1", f"--object-store-memory={100 * 2**20}"],
                env=self.environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if done.returncode == 0:
                return
        raise AssertionError(done.stderr[-2000:])

    def study(self, store: Store, study_id: int, pause: float = PAUSE, silent: float = 20.0) -> subprocess.Popen[str]:
        """A controller on this cluster, whose trials take so long, and which bears with a silent head for so long.

        No trial ends while there is `hold` beside the database; each worker's file there has a line for each that has.
        """
        told = [store.address, str(study_id), self.address, str(pause), str(silent)]
        return subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", STUDY, *told], env=self.environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def close(self) -> None:
        """End it, and what is left of it: its processes are told by their token."""
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("RAY_AUTH_TOKEN") == self.environment["RAY_AUTH_TOKEN"]:
                    process.kill()


@pytest.fixture(scope="module")
def network(networks: Any) -> Iterator[Any]:
    """Another network, or why there is none."""
    found = networks.try_network()
    yield found
    if not isinstance(found, str):
        found.close()


@pytest.fixture(scope="module")
def cluster(network: Any) -> Iterator[Cluster]:
    """The cluster, whose head the last test kills, and nothing of it afterwards."""
    cluster = Cluster(network)
    yield cluster
    cluster.close()


@pytest.fixture
def new_study(tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> Iterator[Any]:
    """The store, and what makes a study in it that nobody has run yet."""
    tree = {
        "model": {"id": str(tiny_model_dir("llama")), "dtype": "float32"},
        "target": {"name": "generic"},
        "space": {"schemes": ["rtn-int2-g32", "rtn-int3-g32", "rtn-int4-g32", "rtn-int8-g32"]},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        "budget": {"trials": BUDGET},
        "workers": {"executor": "ray", "count": 2},
    }
    with Store.open(str(tmp_path / "autoq.db")) as store:
        yield store, lambda: create_study(store, build_spec(tree)).id


@pytest.fixture
def calm(controllers_module: Any, new_study: Any) -> list[Any]:
    """How the study comes out that nobody disturbs."""
    store, new = new_study
    study = new()
    run_study(store, study, make=lambda spec: LocalExecutor(spec, controllers_module.Evaluator))
    return outcome(store, study)


def outcome(store: Store, study_id: int) -> list[Any]:
    """All of a study that does not depend on clocks, attempts and workers."""
    trials = [(t.number, t.state, t.hash, t.origin, t.duplicate_of, t.measurements) for t in store.trials(study_id)]
    return [*trials, [t.number for t in store.frontier(study_id)]]


def check_whole(store: Store, study_id: int, calm: list[Any], attempts: int = 2) -> None:
    """Nothing lost, nothing twice, a frontier that its trials have, as without a fault."""
    assert store.study(study_id).state == "finished"
    assert [t.number for t in store.frontier(study_id)] == store.recompute_frontier(study_id)
    assert outcome(store, study_id) == calm
    assert all(trial.attempt <= attempts for trial in store.trials(study_id))


def wait(true: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What `true` gives once it is not nothing, or the process has ended."""
    until = time.monotonic() + PATIENCE
    while not (found := true()) and process.poll() is None:
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
    return found


def workers_of(store: Store, study_id: int) -> set[int]:
    """The processes of a study's workers, as its controller knows them."""
    return {int(worker.id.rpartition(":")[2]) for worker in store.queue.workers() if worker.study_id == study_id}


def struck(
    store: Store, study_id: int, dice: random.Random, which: Callable[[int], bool] = lambda _: True
) -> tuple[int, TrialRecord] | None:
    """A worker, one of `which`, that is evaluating a trial for the first time, and the trial.

    None while a trial is tried again: struck twice it would fail, as it should.
    """
    if any(trial.attempt > 1 for trial in store.running_trials(study_id)):
        return None
    workers = store.queue.workers()
    dice.shuffle(workers)
    for worker in workers:
        pid = int(worker.id.rpartition(":")[2])
        if worker.study_id == study_id and worker.trial is not None and psutil.pid_exists(pid) and which(pid):
            trial = store.trial(study_id, worker.trial)
            if (trial.state, trial.attempt) == ("running", 1):
                return pid, trial
    return None


def test_workers_and_nodes_come_and_go(cluster, new_study, calm, rounds) -> None:
    (store, new), dice = new_study, random.Random(3)
    left = ["kill"] * rounds(2, 50) + ["remove", "lame"] * rounds(1, 8)
    dice.shuffle(left)
    noticed: list[float] = []
    finished: list[float] = []
    counts = dict.fromkeys(left, 0)
    studies = 0
    while left:
        study, studies = new(), studies + 1
        controller = cluster.study(store, study)
        # More than this in a row, and the study would be right to give up.
        for _ in range(BUDGET // 2):
            if not left:
                break
            found = wait(lambda study=study: struck(store, study, dice), controller)
            if not found:
                break
            pid, trial = found
            time.sleep(dice.uniform(0, PAUSE / 4))
            at, when = time.monotonic(), time.time()
            what = left.pop()
            counts[what] += 1
            if what != "kill":
                hit = cluster.do(what)
                cluster.do("add")
                wait(lambda study=study, hit=hit: not hit & workers_of(store, study), controller)  # until it is noticed
                continue
            os.kill(pid, signal.SIGKILL)
            one = lambda trial=trial, study=study: store.trial(study, trial.number)  # noqa: E731
            wait(lambda one=one: one().attempt == 2 or one().state != "running", controller)
            if one().attempt == 2:
                noticed.append(time.monotonic() - at)
                wait(lambda one=one: one().state != "running", controller)
                finished.append(one().finished_at.timestamp() - when - PAUSE)
        _, said = controller.communicate(timeout=PATIENCE)
        assert controller.returncode == 0, said
        check_whole(store, study, calm)
    assert noticed
    print(f"seed 3: {counts} of workers, nodes, and nodes' raylets in {studies} studies, 0 lost, 0 doubled")
    print(f"dispatched again after {sorted(noticed)[len(noticed) // 2]:.1f} s (at most {max(noticed):.1f} s),")
    print(f"evaluated elsewhere but for the trial's own time after {max(finished):.1f} s at most")


def test_a_node_is_cut_off_and_comes_back(cluster, network, networks, new_study, calm, rounds, tmp_path) -> None:
    """It goes on in vain. What it has done when it is reached again, and was done elsewhere meanwhile, is nothing."""
    network = networks.network_or_skip(network)
    (store, new), dice = new_study, random.Random(5)
    hold, took, took_part = tmp_path / "hold", [], []
    cluster.do("remove")  # one here, one there
    for turn in range(rounds(1, 6)):
        study = new()
        hold.touch()
        controller = cluster.study(store, study)
        if turn == 0:
            cluster.join(0)
        found = wait(lambda study=study: struck(store, study, dice, network.holds), controller)
        assert found, controller.communicate()[1]
        pid, trial = found
        one = lambda trial=trial, study=study: store.trial(study, trial.number)  # noqa: E731
        time.sleep(dice.uniform(0, 0.5))
        cut = time.monotonic()
        network.cut()
        hold.unlink()
        wait((tmp_path / str(pid)).exists, controller)  # its result is on the way, and does not arrive
        assert wait(lambda one=one: one().attempt == 2, controller), controller.communicate()[1]
        took.append(time.monotonic() - cut)
        assert wait(lambda one=one: one().state == "complete", controller)
        hold.touch()
        ended = one()
        assert network.holds(pid)
        network.mend()
        # The cluster has written the node off, which ends once it hears of that. It comes back as another one.
        wait(lambda pid=pid: not psutil.pid_exists(pid), controller)
        cluster.join(turn + 1)
        found = wait(lambda study=study: struck(store, study, dice, network.holds), controller)
        assert found, controller.communicate()[1]
        hold.unlink()
        _, said = controller.communicate(timeout=PATIENCE)
        assert controller.returncode == 0, said
        took_part.append((tmp_path / str(found[0])).read_text().count("once"))
        assert (one().attempt, one().finished_at, one().worker) == (2, ended.finished_at, ended.worker)
        check_whole(store, study, calm)
    print(f"seed 5: node cut off {len(took)} times, its trial dispatched again after {max(took):.1f} s at most;")
    print(f"back, it had {took_part} trials; 0 lost, 0 doubled")


def test_what_a_study_leans_on_dies_and_it_goes_on(
    cluster, new_study, calm, rounds, controllers_module, tmp_path
) -> None:
    """Its own node's raylet, without which Ray ends all of its workers and starts none; then the head."""
    store, new = new_study
    study, silent, hold = new(), rounds(3, 20), tmp_path / "hold"

    def at_work() -> int:
        workers = [w for w in store.queue.workers() if w.study_id == study and w.trial is not None]
        return sum(psutil.pid_exists(int(worker.id.rpartition(":")[2])) for worker in workers)

    for what, called in (("raylet", "Ray node of this process"), ("head", "head of the Ray cluster")):
        done = len(store.trials(study, states=["complete"]))
        controller = cluster.study(store, study, silent=silent)
        wait(lambda done=done: len(store.trials(study, states=["complete"])) > done + 2 and at_work() == 2, controller)
        hold.touch()  # or it might end before it notices
        struck_at = time.monotonic()
        cluster.do(what)
        _, said = controller.communicate(timeout=PATIENCE)
        hold.unlink()
        assert controller.returncode == 1, said
        print(f"{what} killed: the study ended after {time.monotonic() - struck_at:.1f} s")
        line = next((line for line in said.splitlines() if line.startswith("autoq: ")), said)
        assert re.match(
            rf"autoq: the {called} at {cluster.address.rpartition(':')[0]}:\d+ has not answered for \d+ s ", line
        )
        assert "Traceback" not in said
        left = store.study(study)
        assert (left.state, left.message) == ("failed", line.removeprefix("autoq: "))
        assert not store.trials(study, states=["failed"])
    run_study(store, study, make=lambda spec: LocalExecutor(spec, controllers_module.Evaluator))
    check_whole(store, study, calm, attempts=5)
