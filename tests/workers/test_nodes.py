"""Nodes that share neither files nor devices with the study's: what they lack comes to them, and latencies of two
devices never meet."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from autoq import device, trained
from autoq.assignment import Assignment
from autoq.bank import digest, pack
from autoq.errors import AutoQError, SpecError
from autoq.evaluation import Evaluator
from autoq.measurement import Measurement, Part
from autoq.scheme import parse_scheme
from autoq.search.controller import create_study, run_study
from autoq.search.executors import Job, Result
from autoq.search.stages import run_job
from autoq.spec import StudySpec, build_spec
from autoq.statistics import Rival
from autoq.store import Store
from autoq.workers import files
from autoq.workers.executor import RayExecutor

pytestmark = pytest.mark.slow
# Where only processes in the test's folder find them.
MODEL, TEXT = "/proc/self/cwd/model", "/proc/self/cwd/text.txt"
# Workers cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the nodes' caches."""
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def cluster(ray_cluster: Any, caches: Path) -> Any:
    """This machine's node, with room for one worker, and another one with room for two."""
    ray_cluster.add("head", cpus=1, env={"NODE_DEVICE": "alpha 1"})
    other = {"AUTOQ_NODE": "other", "AUTOQ_CACHE": str(caches / "other"), "NODE_DEVICE": "beta 2"}
    ray_cluster.add("other", cpus=2, env=other)
    return ray_cluster


