"""A Ray session: started here, joined at an address, or one that this process already has.

Ray's servers listen on every interface of the machine, so a session that is started here has a random
token without which nobody gets in (https://docs.ray.io/en/latest/ray-security/token-auth.html), and a
cluster on another machine is joined only with token authentication. The token of a local session
lives in the environment of its processes and is never written to a file. RAY_AUTH_MODE=disabled, set by
the user, is respected for local sessions.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray._private.services as ray_services
import ray._private.worker as ray_worker

from autoq import device
from autoq.errors import AutoQError, SpecError
from autoq.spec import WorkersSpec
from autoq.spec_units import parse_address

LOG = logging.getLogger("autoq.workers")
NAMESPACE = "autoq"
# Jobs and results are a few kilobytes; weights come from files, which the page cache shares.
OBJECT_STORE_BYTES = 100 * 2**20
CONNECT_SECONDS = 10.0
# Ray ends a whole process, without a word to it, whose cluster's head has been silent for a minute.
SILENT_SECONDS, LOOK_SECONDS = 20.0, 2.0
# What Ray or this module sets in the environment, to be as before when the session is closed.
VARIABLES = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_USAGE_STATS_ENABLED", "PYTHONBREAKPOINT")
# Ray adds up to 65 characters for its sockets, whose paths the kernel limits to 107.
MAX_FOLDER_CHARACTERS = 42


@functools.cache
def _token() -> str:
    """The token of the sessions that this process starts; one, because Ray reads it only once."""
    return secrets.token_hex(32)


def _token_file() -> Path:
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or Path.home() / ".ray" / "auth_token")


def _has_token() -> bool:
    """Whether Ray finds a token that nobody else knows. Ray itself writes files that all may read."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return True
    path = _token_file()
    return path.is_file() and not path.stat().st_mode & 0o077


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def find_address(address: str) -> str:
    """The address that `auto` stands for: RAY_ADDRESS, or the cluster that `ray start` last joined this machine to.

    Any other address is itself. Raises `AutoQError` where there is none.
    """
    if address != "auto":
        return address
    try:
        found = ray_services.canonicalize_bootstrap_address("auto")
    except ConnectionError:
        found = None
    if not found:
        raise AutoQError("workers.address: 'auto' found no Ray cluster on this machine; start one: ray start --head")
    return str(found)


def check_address(address: str) -> tuple[str, int]:
    """Host and port of a running cluster's address, `HOST:PORT` or `ray://HOST:PORT`, that it is safe to join.

    Raises `SpecError` for another form, and for a host that is not loopback unless RAY_AUTH_MODE is
    `token` and there is a token in RAY_AUTH_TOKEN, or in a file that nobody else can read.
    """
    try:
        host, port = parse_address(address)
    except ValueError as problem:
        raise SpecError(f"workers.address: {problem} (got {address!r})") from None
    if not _is_loopback(host):
        _require_token(address)
    return host, port


def _require_token(address: str) -> None:
    where = f"workers.address: {address!r} is reached over the network"
    if os.environ.get("RAY_AUTH_MODE", "").lower() != "token":
        raise SpecError(f"{where}; set RAY_AUTH_MODE=token on the cluster and here")
    if os.environ.get("RAY_AUTH_TOKEN"):
        return
    path = _token_file()
    if not path.is_file() or not path.read_text(encoding="utf-8").strip():
        raise SpecError(f"{where} and there is no token; put the cluster's into RAY_AUTH_TOKEN or {str(path)!r}")
    if path.stat().st_mode & 0o077:
        raise SpecError(f"{where} and others can read its token; run: chmod 600 {path}")


