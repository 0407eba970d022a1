"""The simulated workers of `benchmarks/_simulation.py`: their clock, and a study of a thousand trials on fifty."""

import importlib.util
import itertools
import random
import sqlite3
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from autoq.search import cost_model as cost
from autoq.search import paging
from autoq.search.controller import create_study, run_study
from autoq.search.executors import Job
from autoq.search.observer import Observer
from autoq.search.reporting import report
from autoq.search.setup import pose
from autoq.spec import build_spec
from autoq.store import Store


def benchmark(name):
    path = Path(__file__).parents[2] / "benchmarks" / f"{name}.py"
    found = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module
    found.loader.exec_module(module)
    return module


simulation = benchmark("_simulation")
RECORDING = simulation.Recording(10.0, 20.0, (0.8, 0.9, 1.0, 1.0, 1.1, 1.6))


class Given:
    """An evaluator whose jobs take what they are told."""

    passes = 1.0

    def __init__(self, durations):
        self.durations = list(durations)
        self.recording = SimpleNamespace(seconds=lambda passes, slopes, draw: self.durations.pop(0))

    def measure(self, **arguments):
        return arguments


def executor(durations, workers, faults=None, charge=0.0, clock=lambda: 0.0):
    spec = SimpleNamespace(workers=SimpleNamespace(count=workers))
    return simulation.SimulatedExecutor(
        spec, Given(durations), faults or simulation.Faults(), charge=charge, clock=clock
    )


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=40), st.integers(1, 6))
def test_the_clock_of_events(durations, workers):
    """Jobs end in the order of time, each once, one at a time on a worker, and no worker rests while one waits."""
    own = executor(durations, workers)
    for number in range(len(durations)):
        own.submit(Job(f"trial-{number}", "measure"))
    moments, keys = [], []
    while (result := own.next()) is not None:
        moments.append(own.now)
        keys.append(result.job.key)
    assert moments == sorted(moments)
    assert sorted(keys) == sorted(f"trial-{number}" for number in range(len(durations)))
    by_worker = {}
    for stay in own.tally.stays:
        by_worker.setdefault(stay.worker, []).append((stay.start, stay.end))
    for stays in by_worker.values():
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(stays))
    # Graham's bound for list scheduling: within the longest job of the work that is shared evenly.
    even = sum(durations) / workers
    assert max(max(durations), even) * (1 - 1e-9) <= moments[-1] <= (even + max(durations)) * (1 + 1e-9)
    assert own.tally.busy(workers, 0.0, moments[-1]) == pytest.approx(even / moments[-1])


def test_what_the_controller_takes_leaves_workers_idle():
    now = [0.0]
    own = executor([1.0] * 4, 1, charge=2.0, clock=lambda: now[0])
    waited = []
    for number in range(4):
        now[0] += 0.25  # of the controller, which is charged twice
        own.submit(Job(f"trial-{number}", "measure"))
        assert own.next() is not None
        waited.append(own.tally.stays[-1].waited)
    assert waited == [0.5] * 4
    assert own.now == 4 * 1.5
    assert own.tally.controller == 1.0
    assert own.tally.busy(1, 0.0, own.now) == pytest.approx(1 / 1.5)


def test_results_that_wait_for_the_controller_take_no_time():
    now = [0.0]
    own = executor([1.0, 1.0], 2, charge=1.0, clock=lambda: now[0])
    for number in range(2):
        own.submit(Job(f"trial-{number}", "measure"))
    own.next()
    now[0] += 5.0
    assert own.next() is not None
    assert own.now == 6.0


def test_a_worker_that_died_or_hung_is_away_until_its_successor_has_loaded():
    dead = executor([4.0, 4.0], 1, simulation.Faults(crashes=1.0, load_seconds=10.0))
    for number in range(2):
        dead.submit(Job(f"trial-{number}", "measure"))
    first, died_at = dead.next(), dead.now
    assert first.failure.crashed
    assert died_at < 4.0
    dead.next()
    assert dead.tally.stays[1].start == pytest.approx(died_at + 10.0)
    hung = executor([4.0], 1, simulation.Faults(hangs=1.0))
    hung.submit(Job("trial-0", "measure", limit_seconds=30.0))
    assert (hung.next().failure.error, hung.now) == ("TimeLimit", 30.0)
    slow = executor([40.0], 1)
    slow.submit(Job("trial-0", "measure", limit_seconds=30.0))
    assert (slow.next().failure.error, slow.now) == ("TimeLimit", 30.0)


