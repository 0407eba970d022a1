"""Command lines as processes of their own that a test may stop and kill, without the seconds that imports take.

    with Commands() as commands:
        process = commands.start("search", "spec.yaml", cwd=folder, env=environment)

A helper process imports what `autoq` needs for a model, once, and forks for each command line. What comes of it is a
process like one that a shell starts: its own id, signals, folder, environment and pipes, and an interpreter that ends
as always. It heeds interrupts even where the tests themselves were started without them (`nohup`).
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_WIDTH = 12  # of a process id as it is told


class Command:
    """What of `subprocess.Popen` tests use."""

    def __init__(self, arguments: tuple[str, ...], pid: int, pipes: list[int], status: int) -> None:
        self.args, self.pid, self.returncode = arguments, pid, None
        self.stdout, self.stderr = (os.fdopen(pipe, encoding="utf-8") for pipe in pipes)
        self._status = status

    returncode: int | None

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None:
            if not select.select([self._status], [], [], timeout)[0]:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(os.read(self._status, 100))
            os.close(self._status)
        return self.returncode

    def poll(self) -> int | None:
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def send_signal(self, how: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, how)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float) -> tuple[str, str]:
        """What is left to read of both pipes, once the process has ended."""
        until = time.monotonic() + timeout
        said: dict[str, str] = {}

        def read(name: str) -> None:
            said[name] = getattr(self, name).read()

        readers = [threading.Thread(target=read, args=[name], daemon=True) for name in ("stdout", "stderr")]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(max(0.0, until - time.monotonic()))
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout)
        self.wait(max(0.0, until - time.monotonic()))
        for pipe in (self.stdout, self.stderr):
            pipe.close()
        return said["stdout"], said["stderr"]


class Commands:
    """Starts command lines; those that still run at its end are killed."""

    def __init__(self) -> None:
        self._socket, theirs = socket.socketpair()
        self._helper = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())],
            env=os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            pass_fds=[theirs.fileno()],
        )
        theirs.close()

    def start(
        self, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None, file_bytes: int | None = None
    ) -> Command:
        """`autoq ARGUMENTS` in a folder, on one thread; no file that it writes may grow beyond `file_bytes`."""
        own, theirs = zip(*(os.pipe() for _ in range(3)), strict=True)
        order = {"arguments": arguments, "cwd": str(cwd), "env": dict(env or os.environ), "file_bytes": file_bytes}
        socket.send_fds(self._socket, [json.dumps(order).encode()], theirs)
        for end in theirs:
            os.close(end)
        *pipes, status = own
        assert select.select([status], [], [], 120)[0], "the helper does not start a process"
        pid = int(os.read(status, _WIDTH))
        return Command(arguments, pid, pipes, status)

    def __enter__(self) -> Commands:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()
        self._helper.wait(20)


def _serve(orders: socket.socket) -> dict[str, Any]:
    """Fork for each order: in the new process, give it back; in this one, go on until there are no more."""
    running: dict[int, tuple[int, int]] = {}  # a pipe that ends with a process -> its id, where to tell of its end
    while True:
        for ready in select.select([orders, *running], [], [])[0]:
            if ready is not orders:
                pid, status = running.pop(ready)
                code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                os.write(status, str(code).encode())
                os.close(status)
                os.close(ready)
                continue
            message, (stdout, stderr, status), _, _ = socket.recv_fds(orders, 1 << 20, 3)
            lives, ends = os.pipe()
            if pid := os.fork():
                for end in (stdout, stderr, ends):
                    os.close(end)
                os.write(status, f"{pid:{_WIDTH}}".encode())
                running[lives] = pid, status
                continue
            os.dup2(stdout, 1)
            os.dup2(stderr, 2)
            for end in (stdout, stderr, status, lives, *running, *(told for _, told in running.values())):
                os.close(end)
            orders.close()
            order: dict[str, Any] = json.loads(message)
            return order


def main() -> None:
    import transformers

    import autoq.evaluation
    import autoq.search.controller
    import autoq.search.recovering
    import autoq.search.setup
    import autoq.shipping.export
    from autoq.cli import main as command

    assert transformers.LlamaForCausalLM
    autoq.search.setup.warm()
    order = _serve(socket.socket(fileno=int(sys.argv[1])))
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    if (most := order["file_bytes"]) is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["autoq", *order["arguments"]]
    command()


if __name__ == "__main__":
    main()
