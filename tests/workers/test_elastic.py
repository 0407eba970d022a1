"""A cluster that grows and shrinks under a running executor, with real nodes; each test in a process of its own."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys

import pytest

COMMON = """
import os, time
from ray.cluster_utils import Cluster
from autoq.search.executors import Job
from autoq.spec import StudySpec
from autoq.workers.executor import RayExecutor

class Fake:
    def __init__(self, spec):
        pass
    def who(self):
        time.sleep(0.2)
        return os.getpid()

def spec(count, address):
    workers = {"executor": "ray", "count": count, "cpus": 1, "address": address}
    return StudySpec.model_validate({"model": {"id": "demo:smollm2"}, "workers": workers})

def answers(executor, keys, exclusive=False):
    for key in keys:
        executor.submit(Job(str(key), "who", exclusive=exclusive))
    found = []
    while len(found) < len(keys):
        result = executor.next(timeout=400)
        assert result is not None, "no answer"
        if result.failure is not None:
            assert result.failure.crashed, result.failure
            executor.submit(Job(result.job.key, "who", attempt=result.job.attempt + 1))
            continue
        found.append(result)
    return found
"""

GROWS = """
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
with RayExecutor(spec(2, cluster.address), Fake) as executor:
    assert len({r.value for r in answers(executor, range(3))}) == 1, "there is room for one worker"
    assert len(answers(executor, [3], exclusive=True)) == 1, "one that waits for room does not hold up a timing"
    node = cluster.add_node(num_cpus=1)
    deadline, seen = time.time() + 400, set()
    while len(seen) < 2 and time.time() < deadline:
        seen |= {r.value for r in answers(executor, range(10, 16))}
    assert len(seen) == 2, "the new node was not used"
    for key in range(20, 26):
        executor.submit(Job(str(key), "who"))
    cluster.remove_node(node, allow_graceful=False)
    done = answers(executor, [])
    keys = set()
    while len(keys) < 6:
        result = executor.next(timeout=400)
        assert result is not None
        if result.failure is not None:
            assert result.failure.crashed
            executor.submit(Job(result.job.key, "who", attempt=2))
        else:
            keys.add(result.job.key)
    assert keys == {str(key) for key in range(20, 26)}
    assert len(answers(executor, range(30, 33))) == 3
cluster.shutdown()
print("fine")
"""

CLIENT = """
import socket
with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    port = probe.getsockname()[1]
cluster = Cluster(initialize_head=True, head_node_args={
    "num_cpus": 1, "include_dashboard": False, "ray_client_server_port": port})
for attempt in range(5):  # a client server that has just started may be too slow for its own time limit
    try:
        executor = RayExecutor(spec(1, f"ray://127.0.0.1:{port}"), Fake)
        break
    except Exception as problem:
        if attempt == 4:
            raise
        time.sleep(3)
with executor:
    assert len(answers(executor, range(3))) == 3
cluster.shutdown()
print("fine")
"""


def run(script: str) -> None:
    token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMMON + script],
        env=os.environ | token, capture_output=True, text=True, timeout=850, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout.splitlines()[-1] == "fine"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_come_and_go_with_their_nodes() -> None:
    run(GROWS)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_study_may_come_in_by_the_client_server() -> None:
    run(CLIENT)