def test_time_goes_on_by_the_time_limit_of_whoever_waits():
    own = executor([3.0], 1)
    own.submit(Job("trial-0", "measure"))
    assert (own.next(1.0), own.clock()) == (None, 1.0)
    assert own.next(5.0) is not None
    assert own.clock() == 3.0
    assert (own.next(5.0), own.clock()) == (None, 3.0)  # nothing runs


def test_an_exclusive_job_waits_for_all_others():
    own = executor([3.0, 1.0], 2)
    own.submit(Job("trial-0", "measure"))
    own.submit(Job("trial-1", "measure", exclusive=True))
    assert [own.next().job.key, own.next().job.key] == ["trial-0", "trial-1"]
    assert own.tally.stays[1].start == 3.0


@given(st.floats(0.01, 100), st.floats(0.0, 50), st.integers(0, 2**32))
def test_a_recording_is_read_back_from_what_it_makes(per_pass, per_slopes, seed):
    draw = random.Random(seed)
    recording = simulation.Recording(per_pass, per_slopes, (1.0,))
    kinds = [(draw.uniform(0.3, 1.0), i % 3 == 0) for i in range(30)]
    found = simulation.Recording.fit([(p, s, recording.seconds(p, s, draw)) for p, s in kinds])
    assert found.per_pass == pytest.approx(per_pass)
    assert found.per_slopes == pytest.approx(per_slopes, abs=1e-9)
    assert found.ratios == pytest.approx([1.0] * 30)
    assert found.scaled(3).seconds(0.5, True, draw) == pytest.approx(3 * (0.5 * per_pass + per_slopes))


def test_too_few_durations_are_refused():
    with pytest.raises(ValueError, match="7 trials without slopes"):
        simulation.Recording.fit([(1.0, False, 1.0)] * 7)


@dataclass
class Ran:
    store: Store
    study: object
    executor: object


def run(store, model, trials=1000, workers=50, faults=None, sampler="random"):
    fields = {"executor": "ray", "count": workers}
    spec = build_spec(
        {
            "model": {"id": str(model)},
            "data": {"search_tokens": 1024, "window_tokens": 64},
            "target": {"name": "generic"},
            "space": {"schemes": ["rtn-int2-channel", "rtn-int4-channel", "rtn-int8-channel"]},
            "objectives": ["kl_nats_per_token", "size_bytes"],
            "sampler": {"name": sampler, "seeds": 4},
            "budget": {"trials": trials, "trial_time": "80s", "report_points": 2},
            "workers": fields,
        }
    )
    study, made = create_study(store, spec), []

    def make(spec):
        own = simulation.SimulatedEvaluator(spec, RECORDING)
        made.append(simulation.SimulatedExecutor(spec, own, faults or simulation.Faults(), charge=0.0))
        return made[-1]

    run_study(store, study.id, None, make)
    return Ran(store, study, made[-1])


def history(ran):
    return [(t.number, t.state, t.attempt, t.hash, t.seconds) for t in ran.store.trials(ran.study.id)]


@pytest.fixture(scope="module")
def ran(tiny_model_dir, tmp_path_factory):
    """A thousand trials under fifty workers, of which some die and some hang."""
    store = Store.open(str(tmp_path_factory.mktemp("simulated") / "autoq.db"))
    yield run(store, tiny_model_dir("llama"), faults=simulation.Faults(0.02, 0.005, 5.0))
    store.close()


