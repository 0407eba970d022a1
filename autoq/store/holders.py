"""Who holds a lease: a process, named so that others on its machine can tell whether it still lives.

    laptop:4711:4026531836:8824713

are host, process id, the namespace that process ids are counted in, and the moment the process started, on a clock that
nobody sets (ticks since the machine did). Two containers may share a host's name but not a namespace, and a process id
is given again, but not at the same moment.
"""

from __future__ import annotations

import functools
import os
import socket
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil


@functools.cache
def host() -> str:
    """The name of this machine, without colons."""
    return socket.gethostname().replace(":", "-")[:64]


@functools.cache
def _namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").stat().st_ino)
    except OSError:
        return "0"


def _started(process: int) -> str:
    """When a process started. Raises `psutil.NoSuchProcess`."""
    import psutil

    try:
        # psutil makes a date of this, which is another one when the clock was set since.
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return f"{psutil.Process(process).create_time():.2f}"


def holder(process: int | None = None) -> str:
    """The name of a process of this machine, this one unless told otherwise."""
    process = os.getpid() if process is None else process
    return f"{host()}:{process}:{_namespace()}:{_started(process)}"


def shown(name: str) -> str:
    """`HOST:PID`: as much of a holder's name as a person needs."""
    return ":".join(name.split(":")[:2])


def is_here(name: str) -> bool:
    """Whether the holder is, or was, a process of this machine that could be seen from here."""
    parts = name.split(":")
    return len(parts) == 4 and (parts[0], parts[2]) == (host(), _namespace()) and parts[1].isdecimal()


def process_of(name: str) -> psutil.Process | None:
    """The holder's process, where it is one of this machine and alive."""
    if not is_here(name):
        return None
    import psutil

    _, number, _, started = name.split(":")
    try:
        process = psutil.Process(int(number))
        alive = _started(process.pid) == started and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, OverflowError):
        return None
    return process if alive else None


def is_dead(name: str) -> bool:
    """Whether the holder is known to be gone. Of another machine's nothing is known."""
    return is_here(name) and process_of(name) is None
