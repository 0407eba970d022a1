"""What this machine is, in one line that stands beside every number measured on it. No torch.

Facts come from `/proc/cpuinfo` where there is one. Elsewhere the model is what `platform` knows and
the instruction sets stay unknown, which is said and never guessed.
"""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

_CPUINFO = Path("/proc/cpuinfo")
# The sets that decide which matrix kernels run, strongest last. Arm names them otherwise.
_MATRIX_SETS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)


def _first_processor(text: str) -> dict[str, str]:
    """Field -> value of the first processor in the text of `/proc/cpuinfo`."""
    lines = text.partition("\n\n")[0].splitlines()
    pairs = (line.partition(":") for line in lines)
    return {name.strip(): value.strip() for name, _, value in pairs}


@functools.cache
def _processor() -> Mapping[str, str]:
    try:
        return _first_processor(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return {}


def cpu_model() -> str:
    """The processor's name, with family and model number where the name alone does not tell it apart."""
    fields = _processor()
    name = fields.get("model name") or platform.processor() or platform.machine() or "unknown CPU"
    if "cpu family" in fields and "model" in fields:
        return f"{name} (family {fields['cpu family']} model {fields['model']})"
    return name


def instruction_sets() -> tuple[str, ...]:
    """Those instruction sets of the processor that matrix kernels use; empty where unknown."""
    fields = _processor()
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return tuple(name for name in _MATRIX_SETS if name in flags)


def cores() -> int:
    """Processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def threads() -> int:
    """Threads that computation gets where nobody says how many: the physical cores that this process may
    run on, and at most `OMP_NUM_THREADS`. Two threads of one core share its matrix units."""
    physical = psutil.cpu_count(logical=False) or cores()
    asked = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0]
    limits = [cores(), physical, int(asked) if asked.isdecimal() else cores()]
    return max(1, min(limits))


def fingerprint() -> str:
    """One line: architecture, processor, cores and instruction sets."""
    sets = " ".join(instruction_sets()) or "instruction sets unknown"
    plural = "" if cores() == 1 else "s"
    return f"{platform.machine()} {cpu_model()}, {cores()} core{plural}, {sets}"


def facts() -> dict[str, Any]:
    """The same as plain data, for `doctor` and for provenance."""
    return {
        "machine": platform.machine(),
        "cpu": cpu_model(),
        "cores": cores(),
        "instruction_sets": list(instruction_sets()),
        "system": platform.system(),
        "python": platform.python_version(),
    }
