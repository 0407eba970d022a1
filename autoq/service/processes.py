"""What is known of a process that ended: why, and its last words."""

from __future__ import annotations

import os
import signal
from pathlib import Path

TAIL_CHARACTERS = 16384
_SIGNALS = {
    signal.SIGKILL: "killed from outside, or for want of memory",
    signal.SIGSEGV: "a fault in native code",
    signal.SIGBUS: "a fault in native code",
    signal.SIGILL: "an instruction that this processor does not have",
    signal.SIGABRT: "native code gave up",
}


def cause(code: int) -> str:
    """Why a process of ours ended with this code, as `Popen` gives it."""
    if code >= 0:
        return f"its process ended with code {code}; its log says why"
    number = signal.Signals(-code)
    return f"its process ended by {number.name} ({_SIGNALS.get(number, 'told to from outside')})"


def tail(path: Path) -> str:
    """The end of a log, empty where there is none."""
    try:
        with path.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - TAIL_CHARACTERS))
            return file.read().decode("utf-8", "replace").replace("\0", "")
    except OSError:
        return ""
