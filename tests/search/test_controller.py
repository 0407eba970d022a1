"""The controller with a made-up evaluator: order, resume, failures, constraints, reports."""

import pytest

from autoq.errors import AutoQError, BadInput, SpecError, WorkerLost
from autoq.measurement import Measurement
from autoq.scheme import code_bits
from autoq.search.controller import create_study, raise_budget, run_study
from autoq.search.executors import Executor, Failure, LocalExecutor, Result
from autoq.search.observer import Observer
from autoq.spec import build_spec
from autoq.store import Store
from autoq.store.dominance import non_dominated


class Evaluator:
    """Quality is a made-up function of the assignment; counts its calls and fails on demand."""

    def __init__(self, spec):
        self.spec = spec
        self.calls = []
        self.fail = {}

    def describe(self):
        return {"device": "made up", "threads": 1}

    def calibrate(self):
        return "nowhere"

    def sensitivities(self, choices):
        self.calls.append(("sensitivities", tuple(choices)))
        return {
            name: {text: float(hash_of(name) * 4.0 ** -bits(text)) for text in texts} for name, texts in choices.items()
        }

    def measure(self, assignment, part):
        self.calls.append((part, assignment.hash))
        if (problem := self.fail.get(len([c for c in self.calls if c[0] == "search"]))) is not None:
            raise problem
        value = sum(hash_of(name) * 4.0 ** -code_bits(scheme) for name, scheme in assignment.items())
        value *= 1.01 if part == "report" else 1.0
        return [Measurement("kl_nats_per_token", value, "nats/token", "measured", part, stderr=value / 10, n=100)]

    def measure_with_slopes(self, assignment, part, choices, turn):
        # Losses add up, so a layer answers for its own, which is half of its slope.
        table = {
            name: [2 * hash_of(name) * 4.0 ** -bits(t) * (t == str(assignment[name])) for t in texts]
            for name, texts in choices.items()
        }
        measured = self.measure(assignment, part)
        return measured, {"loss": measured[0].value, "table": table}


def hash_of(name):
    return 1 + sum(name.encode()) % 7


def bits(text):
    from autoq.scheme import parse_scheme

    return code_bits(parse_scheme(text))


class Recorder(Observer):
    def __init__(self, store, stop_at=None):
        self.store, self.stop_at = store, stop_at
        self.trials, self.notes, self.stages, self.reports = [], [], [], []

    def stage(self, name, total):
        self.stages.append(name)

    def trial(self, trial, done, budget):
        # nobody hears of a trial that is not in the database
        stored = self.store.trial_by_id(trial.id)
        assert (stored.state, stored.number) == (trial.state, trial.number)
        assert stored.state in ("complete", "stopped", "failed", "duplicate")
        self.trials.append(trial.number)
        if self.stop_at is not None and done >= self.stop_at:
            raise KeyboardInterrupt

    def reported(self, trial):
        self.reports.append(trial.number)

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def store(tmp_path):
    return Store.open(f"sqlite:///{tmp_path / 'autoq.db'}")


@pytest.fixture
def spec(tiny_model_dir):
    def build(**more):
        tree = {
            "model": {"id": str(tiny_model_dir("llama")), "dtype": "float32"},
            "target": {"name": "generic"},
            "space": {"schemes": ["rtn-int2-g32", "rtn-int3-g32", "rtn-int4-g32", "rtn-int8-g32"]},
            "objectives": ["kl_nats_per_token", "size_bytes"],
            "budget": {"trials": 24},
        }
        return build_spec(tree | more)

    return build


def local(evaluator_class=Evaluator, made=None):
    def make(spec):
        def build(spec):
            evaluator = evaluator_class(spec)
            if made is not None:
                made.append(evaluator)
            return evaluator

        return LocalExecutor(spec, build)

    return make


def search(store, spec, stop_at=None, make=None):
    study = create_study(store, spec)
    observer = Recorder(store, stop_at)
    run_study(store, study.id, observer, make or local())
    return study, observer


