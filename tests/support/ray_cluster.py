"""A real Ray cluster of several nodes on this machine, in a process of its own, that a test grows and shrinks.

Ray reads its token once per process, so the cluster has the one that sessions of the test's process would have.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from ray._raylet import Config

from autoq.workers import session

SCRIPT = """
import json, sys
from ray.cluster_utils import Cluster
nodes = {}
cluster = None

def patiently(start):  # Ray gives its processes half a minute, which on a busy machine may be too little
    for attempt in range(4):
        try:
            return start()
        except Exception:
            if attempt == 3:
                raise

for line in sys.stdin:
    action, name, options = json.loads(line)
    if action == "remove":
        cluster.remove_node(nodes.pop(name), allow_graceful=False)
    elif cluster is None:
        head = {"include_dashboard": False, **options}
        cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        nodes[name] = cluster.head_node
    else:
        nodes[name] = patiently(lambda: cluster.add_node(**options))
    print(json.dumps({"address": cluster.address, "node": nodes[name].node_id if name in nodes else None}), flush=True)
if cluster is not None:
    cluster.shutdown()
"""


class RayCluster:
    """Nodes by name. `environment` is what a process needs to join, `address` where."""

    def __init__(self) -> None:
        token = os.environ.get("RAY_AUTH_TOKEN") or session._token()
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
        # Ray's workers give way to everything else otherwise, and on a busy machine get nowhere.
        self.environment["RAY_worker_niceness"] = "0"
        self.address = ""
        self._folder = tempfile.mkdtemp(prefix="autoq-ray-")
        self._said = Path(self._folder) / "said"
        with self._said.open("w") as said:
            self._process = subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", SCRIPT],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said, text=True,
                env=os.environ | self.environment,
            )  # fmt: skip

    def enter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Let this process, and those that it starts, join."""
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        Config.initialize("")  # Ray has read the mode when it was imported

    def add(self, name: str, *, cpus: int = 1, env: Mapping[str, str] | None = None, **more: Any) -> str:
        """Start a node, the first one as the head; its id. `env` is set for all that runs on it."""
        options = {"num_cpus": cpus, "env_vars": dict(env or {}), **more}
        if not self.address:
            options["temp_dir"] = self._folder
        return str(self._tell("add", name, options)["node"])

    def remove(self, name: str) -> None:
        """Take a node away at once, with all that runs on it."""
        self._tell("remove", name, {})

    def _tell(self, action: str, name: str, options: Mapping[str, Any]) -> Any:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps([action, name, options]) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, f"the cluster could not {action} {name}: {self._said.read_text()[-2000:]}"
        told = json.loads(line)
        self.address = told["address"]
        return told

    def close(self) -> None:
        """End all nodes."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        shutil.rmtree(self._folder, ignore_errors=True)