def test_every_trial_has_one_result_whatever_happens_to_workers(ran):
    trials = ran.store.trials(ran.study.id)
    assert [trial.number for trial in trials] == list(range(len(trials)))
    counted = [trial for trial in trials if trial.state != "duplicate"]
    assert len(counted) == 1000
    assert {trial.state for trial in counted} == {"complete", "stopped", "failed"}
    dispatched = {stay.key: 0 for stay in ran.executor.tally.stays}
    for stay in ran.executor.tally.stays:
        dispatched[stay.key] += 1
    assert all(trial.attempt == dispatched[f"trial-{trial.number}"] for trial in counted)
    assert sum(trial.attempt > 1 for trial in counted) >= ran.executor.tally.crashes * 0.9 > 5
    kinds = {trial.error.type for trial in counted if trial.error}
    assert "TimeLimit" in kinds
    assert kinds <= {"TimeLimit", "WorkerLost"}
    assert ran.store.study(ran.study.id).state == "finished"


@pytest.mark.parametrize(
    ("page", "states"), [(97, None), (5000, None), (101, ("complete", "stopped")), (1, ("failed",)), (7, ("running",))]
)
def test_pages_hold_every_trial_once(ran, monkeypatch, page, states):
    monkeypatch.setattr(paging, "PAGE", page)
    assert list(paging.each_trial(ran.store, ran.study.id, states)) == ran.store.trials(ran.study.id, states)


def test_a_report_never_holds_all_trials_of_a_study(ran, monkeypatch):
    """A hundred thousand records are half a gigabyte, and their assignments several."""
    own, held = Store.trials, []

    def trials(*arguments, **named):
        found = own(*arguments, **named)
        held.append(len(found))
        return found

    monkeypatch.setattr(Store, "trials", trials)
    monkeypatch.setattr(paging, "PAGE", 50)
    report(pose(ran.study.study_spec()), ran.store, ran.study.id, ran.executor, Observer())
    assert max(held) == 50
    assert sum(held) > 1000


def test_the_stored_frontier_is_that_of_the_trials(ran):
    stored = [trial.number for trial in ran.store.frontier(ran.study.id)]
    assert stored == ran.store.recompute_frontier(ran.study.id)
    assert len(stored) > 5


def test_workers_go_on_while_slow_trials_are_waited_for(ran):
    stays = [stay for stay in ran.executor.tally.stays if stay.key.startswith("trial-")]
    end = max(stay.start for stay in stays)  # then there is nothing left to begin
    # Dead workers are away for five seconds: that share of time is no fault of the controller's.
    away = 5.0 * (ran.executor.tally.crashes + ran.executor.tally.hangs) / (50 * end)
    assert ran.executor.tally.busy(50, 0.0, end) + away > 0.95
    assert ran.executor.tally.hangs > 2


def test_the_database_is_as_large_as_it_was_predicted_to_be(ran):
    ended = ran.store.trials(ran.study.id, ["complete", "stopped"])
    tokens = sum(trial.measurements["kl_nats_per_token", "search"].n for trial in ended) / 1000
    layers = tuple((1, 1) for _ in range(14))
    predicted = cost.Study(cost.Model("tiny", layers, 0, 0), (2, 4, 8), 1000, tokens=1024, given_up=1 - tokens / 1024)
    with sqlite3.connect(ran.store.url) as connection:  # the file and what is not yet in it
        pages, free, size = (connection.execute(f"PRAGMA {p}").fetchone()[0] for p in
                             ("page_count", "freelist_count", "page_size"))  # fmt: skip
    assert cost.database_bytes(predicted, cost.Software()) == pytest.approx((pages - free) * size, rel=0.25)


def test_candidates_that_are_given_up_take_less_time(ran):
    trials = ran.store.trials(ran.study.id, ["complete", "stopped"])
    tokens = {"complete": [], "stopped": []}
    for trial in trials:
        tokens[trial.state].append(trial.measurements["kl_nats_per_token", "search"].n)
    mean = {state: sum(counts) / len(counts) for state, counts in tokens.items()}
    assert mean["stopped"] < 0.8 * mean["complete"]


@pytest.mark.parametrize("sampler", ["nsga2", "frontier"])
def test_a_simulated_study_repeats_itself(tiny_model_dir, tmp_path, sampler):
    faults = simulation.Faults(0.1, 0.02, 5.0)
    with Store.open(str(tmp_path / "autoq.db")) as store:
        runs = [run(store, tiny_model_dir("llama"), 40, 4, faults, sampler) for _ in range(2)]
        assert history(runs[0]) == history(runs[1])