def history(store, study):
    return [(t.number, t.state, t.origin, t.hash) for t in store.trials(study.id)]


def test_a_study_runs_to_its_end(store, spec):
    study, observer = search(store, spec())
    trials = store.trials(study.id)
    counted = [t for t in trials if t.state in ("complete", "stopped")]
    assert len(counted) == 24
    assert store.study(study.id).state == "finished"
    assert observer.stages == ["load", "calibrate", "quantize", "search", "report"]
    assert {t.origin for t in counted} == {"baseline", "seed", "sampler"}
    origins = [t.origin for t in trials if t.state == "complete"]
    assert origins == sorted(origins, key=["baseline", "seed", "sampler"].index)
    assert {"unquantized", "uniform-int4", "uniform-int8"} <= {t.baseline for t in counted if t.baseline}
    # The stored frontier is the frontier of the stored trials.
    values = [t.values(["kl_nats_per_token", "size_bytes"]) for t in counted]
    expected = {counted[i].number for i in non_dominated(values, ["minimize", "minimize"])}
    assert {t.number for t in store.frontier(study.id)} == expected
    # Frontier and baselines carry report measurements, and nothing else does.
    reported = {t.number for t in trials if ("kl_nats_per_token", "report") in t.measurements}
    assert reported == expected | {t.number for t in counted if t.baseline}
    assert set(observer.reports) == reported


def test_seeds_are_better_than_uniform(store, spec):
    study, _ = search(store, spec())
    seeds = [t for t in store.trials(study.id) if t.origin == "seed"]
    uniform = next(t for t in store.trials(study.id) if t.baseline == "uniform-int4")
    kl, size = uniform.values(["kl_nats_per_token", "size_bytes"])
    assert any(a < kl and b <= size * 1.1 for a, b in (t.values(["kl_nats_per_token", "size_bytes"]) for t in seeds))


@pytest.mark.parametrize("sampler", ["frontier", "nsga2", "tpe", "random", "qmc"])
@pytest.mark.parametrize("workers", [1, 3])
def test_a_resumed_study_proposes_what_the_uninterrupted_one_did(store, spec, sampler, workers):
    fields = {"sampler": {"name": sampler, "seeds": 3, "seed": 5}, "workers": {"count": workers, "executor": "ray"}}
    whole, _ = search(store, spec(**fields))
    study = create_study(store, spec(**fields))
    for stop_at in (2, 9, 15, None):
        observer = Recorder(store, stop_at)
        if stop_at is None:
            run_study(store, study.id, observer, local())
        else:
            with pytest.raises(KeyboardInterrupt):
                run_study(store, study.id, observer, local())
            assert store.study(study.id).state == "interrupted"
    assert history(store, study) == history(store, whole)
    assert [t.number for t in store.frontier(study.id)] == [t.number for t in store.frontier(whole.id)]


@pytest.mark.parametrize("sampler", ["frontier", "nsga2"])
def test_a_finished_study_goes_on_with_a_raised_budget(store, spec, sampler):
    fields = {"sampler": {"name": sampler, "seeds": 3, "seed": 5}}
    whole, _ = search(store, spec(**fields, budget={"trials": 30}))
    study, _ = search(store, spec(**fields, budget={"trials": 20}))
    with pytest.raises(BadInput, match=r"trials must be more than the 20 that study .* has had \(got 20"):
        raise_budget(store, study.id, 20)
    raise_budget(store, study.id, 30)
    observer = Recorder(store)
    run_study(store, study.id, observer, local())
    assert min(observer.trials) >= 20
    assert history(store, study) == history(store, whole)
    assert [t.number for t in store.frontier(study.id)] == [t.number for t in store.frontier(whole.id)]