@pytest.fixture(autouse=True)
def _surroundings(cluster: Any, caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.enter(monkeypatch)
    monkeypatch.setenv("AUTOQ_CACHE", str(caches / "own"))


@pytest.fixture
def model(tiny_model_dir: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model, and a text beside it, in a folder of their own."""
    shutil.copytree(tiny_model_dir("llama"), tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(f"Line {i} of many says {i * i}." for i in range(400)))
    monkeypatch.chdir(tmp_path)
    return MODEL


def spec_for(address: str, model: str = "demo:smollm2", **more: Any) -> StudySpec:
    tree = {
        "model": {"id": model},
        "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 64, "window_tokens": 32},
        "target": {"name": "generic"},
        "space": {"schemes": ["rtn-int4-g32", "rtn-int8-channel-sym"]},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        **more,
    }
    return build_spec(
        {**tree, "workers": {"executor": "ray", "address": address, "cpus": 1, **more.get("workers", {})}}
    )


class OnNode(Evaluator):
    """Says where it is, and has the processor that its node's environment names."""

    def __init__(self, spec: StudySpec) -> None:
        if "NODE_DEVICE" in os.environ:
            device.cpu_model = lambda: os.environ["NODE_DEVICE"]
        super().__init__(spec)
        self.bank.ask_seconds = 0.0  # these layers are made in no time

    def banked(self) -> dict[str, int]:
        time.sleep(1.0)
        return {name: getattr(self.bank, name) for name in ("made", "hits", "fetched", "corrupt")}

    def where(self) -> tuple[str, str, str]:
        time.sleep(1.0)  # so that each worker gets one
        return os.environ.get("AUTOQ_NODE", ""), self.spec.model.id, self.spec.data.source

    def measure(self, assignment: Assignment, part: Part, rival: Rival | None = None) -> list[Measurement]:
        time.sleep(0.2)
        return super().measure(assignment, part, rival)


def named(fingerprint: str | None) -> str:
    """The processor's name in what says of a device."""
    return "alpha 1" if "alpha 1" in (fingerprint or "") else "beta 2" if "beta 2" in (fingerprint or "") else "?"


class Counting(RayExecutor):
    """Counts what workers on other machines ask for."""

    def __init__(self, spec: StudySpec, make: Any) -> None:
        self.wanted: list[files.Wants] = []
        super().__init__(spec, make)

    def _supply(self, wants: files.Wants) -> Any:
        self.wanted.append(wants)
        return super()._supply(wants)


def each(executor: RayExecutor, count: int, job: Callable[[str], Job]) -> list[Result]:
    """One job on each worker, once all are there."""
    end = time.monotonic() + 200
    while [view.state for view in executor.workers()].count("idle") < count:
        assert time.monotonic() < end, executor.workers()
        executor.submit(Job("wait", "where"))
        executor.next()
    for number in range(count):
        executor.submit(job(str(number)))
    results = list(iter(executor.next, None))
    assert [result.failure for result in results] == [None] * count
    return results


def test_a_node_gets_what_it_lacks_once(
    cluster: Any, caches: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "CHUNK_BYTES", 2**16)  # of the side that reads
    spec = spec_for(cluster.address, model, data={"source": TEXT, "window_tokens": 32, "calibration_tokens": 64,
                    "search_tokens": 64, "report_tokens": 64}, workers={"count": 3})  # fmt: skip
    with Counting(spec, OnNode) as executor:
        found = sorted(result.value for result in each(executor, 3, lambda key: Job(key, "where")))
        assert found[0] == ("", model, TEXT)
        assert found[1] == found[2]
        node, folder, text = found[1]
        assert node == "other"
        assert Path(folder).parent == Path(text).parents[1] == caches / "other" / "fetched"
        assert Path(text).read_bytes() == Path(TEXT).read_bytes()
        for file in Path(folder).iterdir():
            assert file.read_bytes() == (Path(model) / file.name).read_bytes()
        chunks = [wanted for wanted in executor.wanted if isinstance(wanted, files.WantsChunk)]
        assert len(chunks) == len(set(chunks)) > len(list(Path(folder).iterdir())) + 1  # one fetched, the other waited
        views = executor.workers()
        assert sorted(named(view.device) for view in views) == ["alpha 1", "beta 2", "beta 2"]
        assert all(view.memory_bytes and view.memory_bytes > 10**7 for view in views)
        assert [view.process is None for view in views if named(view.device) == "beta 2"] == [True, True]

        # A layer that was trained is on this node only, and goes with the first trial that has it.
        evaluator = OnNode(spec)
        name, *names = (layer.name for layer in evaluator.info.layers if layer.kind == "linear")
        weight = evaluator.quantized(name, parse_scheme("rtn-int2-g32"))
        schemes = dict.fromkeys(names, parse_scheme("rtn-int4-g32"))
        assignment = Assignment({name: weight.scheme, **schemes}, trained={name: digest(weight)})
        trained.place(assignment, lambda wanted: {one: pack(weight) for one in wanted})
        arguments = {"assignment": assignment, "part": "search"}
        results = each(executor, 3, lambda key: Job(key, "measure", arguments))
        assert len({result.value[0].value for result in results}) == 1
        assert executor.wanted.count(files.WantsTrained(digest(weight))) in (1, 2)
        # All others were made once, on whichever machine, and went to the other one once.
        banked = [result.value for result in each(executor, 3, lambda key: Job(key, "banked"))]
        totals = {key: sum(each[key] for each in banked) for key in banked[0]}
        assert totals["made"] == len(names)
        assert totals["fetched"] in range(len(names), 2 * len(names) + 1)  # two of a machine may fetch at once
        assert totals == {**totals, "hits": 2 * len(names) - totals["fetched"], "corrupt": 0}


def test_latencies_are_of_one_device_and_quality_of_all(cluster: Any, model: str, tmp_path: Path) -> None:
    spec = spec_for(
        cluster.address,
        model,
        target={"name": "torch-cpu", "prompt_tokens": 16},
        space={"schemes": ["rtn-int8-channel-sym", "rtn-int8-channel-sym-a8dyn"]},
        objectives=["kl_nats_per_token", "size_bytes", "latency_decode_ms"],
        sampler={"name": "random", "seeds": 0},
        budget={"trials": 10, "report_points": 1},
        workers={"count": 3, "device": "beta"},
    )
    with Store.open(str(tmp_path / "autoq.db")) as store:
        study = create_study(store, spec)
        made = []

        def make(spec: StudySpec) -> RayExecutor:
            made.append(Counting(spec, OnNode))
            each(made[0], 3, lambda key: Job(key, "where"))  # one that came late might find no trial left
            return made[0]

        assert run_study(store, study.id, make=make).state == "finished"
        # The model is there since the test before.
        assert [type(wanted) for wanted in made[0].wanted].count(files.WantsChunk) == 0
        trials = [trial for trial in store.trials(study.id) if trial.state == "complete"]
        assert named(store.table(study.id, "costs")["device"]) == "beta 2"
    latencies = [m for trial in trials for (name, _), m in trial.measurements.items() if name == "latency_decode_ms"]
    assert {named(m.device) for m in latencies if m.kind == "measured"} == {"beta 2"}
    assert {named(m.device) for m in latencies if m.device} == {"beta 2"}
    qualities = [m for trial in trials for (name, _), m in trial.measurements.items() if name == "kl_nats_per_token"]
    assert {named(m.device) for m in qualities} == {"alpha 1", "beta 2"}


class Named:
    """No model, but a device."""

    def __init__(self, spec: StudySpec) -> None:
        self.fingerprint = os.environ["NODE_DEVICE"]

    def where(self) -> str:
        return self.fingerprint


@pytest.fixture
def bare(cluster: Any) -> Iterator[RayExecutor]:
    with RayExecutor(spec_for(cluster.address, workers={"count": 1}), Named) as executor:
        yield executor


def test_a_device_that_is_not_there_is_said(bare: RayExecutor) -> None:
    with pytest.raises(AutoQError, match=r"no worker has the device 'gamma' that 'where' is for; there are: '\w+ \d'"):
        run_job(bare, Job("c", "where", device="gamma"))


@pytest.mark.parametrize(
    ("workers", "line"),
    [
        (
            {"memory": "9000GB"},
            r"1 worker of 1 CPUs and 0 GPUs and 9e\+03 GB of memory fits on no node; Ray has 1 CPUs",
        ),
        ({"cpus": 3}, r"1 worker of 3 CPUs and 0 GPUs fits on no node; Ray has 1 CPUs and 0 GPUs \+ 2 CPUs and 0 GPUs"),
        ({"gpus": 0.5}, r"1 worker of 1 CPUs and 0\.5 GPUs fits on no node"),
    ],
)
def test_what_fits_nowhere_is_refused_at_once(cluster: Any, workers: dict[str, Any], line: str) -> None:
    with pytest.raises(SpecError, match=line):
        RayExecutor(spec_for(cluster.address, workers={"count": 2, **workers}), Named)