@dataclass
class _Peer:
    """A process of the cluster that a session cannot do without, and since when it has not answered.

    One on its `own` machine whose port is closed is gone for ever.
    """

    what: str
    address: tuple[str, int]
    own: bool = False
    silent_since: float | None = None

    def look(self) -> OSError | None:
        """Why it does not answer now, None where it does."""
        try:
            socket.create_connection(self.address, timeout=LOOK_SECONDS).close()
        except OSError as problem:
            return problem
        return None

    def check(self, now: float) -> None:
        """Raises `AutoQError` once it has not answered for `SILENT_SECONDS`, or is gone."""
        if (problem := self.look()) is None:
            self.silent_since = None
            return
        self.silent_since = self.silent_since or now
        silent = now - self.silent_since
        gone = self.own and isinstance(problem, ConnectionRefusedError)
        if gone or silent > SILENT_SECONDS:
            host, port = self.address
            raise AutoQError(
                f"the {self.what} at {host}:{port} has not answered for {silent:.0f} s ({problem}); "
                "what is stored is safe, go on with `autoq resume` when the cluster is back"
            )


def _peers(head: tuple[str, int]) -> list[_Peer]:
    """The cluster's head, and the raylet of this process's own node, without which Ray starts nothing for it and says
    nothing to it. A client (`ray://`) has none of its own."""
    peers = [_Peer("head of the Ray cluster", head)]
    if (node := ray_worker._global_node) is not None:
        peers.append(_Peer("Ray node of this process", (node.node_ip_address, node.node_manager_port), own=True))
    return peers


def _log_line(data: dict[str, Any], **_: object) -> None:
    """Take what Ray would print to stdout, where the command line prints its documents."""
    for line in data["lines"]:
        LOG.info("%s: %s", data.get("pid", "ray"), line)


def _room(node: Mapping[str, float], cpus: int, workers: WorkersSpec) -> int:
    """How many workers would fit on an empty node of these resources."""
    wanted = {"CPU": float(cpus), "GPU": workers.gpus, "memory": float(workers.memory or 0)}
    return min(int(node.get(name, 0) / amount + 1e-9) for name, amount in wanted.items() if amount)


def _shown(node: Mapping[str, float], memory: bool) -> str:
    shown = f"{node.get('CPU', 0):g} CPUs and {node.get('GPU', 0):g} GPUs"
    return f"{shown} and {node.get('memory', 0) / 1e9:.3g} GB" if memory else shown


