"""A server on a database with two users' studies, in this process and in one of its own."""

from __future__ import annotations

import asyncio
import contextlib
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from autoq.assignment import Assignment
from autoq.errors import SpecError
from autoq.layer import Layer
from autoq.measurement import Measurement
from autoq.scheme import parse_scheme
from autoq.service.app import create_app
from autoq.service.settings import Limits, Settings
from autoq.spec import parse_spec
from autoq.store import Prepared, Store, WorkerRecord

BASE = "http://localhost:8800"
OBJECTIVES = [
    ("kl_nats_per_token", "nats/token", "minimize"),
    ("size_bytes", "bytes", "minimize"),
    ("latency_decode_ms", "ms", "minimize"),
]
LAYERS = ("model.layers.0.q_proj", "model.layers.0.down_proj", "model.layers.1.down_proj")
# origin, baseline, schemes, kl, bytes, predicted ms, measured ms
TRIALS = [
    ("baseline", "unquantized", ("keep", "keep", "keep"), 0.0, 270e6, 30.0, 31.2),
    ("baseline", "uniform-int8", ("rtn-int8-channel-sym",) * 3, 0.004, 140e6, 18.0, 17.5),
    ("baseline", "uniform-int4", ("rtn-int4-g64",) * 3, 0.42, 80e6, 12.0, 12.4),
    ("seed", None, ("rtn-int8-g64", "rtn-int4-g64", "rtn-int4-g64"), 0.17, 80e6, 11.9, 12.3),
    ("sampler", None, ("rtn-int4-g64", "rtn-int8-g64", "rtn-int4-g64"), 0.172, 79.8e6, 11.9, 12.3),
    ("sampler", None, ("rtn-int3-g64", "rtn-int4-g64", "rtn-int4-g64"), 0.61, 72e6, 11.0, None),
    ("sampler", None, ("rtn-int3-g64", "rtn-int3-g64", "rtn-int8-g64"), 0.9, 90e6, 13.0, None),
]
SPEC = {"model": {"id": "demo:smollm2"}, "name": "sent"}


def mixed(*texts):
    return Assignment({name: parse_scheme(text) for name, text in zip(LAYERS, texts, strict=True)})


def fill(store: Store, name: str, owner: str | None) -> int:
    """A finished study with everything that a study can have; its id."""
    tables = {
        "layers": {layer: asdict(Layer(layer, "linear", 64, 64, 2)) for layer in LAYERS},
        "sensitivity": {layer: {"rtn-int4-g64": 0.1, "rtn-int8-g64": 0.01} for layer in LAYERS},
    }
    spec = parse_spec(f"name: {name}\nmodel: {{id: some/model}}")
    study, _ = store.queue.submit(owner, None, name, spec, Prepared(OBJECTIVES, tables))
    for number, (origin, baseline, schemes, kl, size, predicted, measured) in enumerate(TRIALS):
        attrs = {"frontier:predicted": kl * 1.1} if origin == "sampler" else {}
        trial = store.start_trial(study.id, number, mixed(*schemes), origin, baseline, attrs)
        values = np.full((2, 8), kl, np.float32)
        values[0, 0] = np.nan
        searched = [
            Measurement("kl_nats_per_token", kl, "nats/token", "measured", "search", 0.01, 2048, per_token=values),
            Measurement("size_bytes", size, "bytes", "computed", "search"),
            Measurement("latency_decode_ms", predicted, "ms", "predicted", "search"),
        ]
        assert store.finish_trial(trial.id, 1, searched, {}, 1.5, "local")
        if measured is not None:
            reported = [Measurement("latency_decode_ms", measured, "ms", "measured", "report", 0.1, 20)]
            store.add_measurements(trial.id, reported)
    store.record_duplicate(study.id, 7, mixed(*TRIALS[3][2]), 3)
    failing = store.start_trial(study.id, 8, mixed("keep", "rtn-int4-g64", "keep"), "sampler")
    store.fail_trial(failing.id, 1, "NotFinite", "kl_nats_per_token is not a number", "trace", 0.1, "local")
    optimism = {"objective": "kl_nats_per_token", "ratio": 1.1, "stderr": 0.1, "frontier": {"3": 1.1}, "baselines": {}}
    store.put_table(study.id, "optimism", optimism)
    store.queue.settle(study.id, "finished")
    store.remarks.put(study.id, 3, "a good one", ["keep"], owner)
    store.queue.add_export(study.id, 3, "torch-cpu", owner)
    return study.id


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
    """A database of two users, made once: `mine` is ada's, `theirs` is bob's, `nobodys` has no owner."""
    path = tmp_path_factory.mktemp("served") / "autoq.db"
    with Store.open(str(path)) as store:
        for name, owner in (("mine", "ada"), ("theirs", "bob"), ("nobodys", None)):
            fill(store, name, owner)
    return path


@pytest.fixture
def in_loop():
    """Run a coroutine to its end, in a thread: in this one a browser's driver may have its own loop."""
    with ThreadPoolExecutor(1) as threads:
        yield lambda coroutine: threads.submit(asyncio.run, coroutine).result()