def test_order_of_completion_does_not_change_the_proposals(store, spec):
    """Three workers that answer in another order give the same study."""

    class Shuffled(LocalExecutor):
        def next(self, timeout=None):
            self._queue.rotate(1)
            return super().next(timeout)

    fields = {"workers": {"count": 3, "executor": "ray"}, "sampler": {"name": "nsga2", "seeds": 2}}
    plain, _ = search(store, spec(**fields))
    shuffled, _ = search(store, spec(**fields), make=lambda spec: Shuffled(spec, Evaluator))
    assert history(store, shuffled) == history(store, plain)


def test_failures_are_recorded_and_the_study_goes_on(store, spec):
    class Failing(Evaluator):
        def __init__(self, spec):
            super().__init__(spec)
            self.fail = {2: MemoryError("no room"), 4: ValueError("odd\nshape"), 7: RuntimeError()}

    study, _ = search(store, spec(), make=local(Failing))
    failed = [t for t in store.trials(study.id) if t.state == "failed"]
    assert [(t.error.type, t.error.message) for t in failed] == [
        ("MemoryError", "no room"),
        ("ValueError", "odd"),
        ("RuntimeError", "RuntimeError"),
    ]
    assert all("Traceback" in t.error.traceback for t in failed)
    assert store.study(study.id).state == "finished"
    assert not {t.number for t in failed} & {t.number for t in store.frontier(study.id)}


def test_a_nan_is_a_failure_with_its_reason(store, spec):
    class Broken(Evaluator):
        def measure(self, assignment, part):
            (one,) = super().measure(assignment, part)
            bad = len(self.calls) % 3 == 0 and part == "search"
            return [Measurement(one.objective, float("nan"), one.unit, one.kind, part)] if bad else [one]

    study, _ = search(store, spec(), make=local(Broken))
    failed = [t for t in store.trials(study.id) if t.state == "failed"]
    assert failed
    assert {t.error.type for t in failed} == {"NotFinite"}


def test_a_study_of_failures_alone_has_failed(store, spec):
    class Hopeless(Evaluator):
        def measure(self, assignment, part):
            raise MemoryError("no room")

    said = "all 24 trials failed, the first with MemoryError: no room"
    with pytest.raises(AutoQError, match=f"^{said}$"):
        search(store, spec(), make=local(Hopeless))
    (study,) = store.studies()
    assert (study.state, study.message, study.failed) == ("failed", said, 24)


@pytest.mark.parametrize(
    ("problem", "kind", "line"),
    [
        (SpecError("target.prompt_tokens: too long"), BadInput, "target.prompt_tokens: too long"),
        (ValueError("odd"), AutoQError, "describe: odd"),
    ],
)
def test_what_a_stage_refuses_is_bad_input_and_what_breaks_it_is_not(store, spec, problem, kind, line):
    class Refusing(Evaluator):
        def describe(self):
            raise problem

    with pytest.raises(AutoQError) as caught:
        search(store, spec(), make=local(Refusing))
    assert (type(caught.value), str(caught.value)) == (kind, line)


def test_what_has_come_is_stored_whatever_the_executor_says_next(store, spec):
    class Gone(LocalExecutor):
        came = 0

        def next(self, timeout=None):
            result = super().next(timeout)
            self.came += result.job.key.startswith("trial")
            return result

        def ready(self):
            if self.came == 5:
                raise AutoQError("the cluster is gone")

    with pytest.raises(AutoQError, match=r"^the cluster is gone$"):
        search(store, spec(), make=lambda spec: Gone(spec, Evaluator))
    (study,) = store.studies()
    assert (study.state, study.complete + study.failed, study.running) == ("failed", 5, 0)


class Crashing(Executor):
    """Reports a dead worker for some trials, as often as told."""

    def __init__(self, spec, deaths):
        self.inner = LocalExecutor(spec, Evaluator)
        self.deaths = dict(deaths)

    def submit(self, job):
        self.inner.submit(job)

    def next(self, timeout=None):
        result = self.inner.next(timeout)
        if result is not None and self.deaths.get(result.job.key, 0) > 0:
            self.deaths[result.job.key] -= 1
            return Result(result.job, None, Failure("WorkerLost", "killed by signal 9", crashed=True))
        return result

    def close(self):
        self.inner.close()


