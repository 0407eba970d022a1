"""What this machine has and lacks: packages, processor, targets, folders, database.

Every finding is a line; nothing here fails because something is absent, and nothing is created.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from autoq import device, plugins
from autoq.cache import cache_dir
from autoq.energy import meters
from autoq.errors import AutoQError, NotFound

CORE = ("torch", "transformers", "optuna", "sqlalchemy", "alembic", "pydantic", "numpy", "safetensors", "typer", "rich")
OPTIONAL = {
    "ray": "several workers: pip install 'autoq[ray]'",
    "gguf": "GGUF models: pip install 'autoq[gguf]'",
    "xllamacpp": "llama.cpp: pip install 'autoq[llama-cpp]'",
    "libgguf": "GGUF types: pip install 'autoq[llama-cpp]'",
    "compressed-tensors": "vLLM checkpoints: pip install 'autoq[vllm]'",
    "onnxruntime": "ONNX Runtime: pip install 'autoq[onnx]'",
    "datasets": "data from the hub: pip install 'autoq[datasets]'",
    "psycopg": "PostgreSQL: pip install 'autoq[postgresql]'",
    "pandas": "frames in notebooks: pip install 'autoq[notebook]'",
    "plotly": "figures in notebooks: pip install 'autoq[notebook]'",
}
LOW_DISK_BYTES = 5 * 10**9


@dataclass(frozen=True)
class Finding:
    """One line: `ok` is True, False for what keeps AutoQ from working, None for what is merely absent."""

    section: str
    name: str
    value: str
    ok: bool | None = True


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _packages() -> Iterator[Finding]:
    yield Finding("core", "autoq", _version("autoq") or "not installed as a package")
    yield Finding("core", "python", platform.python_version(), sys.version_info >= (3, 11))
    for package in CORE:
        version = _version(package)
        yield Finding("core", package, version or f"missing: pip install {package}", version is not None)
    for package, use in OPTIONAL.items():
        version = _version(package)
        yield Finding("optional", package, version or f"not installed; {use}", True if version else None)


def _machine() -> Iterator[Finding]:
    yield Finding("machine", "cpu", device.cpu_model())
    sets = " ".join(device.instruction_sets())
    yield Finding("machine", "instruction sets", sets or "unknown", True if sets else None)
    yield Finding("machine", "cores", f"{device.cores()} of {os.cpu_count()} for this process")
    threads = os.environ.get("OMP_NUM_THREADS")
    yield Finding("machine", "threads", f"OMP_NUM_THREADS={threads}" if threads else "one per core")
    try:
        import psutil
    except ModuleNotFoundError:
        return
    memory = psutil.virtual_memory()
    yield Finding("machine", "memory", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free")


def _meters() -> Iterator[Finding]:
    for probe in meters.probes():
        yield Finding("energy", probe.name, probe.problem or "readable", None if probe.problem else True)
        if probe.meter is not None:
            probe.meter.close()


def _targets() -> Iterator[Finding]:
    from autoq.targets import Target

    for name in plugins.names("targets"):
        shown = name.replace("_", "-")
        try:
            missing = plugins.load("targets", name, Target).unavailable()
        except (AutoQError, ImportError) as problem:
            missing = str(problem)
        yield Finding("targets", shown, missing or "ready", None if missing else True)


def _folders(db: str) -> Iterator[Finding]:
    folder = cache_dir()
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(existing).free
    writable = existing.is_dir() and os.access(existing, os.W_OK)
    value = f"{folder} ({free / 1e9:.1f} GB free{'' if writable else ', not writable: set AUTOQ_CACHE'})"
    yield Finding("folders", "cache", value, writable and (True if free > LOW_DISK_BYTES else None))
    yield Finding("folders", "current", str(Path.cwd()), os.access(Path.cwd(), os.W_OK))
    yield _database(db)


def _database(db: str) -> Finding:
    from autoq.store import Store
    from autoq.store.copying import copy

    try:
        with Store.open(db, create=False) as store:
            read = copy(store, None)  # to nowhere: everything is read and held against its checksums
            return Finding("database", store.url, f"whole; studies: {len(read.studies)}, trials: {read.trials}")
    except NotFound:
        return Finding("database", db, "not there yet; the first search makes it", None)
    except (AutoQError, ImportError) as problem:
        return Finding("database", "database", str(problem), False)


def examine(db: str) -> list[Finding]:
    """Everything, in the order of the printed page. `db` is a path or a SQLAlchemy URL."""
    findings = [*_packages(), *_machine(), *_meters()]
    try:
        findings += _targets()
    except ImportError as problem:
        findings.append(Finding("targets", "targets", str(problem), False))
    return [*findings, *_folders(db)]
