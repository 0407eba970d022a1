"""SQLite and PostgreSQL under the same thousand workers: what each takes for a result, side by side.

The study is that of `simulation.py`: real controller, sampler and store, workers in virtual time. Every run has a
process and a database of its own, and the two take turns, so that a machine that others use slows both. PostgreSQL is
a server started for this, with its defaults (a commit waits for the disk), or the one at `--postgresql URL`, of which
the CPU time and the log are then not seen.

    python benchmarks/databases.py [--trials 5000] [--workers 1000] [--rounds 3] [--work 1] [--postgresql URL]

What the load of the machine does not change much are CPU times and the statements: each is a round trip to a server,
one more opens a transaction there.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import sqlalchemy as sa
from _report import print_table
from _simulation import Recording, percentile
from simulation import add_options, simulate, skeleton, spec_of

from autoq.store import NewTrial, Store, TrialRecord

COLUMNS: dict[str, tuple[str, str]] = {  # figure: what it is, how it is written
    "sustained": ("results a second that controller, sampler and store sustain", ".0f"),
    "controller": ("controller, a result, ms by the clock", ".2f"),
    "processor": ("controller, a result, ms of its thread's CPU time", ".2f"),
    "server": ("server, a result, ms of CPU time", ".2f"),
    "statements": ("statements, a result", ".2f"),
    "commits": ("results and new trials, a commit", ".1f"),
    "dispatch": ("ask to dispatch, p95, ms", ".1f"),
    "database": ("database, MB", ".1f"),
    "log": ("write-ahead log, MB", ".1f"),
    "growth": ("controller's memory, growth, MB", ".0f"),
    "peak": ("controller's memory, whole process at most, MB", ".0f"),
}


class Counted:
    """Counts statements and commits of a store, and times each new trial's way from the ask to the disk."""

    def __init__(self, store: Store) -> None:
        self.statements = self.commits = 0
        self.stored: list[float] = []  # seconds that storing took, for every proposal of the sampler in its order
        engine = store._database._engine
        sa.event.listen(engine, "before_cursor_execute", self._statement)
        sa.event.listen(engine, "commit", self._commit)

    def _statement(self, *_: object) -> None:
        self.statements += 1

    def _commit(self, *_: object) -> None:
        self.commits += 1

    def watch(self, clock: Any) -> None:
        """Time `Store.start_trials` from here on."""
        own = Store.start_trials

        def start_trials(store: Store, study_id: int, new: list[NewTrial]) -> list[TrialRecord]:
            begin = clock()
            found = own(store, study_id, new)
            self.stored += [clock() - begin] * sum(trial.origin == "sampler" for trial in new)
            return found

        Store.start_trials = start_trials  # type: ignore[method-assign, assignment]


def run(url: str, options: argparse.Namespace) -> dict[str, float]:
    """One study on the database at `url`: its figures by the names of `COLUMNS`, but for those of the server."""
    recorded = json.loads((Path(__file__).parent / "recorded_demo.json").read_text())
    recording = Recording.from_json(recorded).scaled(options.work)
    with tempfile.TemporaryDirectory() as folder:
        skeleton(Path(folder))
        with Store.open(url) as store:
            counted = Counted(store)
            counted.watch(time.perf_counter)
            told = simulate(store, spec_of(Path(folder), options), recording, options)
    asked = [ask + stored for ask, stored in zip(told.asks, counted.stored, strict=False)]
    return {
        "sustained": told.results / told.searching,
        "controller": 1e3 * told.searching / told.results,
        "processor": 1e3 * told.processor / told.results,
        "statements": counted.statements / told.results,
        "commits": 2 * told.results / counted.commits,
        "dispatch": 1e3 * percentile(asked, 0.95),
        "database": told.database / 1e6,
        "growth": told.growth / 1e6,
        "peak": told.peak / 1e6,
    }


def apart(url: str, options: argparse.Namespace) -> dict[str, float]:
    """`run` in a process of its own."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(run, url, options).result()


class Host:
    """The server: a fresh database for every run, and what it has used until now."""

    def __init__(self, url: str | None) -> None:
        self.server = None if url else _support("postgresql").Server(_support("postgresql").binaries(), durable=True)
        self.engine = sa.create_engine(url or self.server.url(), isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        self.runs = 0

    def fresh(self) -> str:
        """The URL of a new, empty schema."""
        self.runs += 1
        name = f"autoq_benchmark_{os.getpid()}_{self.runs}"
        self._ask(f"CREATE SCHEMA {name}")
        own = self.engine.url.update_query_dict({"options": f"-c search_path={name}"})
        return own.render_as_string(hide_password=False)

    def drop(self) -> None:
        """The last one again."""
        self._ask(f"DROP SCHEMA autoq_benchmark_{os.getpid()}_{self.runs} CASCADE")

    def used(self) -> tuple[float, float]:
        """CPU seconds of its processes, those that have ended too, and bytes of its log."""
        log = float(self._ask("SELECT pg_current_wal_insert_lsn() - '0/0'::pg_lsn"))
        if self.server is None:
            return math.nan, log
        leader = psutil.Process(self.server.pid())
        times = [leader.cpu_times(), *(child.cpu_times() for child in leader.children())]
        return sum(t.user + t.system for t in times) + times[0].children_user + times[0].children_system, log

    def stop(self) -> None:
        """Stop the server, if it is ours."""
        if self.server is not None:
            self.server.stop()

    def _ask(self, statement: str) -> Any:
        with self.engine.connect() as connection:
            found = connection.execute(sa.text(statement))
            return found.scalar() if found.returns_rows else None


def _support(name: str) -> ModuleType:
    """A module of `tests/support`, which is no package."""
    path = Path(__file__).parent.parent / "tests" / "support" / f"{name}.py"
    found = importlib.util.spec_from_file_location(name, path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def compare(host: Host, options: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The figures of every round, by database."""
    found: dict[str, list[dict[str, float]]] = {"SQLite": [], "PostgreSQL": []}
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as folder:
            found["SQLite"].append(apart(f"{folder}/autoq.db", options))
        url = host.fresh()
        before = host.used()
        figures = apart(url, options)
        seconds, log = (b - a for a, b in zip(before, host.used(), strict=True))
        host.drop()
        found["PostgreSQL"].append(figures | {"server": 1e3 * seconds / options.trials, "log": log / 1e6})
        print(f"round {number + 1}: " + ", ".join(f"{n} {runs[-1]['sustained']:.0f}/s" for n, runs in found.items()))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--postgresql", metavar="URL", help="of a database; default: a server started for this")
    parser.set_defaults(trials=5000, work=1.0, crashes=0.0, hangs=0.0)
    options = parser.parse_args()
    host = Host(options.postgresql)
    try:
        found = compare(host, options)
    finally:
        host.stop()
    rows = []
    for name, (what, form) in COLUMNS.items():
        sqlite, postgresql = (
            statistics.median(one[name] for one in runs) if name in runs[0] else math.nan for runs in found.values()
        )
        rows.append((what, *(f"{v:{form}}" if v == v else "" for v in (sqlite, postgresql)),
                     f"{postgresql / sqlite:.2f}" if sqlite == sqlite and sqlite else ""))  # fmt: skip
    title = f"{options.trials} trials, {options.workers} simulated workers, {options.sampler}, {options.rounds} rounds"
    print_table(title, ("what, median", *found, "ratio"), rows)


if __name__ == "__main__":
    main()
