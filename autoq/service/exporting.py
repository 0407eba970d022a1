"""Exports of a server: written by a process of their own, verified, kept for a while.

    AUTOQ_DB=… python -m autoq.service.exporting EXPORT_ID FOLDER

writes the export of that row into `FOLDER/EXPORT_ID` (no word of a client is part of a path), loads it in its runtime
and holds it against what was measured. Latency is not timed: a server does other things at the same time.

`Exporter` is the server's side, driven by the scheduler's thread: one export at a time, again where its process died,
and old ones removed. An export that is `finished` has in its `result` the `manifest`, `verify` (the report, or why none
could be made here), `name` and `bytes` of its folder, and `lines` to paste: `{"title", "text"}`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from autoq.errors import AutoQError
from autoq.service.processes import cause, tail
from autoq.store import ExportRecord, Store, holders

PROCESS = (sys.executable, "-m", "autoq.service.exporting")
MAX_ATTEMPTS = 2
LIMIT_SECONDS = 3600.0
KEPT = 32
KEPT_DAYS = 7.0
_CLEAN_SECONDS = 60.0


def name_of(export: ExportRecord) -> str:
    """What the folder is called by somebody who gets the export, and in the lines to paste."""
    return f"{export.study}-{export.trial}-{export.target}"


class Exporter:
    """Has exports written, one at a time. `folder` holds those that are there, each under its number."""

    def __init__(
        self,
        store: Store,
        folder: Path,
        environment: Mapping[str, str],
        *,
        limit_seconds: float = LIMIT_SECONDS,
        kept: int = KEPT,
        kept_days: float = KEPT_DAYS,
        command: Sequence[str] = PROCESS,
    ) -> None:
        self.folder = folder
        self._store, self._environment, self._command = store, dict(environment), tuple(command)
        self._limit_seconds, self._kept, self._kept_days = limit_seconds, kept, timedelta(days=kept_days)
        self._process: subprocess.Popen[bytes] | None = None
        self._export_id = 0
        self._since = 0.0
        self._cleaned = -_CLEAN_SECONDS

    def path(self, export_id: int) -> Path | None:
        """The folder of a finished export, None where it is not (any more) there. Raises `NotFound`."""
        export = self._store.queue.export(export_id)
        path = self.folder / str(export.id)
        return path if export.state == "finished" and path.is_dir() else None

    def look(self) -> None:
        """Take note of what ended, begin what waits, remove what is old."""
        self._reap()
        running = self._store.queue.exports(states=("running",))
        for export in running:
            holder = str((export.progress or {}).get("holder", ""))
            mine = self._process is not None and export.id == self._export_id
            if not mine and holders.is_dead(holder):
                self._died(export, "its process ended without a word")
        if self._process is None and not self._store.queue.exports(states=("running",)):
            waiting = self._store.queue.exports(states=("queued",))
            if waiting:
                self._start(waiting[0])
        if time.monotonic() - self._cleaned > _CLEAN_SECONDS:
            self._cleaned = time.monotonic()
            self.clean()

    def stop(self) -> None:
        """End what is being written; it waits again."""
        if self._process is None:
            return
        self._process.kill()
        self._process.wait()
        self._process = None
        with contextlib.suppress(AutoQError):
            progress = dict(self._store.queue.export(self._export_id).progress or {})
            attempt = max(0, int(progress.get("attempt", 0)) - 1)  # it did not fail by itself
            self._store.queue.set_export(self._export_id, "queued", ("running",), None, {"attempt": attempt})

    def clean(self) -> None:
        """Remove exports that are too old or too many, and folders that belong to none."""
        # In this order: one that is finished meanwhile is among the second.
        kept: set[str] = {str(e.id) for e in self._store.queue.exports(states=("queued", "running"))}
        finished = sorted(self._store.queue.exports(states=("finished",)), key=lambda e: e.id, reverse=True)
        oldest = datetime.now(UTC) - self._kept_days
        for place, export in enumerate(finished):
            if place < self._kept and (export.finished_at or export.created_at) >= oldest:
                kept.add(str(export.id))
            elif self._store.queue.set_export(export.id, "removed", ("finished",), "removed to make room"):
                shutil.rmtree(self.folder / str(export.id), ignore_errors=True)
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path.stem.isdecimal() and path.is_dir() and path.stem not in kept:
                shutil.rmtree(path, ignore_errors=True)

    def _start(self, export: ExportRecord) -> None:
        with self._log(export.id).open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                [*self._command, str(export.id), str(self.folder)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )
        self._export_id, self._since = export.id, time.monotonic()

    def _reap(self) -> None:
        process = self._process
        if process is None:
            return
        if (code := process.poll()) is None:
            if time.monotonic() - self._since > self._limit_seconds:
                process.kill()
                process.wait()
                self._process = None
                said = f"it took longer than {self._limit_seconds:g} s"
                self._store.queue.set_export(self._export_id, "failed", ("queued", "running"), said)
            return
        self._process = None
        export = self._store.queue.export(self._export_id)
        if export.state in ("queued", "running"):
            self._died(export, cause(code))
        self._log(export.id).unlink(missing_ok=True)

    def _died(self, export: ExportRecord, why: str) -> None:
        """Once more, unless it died before."""
        progress = dict(export.progress or {})
        progress["attempt"] = attempt = int(progress.get("attempt", 0)) + (export.state == "queued")
        progress.pop("holder", None)
        words = tail(self._log(export.id)).strip().splitlines()
        said = f"{why}: {words[-1][:300]}" if words else why
        state: Any = "failed" if attempt >= MAX_ATTEMPTS else "queued"
        self._store.queue.set_export(export.id, state, (export.state,), said, progress)

    def _log(self, export_id: int) -> Path:
        return self.folder / f"export-{export_id}.log"


def write(store: Store, export_id: int, folder: Path) -> bool:
    """Write and verify one export; whether it succeeded. Whatever goes wrong is one line of its row."""
    export = store.queue.export(export_id)
    told = {"holder": holders.holder(), "attempt": int((export.progress or {}).get("attempt", 0)) + 1}

    def note(stage: str) -> None:
        progress = {**told, "stage": stage, "since": datetime.now(UTC).isoformat(timespec="seconds")}
        store.queue.set_export(export_id, "running", ("running",), None, progress)

    if not store.queue.set_export(export_id, "running", ("queued",), None, told):
        return False
    work, there = folder / f"{export_id}.work", folder / str(export_id)
    try:
        for left in (work, there):
            shutil.rmtree(left, ignore_errors=True)
        work.mkdir(parents=True)
        result = _written(store, export, work / name_of(export), note)
        (work / name_of(export)).rename(there)
    except (AutoQError, OSError) as problem:
        said = " ".join(str(problem).split())
    except Exception as bug:
        sys.stderr.write(traceback.format_exc())
        said = f"internal error: {type(bug).__name__}: {next(iter(str(bug).splitlines()), '')}"
    else:
        return store.queue.set_export(export_id, "finished", ("running",), None, {"stage": "finished"}, result)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    store.queue.set_export(export_id, "failed", ("running",), said)
    return False


def _written(store: Store, record: ExportRecord, out: Path, note: Any) -> dict[str, Any]:
    from autoq.shipping.export import export

    study = store.study(record.study_id)
    manifest = export(store, study, store.trial(study.id, record.trial), out, record.target, note)
    return {
        "manifest": manifest.model_dump(mode="json"),
        "verify": _verified(store, out, note),
        "name": out.name,
        "bytes": sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        "lines": [
            {"title": "run it", "text": manifest.run},
            {"title": "hold it against what was measured", "text": f"autoq verify {out.name}"},
        ],
    }


def _verified(store: Store, out: Path, note: Any) -> dict[str, Any]:
    """The report of a verification, without this server's paths; where none can be made, why."""
    from autoq.shipping.verify import REPORT_TOKENS, verify

    note("verify")
    try:
        report = verify(out, REPORT_TOKENS, latency=False, fetch=store.trained_layers)
    except AutoQError as problem:
        return {"ok": None, "message": str(problem), "checks": []}
    return {"ok": report.ok, "message": None, "checks": [check.to_json() for check in report.checks]}


def main(arguments: list[str]) -> int:
    """Write the export of that number into that folder; the exit code."""
    faulthandler.enable()
    with Store.open(os.environ["AUTOQ_DB"], create=False) as store:
        return 0 if write(store, int(arguments[0]), Path(arguments[1])) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
