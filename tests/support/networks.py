"""Another machine's network on this one: a namespace at the end of a cable that a test cuts and mends.

The cable is a port of a bridge that has this side's address. Cut, it drops all packets without a word to either side,
as a switch does that has lost power: no socket is closed, and nobody is told. Programs in the namespace see the files
and processes of this machine, so that a test can watch them while nothing reaches them.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

NO_PROGRAM = "network namespaces: no program `ip` here; install the package `iproute2`"


class Network:
    """A namespace with an address `there`, which reaches `here` and nothing else."""

    def __init__(self) -> None:
        """Raises `OSError` with the kernel's reason where it allows none."""
        me = os.getpid()
        self.name, self._bridge, self._port = f"autoq-{me}", f"aqb{me}", f"aqp{me}"
        # Of 198.18.0.0/15, which is for tests of networks (RFC 2544), each process has four addresses.
        low = 4 * (me % 2**15)
        self.here, self.there = (f"198.{18 + (low >> 16)}.{low >> 8 & 255}.{(low & 255) + host}" for host in (1, 2))
        try:
            ip(f"netns add {self.name}")
            ip(f"link add {self._bridge} type bridge")
            ip(f"link add {self._port} type veth peer name eth0 netns {self.name}")
            ip(f"link set {self._port} master {self._bridge}")
            ip(f"addr add {self.here}/30 dev {self._bridge}")
            ip(f"-n {self.name} addr add {self.there}/30 dev eth0")
            for link in (f"{self._bridge}", f"{self._port}"):
                ip(f"link set {link} up")
            for link in ("lo", "eth0"):
                ip(f"-n {self.name} link set {link} up")
        except OSError:
            self.close()
            raise

    @property
    def inside(self) -> list[str]:
        """What a command line begins with that runs in the namespace."""
        return ["ip", "netns", "exec", self.name]

    def holds(self, pid: int) -> bool:
        """Whether a process runs in the namespace."""
        try:
            mine = Path(f"/proc/{pid}/ns/net").stat().st_ino
        except OSError:
            return False
        return mine == Path(f"/run/netns/{self.name}").stat().st_ino

    def cut(self) -> None:
        """From now on nothing passes."""
        ip(f"link set {self._port} down")

    def mend(self) -> None:
        """All passes again."""
        ip(f"link set {self._port} up")

    def close(self) -> None:
        """Remove all of it. Processes in the namespace keep theirs until they end."""
        for command in (f"link delete {self._bridge}", f"link delete {self._port}", f"netns delete {self.name}"):
            subprocess.run(["ip", *command.split()], capture_output=True, check=False)


def ip(command: str) -> None:
    """A command of iproute2. Raises `OSError` with what it says."""
    done = subprocess.run(["ip", *command.split()], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {command}: {done.stderr.strip()}")


def try_network() -> Network | str:
    """A network, or why there can be none here."""
    if shutil.which("ip") is None:
        return NO_PROGRAM
    try:
        return Network()
    except OSError as problem:
        return f"network namespaces: the kernel lets this process have none: {problem}"


def network_or_skip(found: Network | str) -> Network:
    """What `try_network` gave. Skips the test where there is none, which is a failure in CI if a package would help."""
    if isinstance(found, Network):
        return found
    if found == NO_PROGRAM and os.environ.get("CI") == "true":
        pytest.fail(found)
    pytest.skip(found)