class Session:
    """A connection to Ray, opened by the constructor; `close` undoes what it did.

    A session that is already on in this process is used and left on. `cpus` is what each worker gets:
    `workers.cpus`, or an equal share of all there is; on one machine, of as many as the study would use
    without Ray. `folder` is the session's temporary folder, or None where the session was not started here.

    A cluster at an address may grow and shrink: it need not have room for all workers now, only for one.

    Raises `SpecError` for an address that is refused or a session without room for the workers, and
    `AutoQError` where Ray cannot be started or reached.
    """

    def __init__(self, workers: WorkersSpec) -> None:
        self.folder: Path | None = None
        self._mine = False
        self._environment: dict[str, str | None] = {}
        self._printer: Any = None
        self._peers: list[_Peer] = []
        self._looked = time.monotonic()
        address = None if workers.address is None else find_address(workers.address)
        where = None if address is None else check_address(address)
        try:
            self._open(workers, address, where)
            self._peers = _peers(where or parse_address(str(ray.get_runtime_context().gcs_address)))
            self.cpus = self._share(workers)
        except BaseException:
            self.close()
            raise

    @property
    def logs(self) -> Path | None:
        """The folder of the output of the workers on this machine; None for one that is not of the cluster."""
        node = ray_worker._global_node
        return None if node is None else Path(node.get_logs_dir_path())

    def check(self) -> None:
        """Raises `AutoQError` once the cluster's head has not answered for `SILENT_SECONDS`, or this process's own node
        is gone. Looks now and then."""
        now = time.monotonic()
        if now - self._looked < LOOK_SECONDS:
            return
        self._looked = now
        for peer in self._peers:
            peer.check(now)

    def check_own(self) -> None:
        """Raises `AutoQError` if this process's own node is gone. Ray ends a process, without a word, that reads or
        writes an object there then."""
        for peer in self._peers:
            if peer.own:
                peer.check(time.monotonic())

    def answers(self) -> bool:
        """Whether the cluster's head and this process's own node answer now. Where they do not, Ray ends workers that
        did nothing wrong."""
        return all(peer.look() is None for peer in self._peers)

    def _open(self, workers: WorkersSpec, address: str | None, where: tuple[str, int] | None) -> None:
        if ray.is_initialized():
            here = ray.get_runtime_context().gcs_address
            if address not in (None, here):
                raise SpecError(f"workers.address: this process is connected to {here!r} already, not {address!r}")
            return
        self._environment = {name: os.environ.get(name) for name in VARIABLES}
        if where is None:
            options = self._local(workers)
        else:
            options = {"address": address}
            try:  # Ray itself would try for half a minute
                socket.create_connection(where, timeout=CONNECT_SECONDS).close()
            except OSError as problem:
                raise AutoQError(f"workers.address: nothing answers at {address!r}: {problem}") from None
        handler = signal.getsignal(signal.SIGTERM)
        self._mine = True
        try:
            ray.init(namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR, **options)
        except Exception as problem:
            first = next(iter(str(problem).splitlines()), type(problem).__name__)
            raise AutoQError(f"Ray cannot be {'joined' if workers.address else 'started'}: {first}") from problem
        finally:
            # Ray makes SIGTERM raise SystemExit, which is right unless the program has its own way.
            if callable(handler) and threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)
        self._printer = ray_worker.print_to_stdstream
        ray_worker.print_to_stdstream = _log_line

    def _local(self, workers: WorkersSpec) -> dict[str, Any]:
        """Options of a session of our own, and its folder and environment."""
        if not _has_token():
            os.environ["RAY_AUTH_TOKEN"] = _token()
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        long = len(tempfile.gettempdir()) + len("/autoq-ray-12345678") > MAX_FOLDER_CHARACTERS
        parent = "/tmp" if long else None  # noqa: S108 - mkdtemp makes a folder of our own in it
        self.folder = Path(tempfile.mkdtemp(prefix="autoq-ray-", dir=parent))
        return {
            "address": "local",
            "num_cpus": max(device.cores(), workers.count * (workers.cpus or 1)),
            "num_gpus": None if workers.gpus else 0,
            "include_dashboard": False,
            "object_store_memory": OBJECT_STORE_BYTES,
            "_temp_dir": str(self.folder),
        }

    def _share(self, workers: WorkersSpec) -> int:
        """CPUs of each worker, when all of them fit on the session's nodes."""
        alive = [node for node in ray.nodes() if node["Alive"]]
        nodes = [node["Resources"] for node in alive]
        total = int(sum(node.get("CPU", 0) for node in nodes))
        if [node["NodeManagerHostname"] for node in alive] == [socket.gethostname()]:
            total = min(total, device.threads())
        cpus = workers.cpus or max(1, total // workers.count)

        if sum(_room(node, cpus, workers) for node in nodes) < (workers.count if workers.address is None else 1):
            many = f"{workers.count} workers" if workers.address is None else "1 worker"
            wanted = f"{cpus} CPUs and {workers.gpus:g} GPUs"
            if workers.memory is not None:
                wanted += f" and {workers.memory / 1e9:.3g} GB of memory"
            has = " + ".join(sorted(_shown(node, workers.memory is not None) for node in nodes))
            fit = "do not fit" if workers.address is None else "fits on no node"
            raise SpecError(f"workers: {many} of {wanted} {fit}; Ray has {has or 'no nodes'}")
        return cpus

    def close(self) -> None:
        """Leave Ray; end it and remove its files if it was started here. Can be called again."""
        if self._mine:
            ray.shutdown(wait_for_processes=True)
            self._mine = False
        if self._printer is not None:
            ray_worker.print_to_stdstream = self._printer
            self._printer = None
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self.folder = None
        for name, value in self._environment.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._environment.clear()
