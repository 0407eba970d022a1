"""Whole studies of a real model on Ray: they find what this process finds, bit for bit."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

from autoq import device
from autoq.assignment import Assignment
from autoq.evaluation import Evaluator
from autoq.measurement import Measurement, Part
from autoq.scheme import Keep, parse_scheme
from autoq.search.controller import create_study, run_study
from autoq.search.executors import Executor, Job, LocalExecutor, make_evaluator
from autoq.spec import StudySpec, WorkersSpec, build_spec
from autoq.statistics import Rival
from autoq.store import Store, TrialRecord
from autoq.targets import CostTable
from autoq.workers.executor import RayExecutor
from autoq.workers.session import Session

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
# Workers cannot import this file.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SCHEMES = ["rtn-int2-g32", "rtn-int3-g32", "rtn-int4-g32", "rtn-int8-channel-sym"]
DATA = {"calibration_tokens": 256, "search_tokens": 256, "report_tokens": 128, "window_tokens": 64}


@pytest.fixture(scope="module")
def session() -> Iterator[Session]:
    session = Session(WorkersSpec(executor="ray", count=2, cpus=1))
    yield session
    session.close()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Use an empty cache of that name from now on."""

    def use(name: str) -> Path:
        monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / name))
        return tmp_path / name

    return use


def spec_for(model: Path | str, workers: Mapping[str, Any], **more: Any) -> StudySpec:
    tree = {
        "model": {"id": str(model)},
        "data": DATA,
        "target": {"name": "generic"},
        "space": {"schemes": SCHEMES},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        "budget": {"trials": 24},
        "workers": {"executor": "ray"} | dict(workers),
    }
    return build_spec(tree | more)


def here(spec: StudySpec) -> Executor:
    return LocalExecutor(spec, make_evaluator)


def search(path: Path, spec: StudySpec, make: Callable[[StudySpec], Executor]) -> list[TrialRecord]:
    """All trials of a study that ran to its end."""
    with Store.open(str(path)) as store:
        study = create_study(store, spec)
        assert run_study(store, study.id, make=make).state == "finished"
        return store.trials(study.id)


def found(trials: Sequence[TrialRecord]) -> list[Any]:
    """What a study says, without when, by whom and what it took; floats to the last bit."""

    def told(measurement: Measurement) -> Any:
        detail = {key: value for key, value in measurement.detail.items() if key != "forward_passes"}
        return measurement.value.hex(), measurement.to_json() | {"detail": detail}

    return [
        (
            trial.number,
            trial.state,
            trial.origin,
            trial.baseline,
            trial.hash,
            trial.attempt,
            trial.on_frontier,
            {key: told(m) for key, m in trial.measurements.items()},
        )
        for trial in trials
    ]


def both_there(spec: StudySpec, make: Callable[[StudySpec], Evaluator] = make_evaluator) -> RayExecutor:
    """Two workers, once both have loaded: the first one might do all that there is meanwhile."""
    executor = RayExecutor(spec, make)
    end = time.monotonic() + 600
    while [view.state for view in executor.workers()].count("idle") < 2:
        assert time.monotonic() < end, executor.workers()
        executor.submit(Job("describe", "describe"))
        executor.next()
    return executor


