"""How long figures take, and how many bytes they are: studies of 20,000 and of 100,000 trials in SQLite.

    python benchmarks/figures.py [--trials 20000 100000]

Trials are synthetic: losses that fall with size, with noise, three objectives, 5 % stopped, 1 % failed, 3 % duplicates.
`first` is a view that has read nothing, `again` one that is up to date, `one more` one that a trial was added to.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import sqlalchemy as sa

from autoq.assignment import Assignment
from autoq.dashboards import figures
from autoq.dashboards.study_view import View
from autoq.dashboards.volume import Volume
from autoq.measurement import Measurement
from autoq.spec import build_spec
from autoq.store import Store, dominance
from autoq.store import models as m
from autoq.store.packing import pack

OBJECTIVES = [
    ("kl_nats_per_token", "nats/token", "minimize"),
    ("size_bytes", "bytes", "minimize"),
    ("latency_decode_ms", "ms", "minimize"),
]
MODULES = ("q_proj", "k_proj", "up_proj", "down_proj")
LAYERS = [f"model.layers.{block}.{module}" for block in range(30) for module in MODULES]
KINDS = ("measured", "computed", "predicted")
SCHEMES = ("rtn-int3-g64", "rtn-int4-g64", "rtn-int8-channel-sym")


def fill(store: Store, count: int) -> int:
    """A study of `count` trials, written as rows."""
    study = store.create_study(build_spec({"name": f"study-{count}", "model": {"id": "demo:smollm2"}}), OBJECTIVES)
    rng = np.random.default_rng(0)
    share = rng.random(count)
    loss = 0.3 * np.exp(-4 * share) * np.exp(np.abs(rng.normal(0, 0.4, count)))
    size, decode = 1.1e8 + 5e7 * share + rng.normal(0, 1e6, count), 18 + 8 * share + rng.normal(0, 0.8, count)
    values = np.stack([loss, size, decode], 1)
    state = rng.choice(["complete", "stopped", "failed", "duplicate"], count, p=[0.91, 0.05, 0.01, 0.03])
    state[:3] = "complete"
    complete = np.flatnonzero(state == "complete")
    front = complete[dominance.non_dominated([tuple(v) for v in values[complete]], ["minimize"] * 3)]
    chosen = Assignment.from_dict({name: SCHEMES[i % 3] for i, name in enumerate(LAYERS)})
    ends = [datetime.now(UTC) - timedelta(seconds=2 * (count - i)) for i in range(count)]
    first = 10_000_000 * study.id
    trials = [
        {
            "id": first + i,
            "study_id": study.id,
            "number": i,
            "state": str(state[i]),
            "attempt": 1,
            "origin": "baseline" if i < 3 else "sampler",
            "baseline": f"uniform-int{2 + i}" if i < 3 else None,
            "assignment": chosen.hash,
            "duplicate_of": 0 if state[i] == "duplicate" else None,
            "changed": i + 1,
            "feasible": True if state[i] == "complete" else None,
            "violations": {},
            "worker": "local",
            "sampler_attrs": {"frontier:predicted": float(loss[i])},
            "seconds": 2.0,
            "created_at": ends[i] - timedelta(seconds=2),
            "finished_at": ends[i],
        }
        for i in range(count)
    ]
    measured = [
        {
            "trial_id": first + int(i),
            "objective": name,
            "part": "search",
            "kind": kind,
            "value": float(value),
            "stderr": 0.02 * float(value) if kind == "measured" else None,
            "unit": unit,
            "n": 2048,
            "device": "cpu",
            "detail": {},
        }
        for i in np.flatnonzero(np.isin(state, ["complete", "stopped"]))
        for (name, unit, _), value, kind in zip(OBJECTIVES, values[i], KINDS, strict=True)
    ]
    with store._database.writing() as connection:
        if not connection.execute(sa.select(m.assignments.c.hash)).first():
            connection.execute(sa.insert(m.assignments).values(hash=chosen.hash, body=pack(chosen)))
        connection.execute(sa.insert(m.trials), trials)
        connection.execute(sa.insert(m.measurements), measured)
        rows = [{"study_id": study.id, "trial_id": first + int(i), "point": values[i].tolist()} for i in front]
        connection.execute(sa.insert(m.frontier), rows)
        connection.execute(sa.update(m.studies).where(m.studies.c.id == study.id).values(changes=count))
    return study.id


def timed(work, repeats: int = 5) -> float:
    """The median of some runs, in ms of CPU time: of one thread, so that is what a free core takes."""
    found = []
    for _ in range(repeats):
        begin = time.process_time()
        work()
        found.append(1000 * (time.process_time() - begin))
    return statistics.median(found)


def one_more(store: Store, study: int, number: int) -> None:
    chosen = Assignment.from_dict({name: SCHEMES[(i + number) % 3] for i, name in enumerate(LAYERS)})
    trial = store.start_trial(study, number, chosen, "sampler")
    found = [
        Measurement(name, value, unit, "measured", "search", 0.01)
        for (name, unit, _), value in zip(OBJECTIVES, (0.1, 1.3e8, 21.0), strict=True)
    ]
    store.finish_trial(trial.id, 1, found, {}, 2.0, "local")


def volumes() -> None:
    """The hypervolume alone, 10,000 trials: of scattered points, and where half of them are on the frontier."""
    rng = np.random.default_rng(0)
    for dimensions in (2, 3, 4):
        scattered = rng.random((10_000, dimensions))
        curved = scattered / np.linalg.norm(scattered, axis=1, keepdims=True) + 0.02 * rng.random((10_000, dimensions))
        for name, points in (("scattered", scattered), ("a large frontier", curved)):

            def run(points=points, dimensions=dimensions) -> None:
                volume = Volume([1.1] * dimensions, [0.0] * dimensions)
                for point in points:
                    volume.add(point)

            print(f"hypervolume, {dimensions} objectives, 10,000 trials, {name}: {timed(run, 1) / 1000:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, nargs="+", default=[20_000, 100_000])
    arguments = parser.parse_args()
    volumes()
    with tempfile.TemporaryDirectory() as folder, Store.open(str(Path(folder) / "autoq.db")) as store:
        for count in arguments.trials:
            study = fill(store, count)
            view = View(store, study)
            first = timed(lambda view=view: view.refresh(), 1)
            front, columns = int(view.trials.on_frontier.sum()), view.trials.nbytes / 1e6
            print(
                f"\n{count} trials, {front} on the frontier: read in {first / 1000:.1f} s, {columns:.0f} MB of columns"
            )
            print(f"{'figure':<20} {'again, ms':>10} {'one more, ms':>13} {'picture, KB':>12} {'with table, KB':>15}")
            for place, name in enumerate(figures.names()):
                made = view.figure(name)
                again = timed(lambda name=name, view=view: view.figure(name))
                one_more(store, study, count + place)
                more = timed(lambda name=name, view=view: view.figure(name), 1)
                sizes = [len(json.dumps(part, separators=(",", ":"))) / 1000 for part in (made.plotly, made.to_json())]
                print(f"{name:<20} {again:>10.1f} {more:>13.1f} {sizes[0]:>12.0f} {sizes[1]:>15.0f}")


if __name__ == "__main__":
    main()
