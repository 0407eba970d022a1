"""How much memory a job may take: what is beyond it is refused, where it is asked for.

The kernel counts a process's private writable pages against RLIMIT_DATA (Linux 4.7 and later; getrlimit(2)). While a
job runs that limit is what the process had when the job began, and the allowance. So numpy and torch raise in the
candidate that asks for too much, with a traceback; worker, model and neighbours go on. Nothing has to be killed, and
the node never comes to where its kernel chooses whom to kill. Weights that are mapped from files are not counted, and
neither is the memory of a GPU, which raises by itself.

It counts what is asked for, not what is touched. Native code that does not check its allocations dies of a refusal
instead of raising it; then the worker is lost, and the candidate is treated as one that crashes its worker.
"""

from __future__ import annotations

import contextlib
import errno
import re
import sys
from collections.abc import Iterator
from pathlib import Path

_STATUS = Path("/proc/self/status")
# torch's allocators raise RuntimeError, and a C++ library under it may.
_REFUSED = re.compile(r"can't allocate memory|not enough memory|cannot allocate memory|bad_alloc", re.IGNORECASE)


def _allocated() -> int | None:
    """The bytes that count against RLIMIT_DATA now; None on other systems than Linux."""
    if not sys.platform.startswith("linux"):
        return None
    found = re.search(r"^VmData:\s+(\d+) kB$", _STATUS.read_text(encoding="ascii"), re.MULTILINE)
    return int(found[1]) * 1024 if found else None


@contextlib.contextmanager
def allowance(limit: int | None) -> Iterator[None]:
    """Let this process allocate so many bytes (None: any number) more than it has now, in the body.

    The limit is the process's, so what other threads allocate meanwhile counts too. Without effect where
    the system has no such limit.
    """
    allocated = None if limit is None else _allocated()
    if limit is None or allocated is None:
        yield
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = [allocated + limit, *(bound for bound in (soft, hard) if bound != resource.RLIM_INFINITY)]
    resource.setrlimit(resource.RLIMIT_DATA, (min(wanted), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def is_shortage(problem: BaseException) -> bool:
    """Whether an exception says that memory was refused."""
    if isinstance(problem, OSError):
        return problem.errno == errno.ENOMEM
    return isinstance(problem, MemoryError) or (
        isinstance(problem, RuntimeError) and _REFUSED.search(str(problem)) is not None
    )
