"""A study on a Ray cluster whose workers and nodes are killed at random moments, nodes join, and the head dies."""

from __future__ import annotations

import contextlib
import os
import random
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
import random, sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
print(cluster.address, flush=True)
for line in sys.stdin:
    if line == "add\\n":
        nodes.append(cluster.add_node(num_cpus=1))
    elif line == "remove\\n":
        cluster.remove_node(nodes.pop(0), allow_graceful=False)
    else:
        cluster.head_node.kill_gcs_server()
        cluster.head_node.kill_raylet()
    print("done", flush=True)
cluster.shutdown()
"""

STUDY = """
import functools, sys
from ray import cloudpickle
from autoq.errors import AutoQError
from autoq.search import holding
from autoq.search.controller import run_study
from autoq.search.observer import Observer
from autoq.store import Store
from autoq.workers import session
from autoq.workers.executor import RayExecutor
import controllers
_, url, study_id, address, pause, silent = sys.argv
cloudpickle.register_pickle_by_value(controllers)
controllers.Evaluator.pause = float(pause)
holding.BEAT_SECONDS = 0.1
session.SILENT_SECONDS = float(silent)

def make(spec):
    workers = spec.workers.model_copy(update={"executor": "ray", "address": address, "cpus": 1})
    return RayExecutor(spec.model_copy(update={"workers": workers}), controllers.Evaluator)

with Store.open(url) as store:
    try:
        run_study(store, int(study_id), Observer(), make)
    except AutoQError as problem:
        sys.exit(f"autoq: {problem}")
"""


def environment() -> dict[str, str]:
    """That of a cluster's processes, with a token of its own."""
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    return os.environ | token | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(SUPPORT)}


class Cluster:
    """A head without room and two nodes of one worker each, in processes of their own."""

    def __init__(self) -> None:
        self.environment = environment()
        for _ in range(5):  # a node whose agents take more than 15 seconds to come up dies of it (ray #65983)
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", CLUSTER], env=self.environment,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            assert self.process.stdout is not None
            self.address = self.process.stdout.readline().strip()
            if self.address:
                return
            self.close()
        raise AssertionError("Ray does not start on this machine")

    def do(self, what: str) -> None:
        """`add` or `remove` a node, or kill the `head`."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def study(self, store: Store, study_id: int, pause: float = PAUSE, silent: float = 20.0) -> subprocess.Popen[str]:
        """A controller on this cluster, whose trials take so long, and which bears with a silent head for so long."""
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
def cluster() -> Iterator[Cluster]:
    """The cluster, whose head the last test kills, and nothing of it afterwards."""
    cluster = Cluster()
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


def check_whole(store: Store, study_id: int, calm: list[Any]) -> None:
    """Nothing lost, nothing twice, a frontier that its trials have, as without a fault."""
    assert store.study(study_id).state == "finished"
    assert [t.number for t in store.frontier(study_id)] == store.recompute_frontier(study_id)
    assert outcome(store, study_id) == calm
    assert all(trial.attempt <= 2 for trial in store.trials(study_id))


def wait(true: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    """What `true` gives once it is not nothing, or the process has ended."""
    until = time.monotonic() + PATIENCE
    while not (found := true()) and process.poll() is None:
        assert time.monotonic() < until, "it did not happen"
        time.sleep(0.01)
    return found


def struck(store: Store, study_id: int, dice: random.Random) -> tuple[int, TrialRecord] | None:
    """A worker that is evaluating a trial for the first time, and the trial."""
    workers = store.queue.workers()
    dice.shuffle(workers)
    for worker in workers:
        pid = int(worker.id.rpartition(":")[2])
        if worker.study_id == study_id and worker.trial is not None and psutil.pid_exists(pid):
            trial = store.trial(study_id, worker.trial)
            if (trial.state, trial.attempt) == ("running", 1):
                return pid, trial
    return None


def test_workers_and_nodes_come_and_go(cluster, new_study, calm, rounds) -> None:
    (store, new), dice = new_study, random.Random(3)
    kills, removals = rounds(2, 50), rounds(1, 8)
    noticed: list[float] = []
    finished: list[float] = []
    killed = removed = studies = 0
    while killed < kills or removed < removals:
        study, studies = new(), studies + 1
        controller = cluster.study(store, study)
        # More than this in a row, and the study would be right to give up.
        for _ in range(BUDGET // 2):
            if killed == kills and removed == removals:
                break
            found = wait(lambda study=study: struck(store, study, dice), controller)
            if not found:
                break
            pid, trial = found
            time.sleep(dice.uniform(0, PAUSE / 4))
            at, when = time.monotonic(), time.time()
            if (removed < removals and dice.random() < removals / (kills + removals)) or killed == kills:
                cluster.do("remove")
                cluster.do("add")
                removed += 1
                continue
            os.kill(pid, signal.SIGKILL)
            killed += 1
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
    print(f"seed 3: {killed} workers killed and {removed} nodes removed in {studies} studies, 0 lost, 0 doubled")
    print(f"dispatched again after {sorted(noticed)[len(noticed) // 2]:.1f} s (at most {max(noticed):.1f} s),")
    print(f"evaluated elsewhere but for the trial's own time after {max(finished):.1f} s at most")


def test_the_head_dies_and_the_study_goes_on_elsewhere(cluster, new_study, calm, rounds, controllers_module) -> None:
    store, new = new_study
    study, silent = new(), rounds(3, 20)
    controller = cluster.study(store, study, 2.0, silent)
    wait(lambda: len(store.trials(study, states=["complete"])) > 2, controller)
    cluster.do("head")
    _, said = controller.communicate(timeout=PATIENCE)
    assert controller.returncode == 1
    (line,) = [line for line in said.splitlines() if line.startswith("autoq: ")]
    assert f"the head of the Ray cluster at {cluster.address} has not answered for " in line
    assert "Traceback" not in said
    left = store.study(study)
    assert (left.state, left.message) == ("failed", line.removeprefix("autoq: "))
    run_study(store, study, make=lambda spec: LocalExecutor(spec, controllers_module.Evaluator))
    check_whole(store, study, calm)
