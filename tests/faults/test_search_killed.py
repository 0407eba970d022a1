"""A real study on a real model, killed again and again: nothing is lost and nothing comes out otherwise."""

from __future__ import annotations

import functools
import os
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SPEC = """
name: tiny
model: {{id: {model}}}
data: {{calibration_tokens: 128, search_tokens: 128, report_tokens: 128, window_tokens: 64}}
target: {{name: generic}}
space: {{methods: [rtn], bits: [2, 3, 4, 8], group_size: [32]}}
objectives: [kl_nats_per_token, size_bytes]
budget: {{trials: 30}}
"""
# The study's state by what it has stored: from its first row, over tables and trials, to the report.
PROGRESS = (
    "select (select count(*) from studies) + (select count(*) from tables)"
    " + (select count(*) from trials) + (select count(*) from measurements)"
)


def rows(database: Path, query: str) -> list[Any]:
    """What a query finds, nothing while the database is not there or has no tables."""
    try:
        connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True, timeout=10)
        try:
            return connection.execute(query).fetchall()
        finally:
            connection.close()
    except sqlite3.OperationalError:
        return []


def outcome(database: Path) -> tuple[list[Any], list[Any], list[Any]]:
    """Proposals, measurements and states: all of a study that does not depend on the clock."""
    return (
        rows(database, "select number, origin, baseline, assignment, state, duplicate_of from trials order by number"),
        rows(
            database,
            "select number, objective, part, value, stderr from measurements join trials on trial_id = trials.id"
            " order by number, objective, part",
        ),
        rows(database, "select name, state, message from studies"),
    )


@pytest.fixture
def start(commands: Any, tiny_model_dir: Callable[[str], Path], tmp_path: Path) -> Callable[..., Any]:
    """Start a command line with a cache of its own, one thread, and `spec.yaml` in the current folder."""
    (tmp_path / "spec.yaml").write_text(SPEC.format(model=tiny_model_dir("llama")))
    environment = os.environ | {"AUTOQ_CACHE": str(tmp_path / "cache")}
    return functools.partial(commands.start, cwd=tmp_path, env=environment)


def stop_after(process: Any, database: Path, progress: int, how: signal.Signals) -> str:
    """Send `how` once so many rows are stored, or let the process end; what it said on standard error."""
    while process.poll() is None:
        if (found := rows(database, PROGRESS)) and found[0][0] >= progress:
            process.send_signal(how)
            break
        time.sleep(0.002)
    return process.communicate(timeout=250)[1]


def stopped_each_time(start: Any, broken: Path, total: int, stops: dict[float, signal.Signals]) -> bool:
    """Stop a new study at these parts of it; False where one was not hit, as it had ended before the signal came."""
    command = ("search", "spec.yaml")
    for part, how in stops.items():
        process = start(*command, "--db", str(broken))
        said = stop_after(process, broken, max(1, round(part * total)), how)
        assert "Traceback" not in said
        if process.returncode == 0:
            return False
        if how is signal.SIGKILL:
            assert process.returncode == -how
        else:
            assert process.returncode == 130, said
            assert said.endswith(f"interrupted; go on with: autoq resume tiny --db {broken}\n")
        command = ("resume", "tiny")
    return True


def test_a_study_that_is_stopped_again_and_again_ends_as_if_it_had_not_been(start, tmp_path):
    whole, broken = tmp_path / "whole.db", tmp_path / "broken.db"
    reference = start("search", "spec.yaml", "--db", str(whole), "--quiet")
    assert reference.communicate(timeout=250)[1] == ""
    (total,) = rows(whole, PROGRESS)[0]

    # Before the first trial, at two moments of the search, and in the report.
    stops = {0.01: signal.SIGKILL, 0.3: signal.SIGINT, 0.6: signal.SIGTERM, 0.85: signal.SIGKILL}
    while not stopped_each_time(start, broken, total, stops):
        for left in tmp_path.glob("broken.db*"):
            left.unlink()
    last = start("resume", "tiny", "--db", str(broken), "--quiet")
    assert "Traceback" not in last.communicate(timeout=250)[1]
    assert last.returncode == 0
    assert outcome(broken) == outcome(whole)
    assert outcome(broken)[2] == [("tiny", "finished", None)]
