"""Studies as a search leaves them, written through the store: a small Llama, uniform baselines, proposals that get
better, values of both parts, one failure, one trial that was stopped, one duplicate. No model is loaded."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from autoq.assignment import Assignment
from autoq.layer import Layer
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.spec import build_spec
from autoq.store import Store, StudyRecord
from autoq.store import models as m

OBJECTIVES = [
    ("kl_nats_per_token", "nats/token", "minimize"),
    ("size_bytes", "bytes", "minimize"),
    ("latency_decode_ms", "ms", "minimize"),
]
SCHEMES = ("rtn-int4-g192", "rtn-int4-g64-sym", "rtn-int4-g64", "hqq-int4-g64-rz", "rtn-int8-channel-sym")
LOSS = {"rtn-int4-g192": 1.3, "rtn-int4-g64-sym": 1.15, "rtn-int4-g64": 1.0, "hqq-int4-g64-rz": 0.7}
BASELINES = {
    "unquantized": "keep",
    "uniform-int8": "rtn-int8-channel-sym",
    "uniform-int4": "rtn-int4-g64-sym",
    "uniform-int4-hqq": "hqq-int4-g64-rz",
}
DEVICE = "x86_64, 2 cores, avx2 avx512f avx512_vnni avx512_bf16"
OTHER_BYTES = 57_000_000
TRACEBACK = (
    'Traceback (most recent call last):\n  File "evaluation.py", line 211, in evaluate\n    loss = model(window)\n'
    "RuntimeError: the kernel returned NaN for <script>alert('layer 7')</script>"
)


def layers(blocks: int = 12) -> dict[str, Layer]:
    """The quantizable layers of a small Llama."""
    found: dict[str, Layer] = {}
    shapes = {
        **{f"self_attn.{k}_proj": (576 if k in "qo" else 192, 576) for k in "qkvo"},
        **{f"mlp.{k}_proj": (1536, 576) for k in ("gate", "up")},
        "mlp.down_proj": (576, 1536),
    }
    for block in range(blocks):
        for kind, (out, into) in shapes.items():
            name = f"model.layers.{block}.{kind}"
            found[name] = Layer(name, "linear", out, into, 2, block=block)
    return found


class Writer:
    """Writes one study, trial by trial; `seed` decides all of it."""

    def __init__(self, store: Store, study: StudyRecord, seed: int) -> None:
        self.store, self.study, self.random = store, study, random.Random(seed)
        self.layers = layers()
        self.weight = {
            n: self.random.lognormvariate(-6.6, 0.9) * (3 if "v_proj" in n or "down" in n else 1) for n in self.layers
        }
        self.number = len(store.trials(study.id))
        self.last: Assignment | None = None

    @classmethod
    def new(cls, store: Store, name: str, trials: int = 48, seed: int = 0, **spec: Any) -> Writer:
        """A new study, which runs, with its tables and no trial."""
        plain = {
            "name": name,
            "model": {"id": "demo:smollm2"},
            "target": {"name": "torch-cpu", "threads": 2},
            "objectives": [objective for objective, _, _ in OBJECTIVES],
            "budget": {"trials": trials, "report_points": 16},
            **spec,
        }
        writer = cls(store, store.create_study(build_spec(plain), OBJECTIVES), seed)
        own, study_id = writer.layers, writer.study.id
        store.put_table(study_id, "layers", {n: dataclasses.asdict(layer) for n, layer in own.items()})
        table = {n: {s: writer.weight[n] * LOSS.get(s, 0.004) for s in SCHEMES} for n in own}
        store.put_table(study_id, "sensitivity", table)
        store.set_state(study_id, "running")
        return writer

    def uniform(self, scheme: str) -> Assignment:
        return Assignment(dict.fromkeys(self.layers, parse_scheme(scheme)))

    def proposal(self, budget: float) -> Assignment:
        """Eight bits for the layers that lose most per byte, as many as `budget` (0 to 1) pays for."""
        ranked = sorted(self.layers, key=lambda n: -self.weight[n] / self.layers[n].parameters)
        eight = set(ranked[: int(budget * len(ranked))])
        chosen = {}
        for name in self.layers:
            four = "hqq-int4-g64-rz" if self.random.random() < 0.8 else self.random.choice(SCHEMES[:3])
            chosen[name] = parse_scheme("rtn-int8-channel-sym" if name in eight else four)
        return Assignment(chosen)

    def predicted(self, assignment: Mapping[str, Any]) -> float:
        return sum(self.weight[n] * LOSS.get(str(s), 0.0 if str(s) == "keep" else 0.004) for n, s in assignment.items())

    def size(self, assignment: Mapping[str, Any]) -> int:
        return OTHER_BYTES + sum(self.layers[n].nbytes(s) for n, s in assignment.items())

    def measured(self, assignment: Assignment, part: Any = "search") -> list[Measurement]:
        """All three objectives: predicted latency in the search, measured latency in the report."""
        kl = self.predicted(assignment) * self.random.uniform(0.97, 1.05) + 1e-6
        size = self.size(assignment)
        latency = 6.0 + size / 5.2e6
        tokens = 2048 if part == "search" else 16384
        found = [
            Measurement("kl_nats_per_token", kl, "nats/token", "measured", part, kl * 60 / tokens, tokens, DEVICE),
        ]
        if part == "search":
            found += [
                Measurement("latency_decode_ms", latency, "ms", "predicted", part, None, 1, DEVICE),
                Measurement("size_bytes", float(size), "bytes", "computed", part),
            ]
        else:
            detail = {
                "threads": 2,
                "runtime": "torch 2.13",
                "kernels": {"hqq-int4-g64-rz": "int4-g64"},
                "predicted_ms": latency,
            }
            timed = latency * self.random.uniform(0.96, 1.07)
            found.append(
                Measurement("latency_decode_ms", timed, "ms", "measured", part, timed * 0.03, 32, DEVICE, detail)
            )
        return found

    def trial(self, assignment: Assignment, origin: Any = "sampler", baseline: str | None = None) -> int:
        """One complete trial; its number."""
        attrs = {"frontier:predicted": self.predicted(assignment)} if origin == "sampler" else {}
        known = self.store.find(self.study.id, assignment.hash)
        if known is not None:
            self.store.record_duplicate(self.study.id, self.number, assignment, known.number, attrs)
        else:
            trial = self.store.start_trial(self.study.id, self.number, assignment, origin, baseline, attrs)
            self.store.finish_trial(trial.id, 1, self.measured(assignment), {}, self.random.uniform(0.8, 2.4), "local")
            self.last = assignment
        self.number += 1
        return self.number - 1

    def baselines(self) -> None:
        for name, scheme in BASELINES.items():
            self.trial(self.uniform(scheme), "baseline", name)

    def propose(self, count: int) -> None:
        for _ in range(count):
            self.trial(self.proposal(self.random.random() ** 1.4))

    def failure(self) -> int:
        """A trial that failed."""
        trial = self.store.start_trial(self.study.id, self.number, self.proposal(0.3), "sampler")
        self.store.fail_trial(
            trial.id,
            1,
            "RuntimeError",
            "the kernel returned NaN for <script>alert('layer 7')</script>",
            TRACEBACK,
            0.7,
            "local",
        )
        self.number += 1
        return self.number - 1

    def stop(self) -> int:
        """A trial that was given up early."""
        assignment = self.proposal(0.0)
        trial = self.store.start_trial(self.study.id, self.number, assignment, "sampler")
        detail = {"rival": 5, "estimate": self.predicted(assignment)}
        partial = [dataclasses.replace(one, detail=detail, n=512) for one in self.measured(assignment)]
        self.store.stop_trial(trial.id, 1, partial, {}, 0.5, "local")
        self.number += 1
        return self.number - 1

    def duplicate(self) -> int:
        """A proposal that was there before."""
        assert self.last is not None
        return self.trial(self.last)

    def report(self) -> None:
        """The frontier measured again, on the report part."""
        for point in self.store.frontier(self.study.id, with_assignments=True):
            assert point.assignment is not None
            self.store.add_measurements(point.id, self.measured(point.assignment, "report"))


def whole(store: Store, name: str, trials: int = 60, seed: int = 0, **spec: Any) -> StudyRecord:
    """A finished study with one of everything."""
    writer = Writer.new(store, name, trials, seed, **spec)
    writer.baselines()
    writer.propose(trials // 2)
    writer.failure()
    writer.stop()
    writer.propose(trials - trials // 2 - 7)
    writer.duplicate()
    writer.report()
    store.set_state(writer.study.id, "finished")
    return store.study(writer.study.id)


def crowd(store: Store, name: str, trials: int) -> StudyRecord:
    """A finished study of many trials: the first ones as above, then rows that share their assignments, in bulk."""
    writer = Writer.new(store, name, trials)
    writer.baselines()
    writer.propose(40)
    study, first = writer.study, store.trials(writer.study.id)
    now = first[-1].created_at
    drawn = writer.random
    with store._database.writing() as connection:
        last = connection.execute(sa.select(sa.func.max(m.trials.c.id))).scalar() or 0
        changes = store.study(study.id).changes + 1
        rows: list[dict[str, Any]] = []
        values: list[dict[str, Any]] = []
        for number in range(writer.number, trials):
            last += 1
            origin = first[4 + number % 40]
            rows.append(
                {
                    "id": last, "study_id": study.id, "number": number, "state": "complete", "origin": "sampler",
                    "assignment": origin.hash, "attempt": 1, "changed": changes, "feasible": True, "violations": {},
                    "sampler_attrs": {}, "worker": "local", "seconds": 1.0, "created_at": now, "finished_at": now,
                }
            )  # fmt: skip
            worse = drawn.uniform(1.05, 3)
            for (objective, _), one in origin.measurements.items():
                factor = worse if one.unit == "nats/token" else drawn.uniform(1.0, 1.2)
                values.append(
                    {
                        "trial_id": last, "objective": objective, "part": "search", "kind": one.kind, "unit": one.unit,
                        "value": one.value * factor, "stderr": one.stderr, "n": one.n, "device": "", "detail": {},
                    }
                )  # fmt: skip
        connection.execute(sa.insert(m.trials), rows)
        connection.execute(sa.insert(m.measurements), values)
        connection.execute(sa.update(m.studies).where(m.studies.c.id == study.id).values(changes=changes))
    store.set_state(study.id, "finished")
    return store.study(study.id)
