"""Tables for benchmarks: what machine, how often, the median and its spread.

A timing without its machine and load is no evidence, so `print_table` begins with both.
"""

from __future__ import annotations

import os
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Timing:
    """Repeated timings of one thing, in seconds."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Half the interquartile range over the median: how far a typical run is off, as a share."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / 2 / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / 2 / self.median

    def __str__(self) -> str:
        return f"{self.median * 1e3:.1f} ms ± {self.spread:.0%}"


def measure(action: Callable[[], object], repeats: int = 7, warm_up: int = 1) -> Timing:
    """Wall seconds of `repeats` calls, after `warm_up` calls that are thrown away."""
    for _ in range(warm_up):
        action()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        seconds.append(time.perf_counter() - start)
    return Timing(tuple(seconds))


def cpu_of_process(command: Sequence[str], repeats: int = 7, warm_up: int = 1) -> Timing:
    """CPU seconds (user and system) of a subprocess and its children. Raises where it fails."""
    seconds = []
    for attempt in range(warm_up + repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        if attempt >= warm_up:
            seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return Timing(tuple(seconds))


def machine() -> str:
    """One line: processor, usable cores, memory, Python, and how busy the machine is."""
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line for line in information.read_text().splitlines() if line.startswith("model name")]
        model = names[0].partition(": ")[2] if names else model
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return (
        f"{model}, {cores} cores, {memory:.0f} GiB, Python {platform.python_version()}, "
        f"load {os.getloadavg()[0]:.1f} before"
    )


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table below its title and the machine's line; numbers stand right."""
    cells = [[str(cell) for cell in row] for row in rows]
    assert all(len(row) == len(header) for row in cells), "every row needs a cell for each column"
    widths = [max(len(row[column]) for row in [list(header), *cells]) for column in range(len(header))]
    numeric = [all(row[column][:1] in "-0123456789" for row in cells) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        padded = [cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(row, widths, numeric, strict=True)]
        return f"| {' | '.join(padded)} |"

    print(f"\n**{title}** ({machine()})\n")
    print(line(header))
    print(f"|{'|'.join('-' * (w + 1) + (':' if r else '-') for w, r in zip(widths, numeric, strict=True))}|")
    for row in cells:
        print(line(row))