class Desk:
    """A backroom that knows one model and refuses all others as the real one does, in a line that names the field."""

    def __init__(self) -> None:
        self.asked = 0

    def known(self, spec):
        return None

    async def prepare(self, spec):
        self.asked += 1
        if spec.model.id != "demo:smollm2":
            raise SpecError(f"model.id: no model {spec.model.id[:80]!r}")
        return Prepared(OBJECTIVES, {"layers": {}}, {"layers": 210})

    async def offer(self, study_id, maximum, minimum, best):
        value = {"value": 0.2, "low": 0.1, "high": 0.3, "kind": "predicted"}
        return {"predicted": {"kl_nats_per_token": value}, "assignment": {LAYERS[0]: "rtn-int4-g64"}, "trial": None}


@dataclass
class Runs:
    """A scheduler that has nothing to do."""

    problem: str | None = None

    @property
    def alive(self) -> bool:
        return self.problem is None

    woken: int = 0

    def wake(self):
        self.woken += 1

    def standings(self):
        return {}

    def widths(self):
        return {}

    def counts(self):
        return {"slots": 2, "started": self.woken}


@dataclass
class Served:
    """An application and its store, and a secret for each user and role."""

    app: FastAPI
    store: Store
    secrets: dict[str, str] = field(default_factory=dict)

    def client(self, who: str | None = None, **more) -> TestClient:
        """Somebody who asks: by a token's name, or with none."""
        headers = {} if who is None else {"Authorization": f"Bearer {self.secrets[who]}"}
        return TestClient(self.app, base_url=BASE, headers=headers, raise_server_exceptions=False, **more)


@pytest.fixture
def store(template, tmp_path):
    path = shutil.copy(template, tmp_path / "autoq.db")
    with Store.open(str(path)) as opened:
        # Now, and not with the template: a worker that was not seen for a minute is gone.
        studies = [opened.study(name) for name in ("mine", "theirs", "nobodys")]
        opened.queue.beat([WorkerRecord(f"host:{s.id}", "host", "cpu", "busy", s.id, s.name, 3, 1000) for s in studies])
        yield opened


QUICK = Limits(requests_per_second=1e6, burst=10**6)


@pytest.fixture
def open_server(store, tmp_path) -> Served:
    """On loopback, without any token: everybody may do everything."""
    settings = Settings(limits=QUICK, exports=tmp_path / "exports")
    return Served(create_app(store, settings, Desk(), Runs()), store)


@pytest.fixture
def server(store, tmp_path) -> Served:
    """With tokens of every role, an expired one and a revoked one."""
    served = Served(create_app(store, Settings(limits=QUICK, exports=tmp_path / "exports"), Desk(), Runs()), store)
    for user in ("ada", "bob"):
        for role in ("viewer", "submitter", "admin"):
            served.secrets[f"{user}-{role}"] = store.accounts.create(role, user, role)[0]
    served.secrets["expired"] = store.accounts.create("old", "ada", "admin", timedelta(microseconds=1))[0]
    secret, record = store.accounts.create("lost", "ada", "admin")
    store.accounts.revoke(record.id)
    served.secrets |= {"revoked": secret, "wrong": "autoq_" + "x" * 43, "no token": "hunter2"}
    return served


def routes(app: FastAPI) -> list[tuple[str, str]]:
    """Every method and path template that the application answers."""
    found = []
    for route in app.routes:
        within = getattr(route, "effective_route_contexts", None)
        for each in [route] if within is None else within():
            found += [(method, each.path) for method in sorted(each.methods) if method != "HEAD"]
    return found


FILLING = {"study": "mine", "number": "3", "export": "1", "token": "1", "name": "frontier", "digest": "0"}


def address(path: str, **values: str) -> str:
    """A path template with its parameters filled in."""
    return re.sub(r"\{(\w+)(:\w+)?\}", lambda found: (FILLING | values)[found[1]], path)


class Process:
    """`autoq serve` in a process of its own, on a free port."""

    def __init__(self, db: Path, *options: str) -> None:
        command = [
            sys.executable,
            "-c",
            "from autoq.cli import main; main()",
            "serve",
            "--db",
            str(db),
            "--port",
            "0",
            *options,
        ]
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=db.parent
        )
        line = self.process.stdout.readline()
        found = re.search(r"(https?://\S+?)/?$", line.strip())
        if not found:
            self.process.kill()
            raise AssertionError(line + self.process.stderr.read())
        self.url = found[1]

    def stop(self) -> tuple[int, str]:
        """End it as an init system does; its exit code and what it said on standard error."""
        self.process.terminate()
        _, said = self.process.communicate(timeout=250)
        return self.process.returncode, said


@pytest.fixture
def serve(template, tmp_path):
    """Start `autoq serve` on a copy of the database; whatever still runs is ended with the test."""
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> Process:
            path = tmp_path / "autoq.db"
            if not path.exists():
                shutil.copy(template, path)
            process = Process(path, *options)
            stack.callback(process.process.stderr.close)
            stack.callback(process.process.stdout.close)
            stack.callback(process.process.wait)
            stack.callback(process.process.kill)
            return process

        yield start


@pytest.fixture
def conftest_routes():
    """`routes`, for other files."""
    return routes


@pytest.fixture(scope="session")
def desk() -> Desk:
    """A backroom."""
    return Desk()


@pytest.fixture(scope="session")
def runs() -> Runs:
    """A scheduler."""
    return Runs()
