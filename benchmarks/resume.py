"""How long a stored study takes to go on: `autoq resume` in a process of its own, until it has dispatched a new trial.

The study is as a search leaves it that was killed: 30 blocks and 210 layers (tiny ones, so that loading them costs
little) with 6 schemes each; sensitivities, plan and first trials are the real controller's, then come `--trials` trials
in all, of random assignments and made-up values. The second table says where the time goes, measured in one process
after another: seconds by the clock, and of the processor.

    python benchmarks/resume.py [--trials 1000,10000] [--sampler frontier]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

import sqlalchemy as sa
import torch
from _report import print_table
from transformers import LlamaConfig, LlamaForCausalLM

from autoq.search.controller import create_study, raise_budget, run_study
from autoq.search.executors import LocalExecutor
from autoq.search.samplers import SLOPES
from autoq.search.setup import pose
from autoq.spec import build_spec
from autoq.store import Store
from autoq.store import models as m
from autoq.store.packing import pack

FIRST = 24  # trials of the real controller, on a made-up evaluator
KL, SIZE = "kl_nats_per_token", "size_bytes"

PARTS = """
import json, sys, time
began = time.perf_counter(), time.process_time()
told = {}

def lap(name):
    global began
    now = time.perf_counter(), time.process_time()
    told[name] = [b - a for a, b in zip(began, now)]
    began = time.perf_counter(), time.process_time()

from autoq.cli import main
from autoq.store import Store
lap("command line and store")
import torch, transformers
lap("torch and transformers")
from autoq.search import controller
from autoq.search.setup import pose, warm
warm()
lap("controller and Optuna")
import autoq.evaluation
lap("evaluator's modules")
from autoq.search.executors import make_executor

class Dispatched(BaseException):
    pass

run, restore, dispatch = controller._Run.run, controller._Run._restore, controller._Run._dispatch

def timed(self):
    lap("spec, model's skeleton, lease")
    run(self)

def timed_restore(self):
    lap("model, data, plan")
    restore(self)
    lap("stored trials and sampler")

def stop(self, *_):
    lap("proposal")
    raise Dispatched

controller._Run.run, controller._Run._restore, controller._Run._dispatch = timed, timed_restore, stop
with Store.open("autoq.db") as store:
    try:
        controller.run_study(store, 1)
    except Dispatched:
        pass
print(json.dumps(told))
"""


def support(name: str) -> ModuleType:
    """A module of `tests/support`, which is no package."""
    found = importlib.util.spec_from_file_location(
        name, Path(__file__).parent.parent / "tests" / "support" / f"{name}.py"
    )
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def make_model(folder: Path) -> Path:
    """A tiny Llama of 30 blocks with a tokenizer."""
    tokenizer = support("tiny_models").tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        num_hidden_layers=30,
        hidden_size=64,
        intermediate_size=128,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=len(tokenizer),
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fill(store: Store, study_id: int, trials: int) -> None:
    """Trials of random assignments up to `trials` in all, in bulk."""
    study = store.study(study_id)
    problem = pose(study.study_spec())
    drawn, now = random.Random(trials), datetime.now(UTC)
    # Slopes are of the first of a sampler's trials alone.
    attrs = {key: value for key, value in store.trials(study_id)[-1].sampler_attrs.items() if key != SLOPES}
    first = len(store.trials(study_id))
    with store._database.writing() as connection:
        last = connection.execute(sa.select(sa.func.max(m.trials.c.id))).scalar() or 0
        rows: dict[sa.Table, list[Mapping[str, Any]]] = {m.assignments: [], m.trials: [], m.measurements: []}
        for number in range(first, trials):
            indices = [drawn.randrange(len(variable.choices)) for variable in problem.space.variables]
            assignment = problem.space.assignment(indices)
            rows[m.assignments].append({"hash": assignment.hash, "body": pack(assignment)})
            rows[m.trials].append(
                {
                    "id": last + 1 + number, "study_id": study_id, "number": number, "state": "complete",
                    "origin": "sampler", "assignment": assignment.hash, "attempt": 1, "changed": study.changes,
                    "feasible": True, "violations": {}, "sampler_attrs": attrs, "worker": "local", "seconds": 1.0,
                    "created_at": now, "finished_at": now,
                }
            )  # fmt: skip
            size = problem.computed("size_bytes", assignment)
            for name, unit, value in ((KL, "nats/token", drawn.uniform(0.1, 3)), (SIZE, "bytes", float(size))):
                rows[m.measurements].append(
                    {
                        "trial_id": last + 1 + number, "objective": name, "part": "search", "kind": "measured",
                        "unit": unit, "value": value, "stderr": 0.01, "n": 64, "device": "", "detail": {},
                    }
                )  # fmt: skip
        for table, new in rows.items():
            if new:
                connection.execute(sa.insert(table), new)
    store.set_state(study_id, "running")  # its process was killed


def newest(path: Path) -> int:
    """How many trials there are."""
    connection = sqlite3.connect(path, timeout=60)
    try:
        return int(connection.execute("select count(*) from trials").fetchone()[0])
    finally:
        connection.close()


def resumed(folder: Path) -> float:
    """Seconds from the command to its first new trial."""
    before = newest(folder / "autoq.db")
    command = [sys.executable, "-c", "from autoq.cli import main; main()", "resume", "1", "--quiet"]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stderr=subprocess.PIPE, text=True)
    while newest(folder / "autoq.db") == before:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    took = time.perf_counter() - start
    process.kill()
    process.communicate()
    return took


def parts(folder: Path) -> dict[str, list[float]]:
    """Where the time of a resume goes, to the first proposal."""
    done = subprocess.run([sys.executable, "-c", PARTS], cwd=folder, capture_output=True, text=True, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", default="1000,10000")
    parser.add_argument("--sampler", default="frontier")
    options = parser.parse_args()
    counts = [int(count) for count in options.trials.split(",")]
    whole, split = [], {}
    for count in counts:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            os.environ["AUTOQ_CACHE"] = str(folder / "cache")
            spec = build_spec(
                {
                    "model": {"id": str(make_model(folder / "model"))},
                    "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 64, "window_tokens": 32},
                    "target": {"name": "generic"},
                    "space": {"schemes": [f"rtn-int{bits}-g64" for bits in (2, 3, 4, 5, 6, 8)]},
                    "objectives": [KL, SIZE],
                    "sampler": {"name": options.sampler},
                    "budget": {"trials": FIRST},
                }
            )
            with Store.open(str(folder / "autoq.db")) as store:
                study = create_study(store, spec).id
                run_study(store, study, make=lambda spec: LocalExecutor(spec, support("controllers").Evaluator))
                raise_budget(store, study, 10 * count)
                fill(store, study, count)
            split[count] = parts(folder)
            whole.append([count, *(f"{seconds:.1f}" for seconds in sorted(resumed(folder) for _ in range(3)))])
    print_table("`autoq resume` to the first new trial, seconds", ["trials", "fastest", "median", "slowest"], whole)
    header = ["part", *(f"{what} at {count}" for count in counts for what in ("clock", "processor"))]
    rows = [[part, *(f"{x:.2f}" for count in counts for x in split[count][part])] for part in split[counts[0]]]
    total = [f"{sum(times[i] for times in split[count].values()):.2f}" for count in counts for i in (0, 1)]
    print_table("Where it goes, seconds", header, [*rows, ["all", *total]])


if __name__ == "__main__":
    main()