def test_a_crash_is_retried_once_and_then_quarantined(store, spec):
    deaths = {"trial-3": 1, "trial-5": 2}
    study, observer = search(store, spec(), make=lambda spec: Crashing(spec, deaths))
    once, twice = store.trial(study.id, 3), store.trial(study.id, 5)
    assert (once.state, once.attempt) == ("complete", 2)
    assert (twice.state, twice.attempt) == ("failed", 2)
    assert twice.error.message.startswith("quarantined after 2 crashes")
    assert sum("trying once more" in note for note in observer.notes) == 2


def test_a_candidate_that_ends_the_whole_process_is_given_up_in_the_end(store, spec):
    """As a kill by the system's memory guard does: nothing is told to anybody, and every resume dies."""

    class Killed(BaseException):
        pass

    class Deadly(Evaluator):
        def measure(self, assignment, part):
            if any(trial.number == 4 and trial.hash == assignment.hash for trial in store.trials(study.id)):
                raise Killed
            return super().measure(assignment, part)

    study = create_study(store, spec())
    for _ in range(3):
        with pytest.raises(Killed):
            run_study(store, study.id, None, local(Deadly))
        assert store.study(study.id).state == "running"
    run_study(store, study.id, None, local(Deadly))
    trial = store.trial(study.id, 4)
    assert (trial.state, trial.attempt) == ("failed", 3)
    assert trial.error.message == "quarantined: the study's process ended 3 times while it ran"
    assert store.study(study.id).state == "finished"


def test_interrupts_quarantine_nothing(store, spec):
    class Interrupted(Evaluator):
        def measure(self, assignment, part):
            raise KeyboardInterrupt

    study = create_study(store, spec())
    for _ in range(5):
        with pytest.raises(KeyboardInterrupt):
            run_study(store, study.id, None, local(Interrupted))
    run_study(store, study.id, None, local())
    assert not store.trials(study.id, states=["failed"])
    assert store.trial(study.id, 0).attempt == 6


def test_workers_that_cannot_start_end_the_study_with_the_reason(store, spec):
    def make(spec):
        def build(spec):
            raise WorkerLost("no GPU left")

        return LocalExecutor(spec, build)

    study = create_study(store, spec())
    with pytest.raises(AutoQError, match="no GPU left"):
        run_study(store, study.id, None, make)
    record = store.study(study.id)
    assert (record.state, record.message) == ("failed", "no GPU left")
    run_study(store, study.id, None, local())
    assert store.study(study.id).state == "finished"


