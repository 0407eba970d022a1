"""What tells machines apart."""

from __future__ import annotations

import os
import socket
from pathlib import Path


def machine() -> str:
    """What tells this machine, or container, from others: its name, the run of its kernel, and what files it sees.

    Containers with the host's network have its name too, and its kernel; AUTOQ_NODE tells nodes apart that have
    everything in common but their caches.
    """
    boot, files = Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/mnt")
    told = [
        socket.gethostname(),
        boot.read_text().strip() if boot.is_file() else "",
        str(files.readlink()) if files.is_symlink() else "",
        os.environ.get("AUTOQ_NODE", ""),
    ]
    return " ".join(told)
