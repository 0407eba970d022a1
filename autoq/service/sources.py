"""What a user's spec may make this server read: its folders and the network are not everybody's.

A model, a text, a task, a device description and a recipe are named by path or by hub id, and the server would read
whatever its own account can. On an open server on loopback, and for admins, that is as on the command line. Everybody
else names demo models and the shipped text and devices, what lies below the folders that the server was started with,
and, with `--allow-hub`, what is on the hub. Of a folder, all that it holds must lie below them, where its links lead
too. A task's YAML file is a program and is an admin's to name. A refusal says the same whether the file is there or
not.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from autoq.errors import SpecError
from autoq.service.auth import Asker
from autoq.service.settings import Sources
from autoq.spec import BankSpec, StudySpec, WorkersSpec, split_objective
from autoq.spec_errors import short

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_DEVICE = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
_TASK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,99}")
_PROGRAMS = (".yaml", ".yml")
_MOST_FILES = 20_000  # of a folder that is looked through for links


def check_sources(spec: StudySpec, asker: Asker, sources: Sources) -> None:
    """Raise `SpecError`, which names the field, for what this one may not have read."""
    if asker.role == "admin":
        return
    for field, message in _refusals(spec, sources):
        raise SpecError(f"{field}: {message}")


def _refusals(spec: StudySpec, sources: Sources) -> Iterator[tuple[str, str]]:
    hub = ", a name on the hub" if sources.hub else ""
    if not spec.model.id.startswith("demo:") and not _allowed(spec.model.id, sources.models, sources.hub):
        yield "model.id", f"must be a demo model{hub}{_below(sources.models, '--models')} (got {short(spec.model.id)})"
    texts = [("data.source", spec.data.source)] if spec.data.source != "python-docs" else []
    texts += [(f"tasks.{name}.source", task.source) for name, task in spec.tasks.items()]
    for field, source in texts:
        if not _allowed(source, sources.data, sources.hub):
            shipped = "python-docs" if field == "data.source" else "something"
            yield field, f"must be {shipped}{hub}{_below(sources.data, '--data')} (got {short(source)})"
            continue
        if source.lower().endswith(_PROGRAMS):
            yield field, f"is a task's program; only an admin may name some (got {short(source)})"
    for objective in (*spec.measured, *spec.reported):
        task = split_objective(objective)[1]
        if task is not None and task not in spec.tasks and not (sources.hub and _TASK.fullmatch(task)):
            known = f" ({', '.join(spec.tasks)})" if spec.tasks else ""
            yield "objectives", f"{objective[:120]}: must name a task of the study{known}{hub}"
    device = spec.target.device
    if device is not None and (not _DEVICE.fullmatch(device) or _exists(device)):
        yield "target.device", f"must be a device description that ships with AutoQ (got {short(device)})"
    if spec.recipes:
        yield "recipes", f"are files of this server; only an admin may name some (got {short(spec.recipes[0])})"
    if spec.bank.disk > BankSpec().disk or spec.bank.memory is not None:
        yield "bank", "only an admin may say how much this server keeps of quantized layers"
    yield from _workers(spec.workers, sources)


def _workers(workers: WorkersSpec, sources: Sources) -> Iterator[tuple[str, str]]:
    most, where = sources.ray_workers, "this server"
    if workers.address is not None:
        if workers.address != sources.cluster:
            own = "" if sources.cluster is None else f", but for {sources.cluster}"
            yield "workers.address", f"only an admin may name a cluster{own} (got {short(workers.address)})"
        most, where = sources.cluster_workers, "this cluster"
    if workers.executor == "ray" and not most:
        own = "" if sources.cluster is None else f", or ray with address {sources.cluster}"
        yield "workers.executor", f"must be local on this server{own} (got 'ray')"
    elif workers.count > max(most, 1):
        yield "workers.count", f"must be at most {most} on {where} (got {workers.count})"


def _below(roots: Sequence[Path], option: str) -> str:
    return f", or a path below a folder that this server has for it ({option})" if roots else ""


def _allowed(name: str, roots: Sequence[Path], hub: bool) -> bool:
    if _inside(name, roots):
        return True
    return hub and bool(_HUB_ID.fullmatch(name)) and ".." not in name and not _exists(name)


def _inside(name: str, roots: Sequence[Path]) -> bool:
    """Whether it is the absolute path of something below a root, links followed, and all that it holds is so too."""
    if not name.startswith("/") or "\0" in name:
        return False
    try:
        own = [root.resolve() for root in roots]
        place = Path(name).resolve(strict=True)
        if not _below_any(place, own):
            return False
        return not place.is_dir() or all(_below_any(target.resolve(), own) for target in _links(place))
    except (OSError, RuntimeError, LookupError):
        return False


def _below_any(real: Path, roots: Sequence[Path]) -> bool:
    return any(real.is_relative_to(root) for root in roots)


def _links(folder: Path) -> Iterator[Path]:
    """Every link in a folder. Raises `LookupError` for one of more files than anybody's model or text has."""
    seen = 0
    for at, folders, files in os.walk(folder):
        seen += len(folders) + len(files)
        if seen > _MOST_FILES:
            raise LookupError
        yield from (path for name in (*folders, *files) if (path := Path(at, name)).is_symlink())


def _exists(name: str) -> bool:
    try:
        return Path(name).expanduser().exists()
    except (OSError, ValueError, RuntimeError):
        return True