def test_a_study_on_ray_is_the_study_in_this_process_to_the_last_bit(
    session: Session,
    cache: Callable[[str], Path],
    tiny_model_dir: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    spec = spec_for(tiny_model_dir("llama"), {"count": 2})
    cache("one")
    local = search(tmp_path / "local.db", spec, here)
    other = cache("other")
    remote = search(tmp_path / "ray.db", spec, both_there)
    assert {trial.origin for trial in remote} == {"baseline", "seed", "sampler"}
    assert len({trial.measurements["kl_nats_per_token", "search"].value for trial in remote if trial.measurements}) > 16
    assert found(remote) == found(local)
    assert len({trial.worker for trial in remote if trial.worker}) == 2
    assert (other / "bank").is_dir()  # a cache that was chosen after Ray was started is the workers' too


class Watched(Evaluator):
    """Writes down when each job ran."""

    def _watch(self, action: str, run: Callable[[], Any]) -> Any:
        start = time.monotonic()
        value = run()
        with Path(os.environ["AUTOQ_CACHE"], "spans").open("a") as file:
            file.write(f"{action} {start} {time.monotonic()}\n")
        return value

    def measure(self, assignment: Assignment, part: Part, rival: Rival | None = None) -> list[Measurement]:
        return self._watch("measure", lambda: super(Watched, self).measure(assignment, part, rival))

    def cost_table(self, choices: Mapping[str, Sequence[str]]) -> CostTable:
        return self._watch("cost_table", lambda: super(Watched, self).cost_table(choices))

    def time(self, assignment: Assignment) -> list[Measurement]:
        return self._watch("time", lambda: super(Watched, self).time(assignment))


def test_latency_is_taken_alone_on_all_cores_whatever_a_worker_has(
    session: Session,
    cache: Callable[[str], Path],
    tiny_model_dir: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder, files = tiny_model_dir("llama"), cache("one")
    monkeypatch.chdir(folder.parent)  # a relative path is relative to where the study runs, not Ray
    spec = spec_for(
        f"./{folder.name}",
        {"count": 2, "cpus": 1},
        target={"name": "torch-cpu", "prompt_tokens": 16},
        space={"schemes": ["rtn-int8-channel-sym", "rtn-int8-channel-sym-a8dyn"]},
        objectives=["kl_nats_per_token", "size_bytes", "latency_decode_ms"],
        budget={"trials": 8, "report_points": 1},
    )
    trials = search(tmp_path / "autoq.db", spec, lambda spec: RayExecutor(spec, Watched))
    timed = [t.measurements["latency_decode_ms", "report"] for t in trials if t.on_frontier and t.baseline]
    assert timed
    assert {m.detail["threads"] for m in timed} == {device.threads()}
    assert all(m.kind == "measured" for m in timed)
    searched = [t.measurements["latency_decode_ms", "search"] for t in trials if t.state == "complete"]
    assert len(searched) == 8
    assert all(m.kind == "predicted" and m.value > 0 for m in searched)
    spans = [
        (action, float(a), float(b)) for action, a, b in map(str.split, (files / "spans").read_text().splitlines())
    ]
    assert [action for action, *_ in spans].count("cost_table") == 1
    alone = [span for span in spans if span[0] != "measure"]
    assert len(alone) > 2
    for span in alone:
        assert all(other is span or other[2] <= span[1] or other[1] >= span[2] for other in spans)


class Counting(Evaluator):
    """Tells what the bank did in this worker, and how the weights lie in its memory."""

    def measure(self, assignment: Assignment, part: Part) -> Any:
        values = [m.value for m in super().measure(assignment, part)]
        time.sleep(1.0)  # so that the other worker gets the other job
        counts = {name: getattr(self.bank, name) for name in ("made", "hits", "corrupt")}
        return os.getpid(), values, counts, self._mapped()

    def _mapped(self) -> dict[str, int] | None:
        """Kilobytes of the mapping of the model's file, by kind; None where the system does not tell."""
        if not Path("/proc/self/smaps").exists():
            return None
        pages: dict[str, int] = {}
        inside = False
        for line in Path("/proc/self/smaps").read_text().splitlines():
            name, _, rest = line.partition(":")
            if "-" in line.split()[0]:
                inside = line.endswith(f"{self.spec.model.id}/model.safetensors")
            elif inside and rest.endswith("kB"):
                pages[name] = pages.get(name, 0) + int(rest.split()[0])
        return pages


def test_workers_share_the_bank_and_the_weights(
    session: Session, cache: Callable[[str], Path], tiny_model_dir: Callable[[str], Path]
) -> None:
    cache("one")
    spec = spec_for(tiny_model_dir("llama"), {"count": 2, "cpus": 1})
    with both_there(spec, Counting) as executor:
        names = [layer.name for layer in make_evaluator(spec).info.layers if layer.kind == "linear"]
        choices = dict.fromkeys(names, SCHEMES)
        executor.submit(Job("make", "sensitivities", {"choices": choices}, exclusive=True))
        made = executor.next()
        assert made is not None
        assert made.failure is None
        scheme = parse_scheme("rtn-int4-g32")
        assignment = Assignment({"lm_head": Keep(), "model.embed_tokens": Keep()} | dict.fromkeys(names, scheme))
        for key in "ab":
            executor.submit(Job(key, "measure", {"assignment": assignment, "part": "search"}, attempt=1))
        results = {result.worker: result.value for result in iter(executor.next, None)}
    maker = results.pop(made.worker)
    ((_, values, counts, mapped),) = results.values()
    assert maker[2]["made"] == len(names) * len(SCHEMES)
    assert counts == {"made": 0, "hits": len(names), "corrupt": 0}
    assert values == maker[1]
    for pages in (mapped, maker[3]):
        assert pages is None or (pages["Rss"] > 0 and pages["Private_Dirty"] == 0), pages