def test_constraints_decide_feasibility(store, spec):
    free, _ = search(store, spec())
    sizes = [t.values(["size_bytes"])[0] for t in store.trials(free.id) if t.state == "complete"]
    limit = sorted(sizes)[len(sizes) // 2]
    study, _ = search(store, spec(constraints={"size_bytes": {"max": limit}}))
    for trial in store.trials(study.id, states=["complete"]):
        assert trial.feasible == (trial.values(["size_bytes"])[0] <= limit)
    frontier = store.frontier(study.id)
    assert frontier
    assert all(t.values(["size_bytes"])[0] <= limit for t in frontier)
    assert all(t.feasible for t in store.trials(study.id) if t.origin == "seed")


def test_a_constraint_on_something_else_is_measured_too(store, spec):
    study, _ = search(store, spec(constraints={"bits_per_weight": {"max": 5}}))
    trial = store.trials(study.id, states=["complete"])[-1]
    assert ("bits_per_weight", "search") in trial.measurements


@pytest.mark.parametrize("sampler", ["frontier", "evolution", "nsga2"])
def test_the_smallest_within_a_bound_on_a_quality_that_is_no_objective(store, spec, sampler):
    """The bounded quality steers the sampler although the frontier is one of sizes alone."""
    whole, _ = search(store, spec(budget={"trials": 96}, name="both"))
    bound = 0.5
    reached = [t.values(["size_bytes", "kl_nats_per_token"]) for t in store.trials(whole.id, states=["complete"])]
    known = min(size for size, kl in reached if kl <= bound)
    fields = {"objectives": ["size_bytes"], "constraints": {"kl_nats_per_token": {"max": bound}}}
    study, _ = search(store, spec(**fields, sampler={"name": sampler}, budget={"trials": 40}))
    (best, *others) = store.frontier(study.id)
    assert all(t.values(["size_bytes"]) == best.values(["size_bytes"]) for t in others)
    assert best.measurements["kl_nats_per_token", "search"].value <= bound
    (size,) = best.values(["size_bytes"])
    assert size <= known * (1.005 if sampler == "frontier" else 1.1)


def test_a_tiny_space_is_searched_to_its_end(store, spec):
    fields = {
        "space": {"schemes": ["rtn-int2-g32", "rtn-int8-g32"], "exclude": ["*mlp*", "*layers.1*"]},
        "sampler": {"name": "exhaustive", "seeds": 0},
        "budget": {"trials": 100},
    }
    study, observer = search(store, spec(**fields))
    searched = store.trials(study.id, states=["complete"])
    inside = {t.hash for t in searched if t.origin != "baseline"}
    assert len(inside) >= 14
    assert any("every assignment" in note for note in observer.notes)


def test_nothing_is_evaluated_twice(store, spec):
    made = []
    fields = {"space": {"schemes": ["rtn-int2-g32", "rtn-int8-g32"], "exclude": ["*mlp*", "*layers.1*"]}}
    study, _ = search(store, spec(**fields, sampler={"name": "random", "seeds": 2}), make=local(made=made))
    measured = [call for call in made[0].calls if call[0] == "search"]
    assert len(measured) == len(set(measured))
    duplicates = store.trials(study.id, states=["duplicate"])
    assert duplicates
    assert all(store.trial(study.id, t.duplicate_of).hash == t.hash for t in duplicates)


def test_report_points_bound_the_report(store, spec):
    study, _ = search(store, spec(budget={"trials": 24, "report_points": 3}))
    trials = store.trials(study.id)
    reported = [t for t in trials if ("kl_nats_per_token", "report") in t.measurements and not t.baseline]
    # Baselines are measured anyway, and take no places of those that were found.
    assert sum(t.on_frontier and not t.baseline for t in trials) > 3
    assert len(reported) == 3


def test_wall_time_ends_the_search_and_still_reports(store, spec):
    study, observer = search(store, spec(budget={"trials": 1000, "wall_time": 3}))
    assert store.study(study.id).state == "finished"
    done = len(store.trials(study.id, states=["complete"]))
    assert 1 <= done < 1000
    assert observer.notes == [f"the wall time is over after {done} of 1000 trials"]
    assert all(("kl_nats_per_token", "report") in t.measurements for t in store.frontier(study.id))


@pytest.mark.parametrize(
    ("more", "fragment"),
    [
        ({"objectives": ["cosine_distance"]}, "cosine_distance does not fit"),
        ({"objectives": ["kl_nats_per_token", "latency_decode_ms"]}, "target generic does not time latency_decode_ms"),
        ({"sampler": {"name": "gp", "options": {"nonsense": 1}}}, "nonsense"),
        ({"sampler": {"name": "exhaustive"}}, "exhaustive"),
        ({"space": {"schemes": ["rtn-int4-g48"]}}, "g48"),
        ({"model": {"id": "/no/such/folder"}}, "/no/such/folder"),
        ({"data": {"source": "/no/such/text"}}, "/no/such/text"),
        ({"constraints": {"size_bytes": {"max": 1000}}}, "constraints.size_bytes.max: 1000 bytes are out of reach"),
        ({"constraints": {"size_bytes": {"min": "1GB"}}}, "constraints.size_bytes.min: 1000000000 bytes are out"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_is_written(store, spec, more, fragment):
    with pytest.raises(BadInput) as caught:
        create_study(store, spec(**more))
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)
    assert store.studies() == []
