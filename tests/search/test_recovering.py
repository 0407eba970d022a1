"""Recovering a trial of a real study of a tiny model: better, of the same bytes, and no trial like those proposed."""

from __future__ import annotations

import shutil

import pytest

import autoq.trained
from autoq.assignment import Assignment
from autoq.errors import AutoQError, BadInput, NotFound
from autoq.evaluation import Evaluator
from autoq.scheme import parse_scheme
from autoq.search import holding
from autoq.search.controller import create_study, raise_budget, run_study
from autoq.search.observer import Observer
from autoq.search.offers import offer
from autoq.search.recovering import Training, recover_trial
from autoq.service import jobs, runner
from autoq.spec import Bound, build_spec
from autoq.store import Store

KL, SIZE = "kl_nats_per_token", "size_bytes"


class Notes(Observer):
    """What was said."""

    def __init__(self):
        self.notes, self.steps = [], []

    def note(self, text):
        self.notes.append(text)

    def trained(self, step, steps, loss, seconds_left):
        self.steps.append((step, steps))


@pytest.fixture(scope="module")
def finished(tiny_model_dir, tmp_path_factory):
    """A folder with the database of a finished study; its schemes are trained in all the ways that there are."""
    folder = tmp_path_factory.mktemp("recovering")
    text = folder / "text.txt"
    text.write_text("".join(f"{i} times {i % 7} makes {i * (i % 7)}, as everybody knows.\n" for i in range(200)))
    spec = {
        "name": "tiny",
        "model": {"id": str(tiny_model_dir("llama")), "dtype": "float32"},
        "data": {
            "source": str(text),
            "calibration_tokens": 128,
            "search_tokens": 128,
            "report_tokens": 256,
            "window_tokens": 64,
        },
        "target": {"name": "generic"},
        "space": {"schemes": ["rtn-int2-g32", "hqq-int2-g32-rz", "kmeans2-channel", "rtn-fp8-channel"]},
        "objectives": [KL, SIZE],
        "sampler": {"name": "random", "seeds": 0},
        "budget": {"trials": 12, "stop_confidence": None},
        "workers": {"cpus": 1},
    }
    with pytest.MonkeyPatch.context() as patch, Store.open(str(folder / "autoq.db")) as store:
        patch.setenv("AUTOQ_CACHE", str(folder / "cache"))
        run_study(store, create_study(store, build_spec(spec)).id)
    return folder


@pytest.fixture
def made(finished, tmp_path, monkeypatch):
    """(store, study) of a finished study, and a cache, that a test may change."""
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    with Store.open(str(tmp_path / "autoq.db")) as store:
        yield store, store.study("tiny")


def mixed(store, study):
    """A trial that holds layers of integers, codebooks and others."""
    for trial in store.trials(study.id, states=["complete"], with_assignments=True):
        kinds = {type(scheme).__name__ for scheme in trial.assignment.values()}
        if kinds >= {"Integer", "Codebook", "Float"}:
            return trial
    raise AssertionError("no such trial")


def test_a_trained_trial_is_better_at_the_same_bytes_and_is_a_trial_of_its_own(made):
    store, study = made
    parent, notes = mixed(store, study), Notes()
    found = recover_trial(store, study.id, parent.number, Training(30, rate=3.0), notes)
    last = max(trial.number for trial in store.trials(study.id))
    assert (found.number, found.origin, found.state, found.parent) == (last, "recover", "complete", parent.number)
    assert notes.steps == [(step, 30) for step in range(1, 31)]
    before = recover_report(store, study, parent)
    assert found.measurements[KL, "search"].value < parent.measurements[KL, "search"].value
    assert found.measurements[KL, "report"].value < before
    assert found.measurements[SIZE, "search"].value == parent.measurements[SIZE, "search"].value
    # Schemes are the parent's, and what can be trained of it was.
    assert dict(found.assignment) == dict(parent.assignment)
    trainable = {n for n, s in parent.assignment.items() if type(s).__name__ in ("Integer", "Codebook")}
    assert set(found.assignment.trained) == trainable
    assert found.hash == found.assignment.hash != parent.hash
    assert store.find(study.id, parent.hash).number == parent.number
    assert found.derivation["steps"] == 30
    losses = found.derivation["losses"]
    assert losses[str(found.derivation["kept_step"])] == min(losses.values()) < losses["0"]
    # The frontier is that of all trials.
    assert [t.number for t in store.frontier(study.id)] == store.recompute_frontier(study.id)
    assert store.study(study.id).state == "finished"
    assert list((autoq.trained.cache_dir() / "recovery").glob("*")) == []
    told = found.to_json()
    assert told["parent"] == parent.number
    assert told["assignment"] == {name: str(scheme) for name, scheme in parent.assignment.items()}


def test_blocks_are_trained_one_after_the_other_and_what_comes_is_a_trial_like_any(made):
    store, study = made
    parent, notes = mixed(store, study), Notes()
    found = recover_trial(store, study.id, parent.number, Training(20, how="blocks"), notes)
    assert (found.origin, found.state, found.parent) == ("recover", "complete", parent.number)
    assert notes.steps == [(step, 40) for step in range(1, 41)]
    assert found.measurements[KL, "search"].value < parent.measurements[KL, "search"].value
    assert found.measurements[SIZE, "search"].value == parent.measurements[SIZE, "search"].value
    assert dict(found.assignment) == dict(parent.assignment)
    inside = {
        n for n, s in parent.assignment.items() if type(s).__name__ in ("Integer", "Codebook") and ".layers." in n
    }
    assert set(found.assignment.trained) == inside
    told = found.derivation
    assert (told["how"], told["steps"], len(told["errors"])) == ("blocks", 20, 2)
    assert all(after <= before for before, after, _ in told["errors"])
    assert told["losses"]["20"] < told["losses"]["0"]
    assert list((autoq.trained.cache_dir() / "recovery").glob("*")) == []


def recover_report(store, study, parent):
    """The parent's quality on the report part, which is measured of frontier points and baselines alone."""
    evaluator = Evaluator(study.study_spec())
    return evaluator.measure(parent.assignment, "report")[0].value


def test_what_is_stored_is_what_was_measured_wherever_the_database_is_taken(made, tmp_path, monkeypatch):
    store, study = made
    parent = mixed(store, study)
    found = recover_trial(store, study.id, parent.number, Training(10))
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "another-machine"))
    evaluator = Evaluator(study.study_spec())
    with pytest.raises(
        AutoQError, match=r"^layer \S+ was trained or made in sequence, and its weights [0-9a-f]{12}… are not on this"
    ):
        evaluator.measure(found.assignment, "search")
    autoq.trained.place(found.assignment, store.trained_layers)
    # With hidden states of the parent kept: what was trained must not be taken for it.
    first = evaluator.measure(parent.assignment, "search")[0]
    again = evaluator.measure(found.assignment, "search")[0]
    assert first.value == parent.measurements[KL, "search"].value
    assert again.value == found.measurements[KL, "search"].value
    layers = evaluator.layers(found.assignment)
    assert all(layer.nbytes == evaluator.info.layer(name).nbytes(layer.scheme) for name, layer in layers.items())


def test_damaged_layers_are_refused(made):
    store, study = made
    found = recover_trial(store, study.id, mixed(store, study).number, Training(5))
    name, digest = next(iter(found.assignment.trained.items()))
    path = autoq.trained.path_of(digest)
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(AutoQError, match="are damaged"):
        Evaluator(study.study_spec()).layers(found.assignment, [name])


def test_the_same_training_is_the_same_trial_and_another_seed_another(made):
    store, study = made
    parent, notes = mixed(store, study), Notes()
    first = recover_trial(store, study.id, parent.number, Training(6))
    again = recover_trial(store, study.id, parent.number, Training(6), notes)
    assert again.number == first.number
    assert f"this is trial {first.number}, which was made likewise before" in notes.notes
    other = recover_trial(store, study.id, parent.number, Training(6, seed=1))
    assert other.hash != first.hash
    # What was trained can be trained further.
    further = recover_trial(store, study.id, first.number, Training(6))
    assert further.parent == first.number
    assert further.derivation["losses"]["0"] == pytest.approx(min(first.derivation["losses"].values()))


def test_no_sampler_hears_of_it_and_numbers_go_on(made, tmp_path):
    """The study goes on to more trials exactly as one that was never recovered does."""
    store, study = made

    def go_on():
        raise_budget(store, study.id, 16)
        run_study(store, study.id)
        return [t for t in store.trials(study.id) if t.parent is None]

    parent = mixed(store, study)
    recover_trial(store, study.id, parent.number, Training(5))
    went_on = [t.hash for t in go_on()]
    with Store.open(str(tmp_path / "plain.db")) as plain:
        other = create_study(plain, build_spec({**study.spec, "budget": {**study.spec["budget"], "trials": 16}}))
        run_study(plain, other.id)
        expected = [t.hash for t in plain.trials(other.id)]
    assert went_on == expected
    numbers = [t.number for t in store.trials(study.id)]
    assert numbers == list(range(len(expected) + 1))


def test_a_recovered_trial_that_was_running_when_its_process_was_killed_is_measured_again(made, tmp_path, monkeypatch):
    store, study = made
    found = recover_trial(store, study.id, mixed(store, study).number, Training(5))
    with store._database.writing() as connection:
        connection.exec_driver_sql(f"update trials set state = 'running', checksum = null where id = {found.id}")
        connection.exec_driver_sql(f"delete from measurements where trial_id = {found.id}")
        connection.exec_driver_sql(f"delete from token_values where trial_id = {found.id}")
        connection.exec_driver_sql(f"delete from frontier where trial_id = {found.id}")
    store.set_state(study.id, "running")
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "another-machine"))
    run_study(store, study.id)
    again = store.trial(study.id, found.number)
    assert again.state == "complete"
    assert again.measurements[KL, "search"].value == found.measurements[KL, "search"].value
    assert [t.number for t in store.frontier(study.id)] == store.recompute_frontier(study.id)


def test_the_model_behind_offers_learns_nothing_from_it(made):
    store, study = made
    store.put_table(study.id, "sensitivity", sensitivity(study))
    bounds = {SIZE: Bound(max=mixed(store, study).measurements[SIZE, "search"].value)}
    before = offer(store, study, bounds)
    recover_trial(store, study.id, mixed(store, study).number, Training(5))
    assert offer(store, study, bounds) == before


def sensitivity(study):
    evaluator = Evaluator(study.study_spec())
    texts = study.spec["space"]["schemes"]
    return evaluator.sensitivities({layer.name: texts for layer in evaluator.info.layers if layer.kind == "linear"})


@pytest.mark.parametrize(
    ("training", "message"),
    [
        (Training(0), r"^steps must be from 1 to 1000000 \(got 0\)$"),
        (Training(5, how="layers"), r"^how must be one of model, blocks \(got 'layers'\)$"),
        (Training(5, windows=0), r"^windows must be from 1 to 1000000 \(got 0\)$"),
        (Training(5, tokens=0), r"^tokens must be at least 1 \(got 0\)$"),
        (Training(5, rate=0.0), r"^rate must be above 0"),
        (Training(5, rate=float("nan")), r"^rate must be above 0"),
        (Training(5, seed=-1), r"^seed must be from 0"),
    ],
)
def test_trainings_that_cannot_be_are_refused(made, training, message):
    store, study = made
    with pytest.raises(BadInput, match=message):
        recover_trial(store, study.id, 0, training)


def test_trials_that_cannot_be_trained_are_refused(made):
    store, study = made
    count = len(store.trials(study.id))
    with pytest.raises(NotFound, match="has no trial 99"):
        recover_trial(store, study.id, 99, Training(5))
    kept = next(t for t in store.trials(study.id) if t.baseline == "unquantized")
    with pytest.raises(BadInput, match=f"trial {kept.number} of 'tiny' has nothing to train: integer schemes and code"):
        recover_trial(store, study.id, kept.number, Training(5))
    store.set_state(study.id, "interrupted")
    with pytest.raises(BadInput, match="is interrupted and cannot be added to; first: autoq resume tiny"):
        recover_trial(store, study.id, mixed(store, study).number, Training(5))
    assert len(store.trials(study.id)) == count


def test_a_training_that_gains_nothing_makes_no_trial(made):
    store, study = made
    count = len(store.trials(study.id))
    with pytest.raises(AutoQError, match="nothing was gained: in 2 steps"):
        recover_trial(store, study.id, mixed(store, study).number, Training(2, rate=900.0))
    assert len(store.trials(study.id)) == count
    assert store.study(study.id).state == "finished"


def test_text_that_is_all_in_parts_leaves_the_calibration_part(made, tmp_path):
    store, study = made
    assignment = mixed(store, study).assignment
    from autoq.calibration.text import recovery_windows
    from autoq.recovery.trainer import recovery_data

    spec = study.study_spec()
    evaluator = Evaluator(spec)
    free = recovery_windows(spec.data, evaluator.model.tokenizer, evaluator.info.max_positions)
    used = [evaluator.parts.calibration, evaluator.parts.search, evaluator.parts.report]
    taken = {tuple(window.tolist()) for part in used for window in part}
    assert len(free) > 20
    assert not taken & {tuple(window.tolist()) for window in free}
    notes = []
    assert len(recovery_data(evaluator, 200, notes.append)) == 4
    assert notes == []
    all_of_it = spec.data.model_copy(update={"report_tokens": 64 * (len(free) + 3)})
    evaluator.spec = spec.model_copy(update={"data": all_of_it})
    assert recovery_data(evaluator, None, notes.append) is evaluator.parts.calibration
    assert notes == ["all data are in the study's parts; training on the calibration part"]
    assert assignment


def test_an_assignment_names_what_was_trained_of_it():
    digest = "0123456789abcdef0123456789abcdef01234567"
    schemes = {"a": parse_scheme("rtn-int3-g32"), "b": parse_scheme("keep")}
    plain, trained = Assignment(schemes), Assignment(schemes, {"a": digest})
    assert plain.hash != trained.hash
    assert plain != trained
    assert Assignment.from_json(trained.json) == trained
    assert trained.to_dict() == {"a": f"rtn-int3-g32#{digest}", "b": "keep"}
    assert trained.untrained() == plain.to_dict() == {"a": "rtn-int3-g32", "b": "keep"}
    assert trained.short_text("a") == "rtn-int3-g32#01234567"
    for wrong in ("", "xyz", digest[:-1], digest + "0", "../../etc/passwd"):
        with pytest.raises(BadInput, match="must be a digest of 40 hex digits"):
            Assignment.from_dict({"a": f"rtn-int3-g32#{wrong}"})


def test_a_training_in_the_queue_gives_way_and_goes_on_to_the_same_end(made, monkeypatch):
    store, study = made
    monkeypatch.setenv("AUTOQ_DB", store.address)
    monkeypatch.setattr(holding, "LOOK_SECONDS", 0.0)
    parent = mixed(store, study)
    had = len(store.trials(study.id))

    taken = []

    class Asks(Observer):
        def trained(self, step, steps, loss, seconds_left):
            taken.append(step)
            if step in asked:
                store.queue.ask(study.id, asked[step])

    monkeypatch.setattr(runner, "_log", Asks)
    asked = {5: "yield"}
    jobs.recover(store, study.id, parent.number, {"steps": 12, "rate": 3.0})
    assert store.study(study.id).state == "queued"
    assert runner.run(store, study.id) == 0
    assert (store.study(study.id).state, len(store.trials(study.id))) == ("queued", had)
    asked.clear()
    assert runner.run(store, study.id) == 0
    assert taken == [*range(1, 6), *range(6, 13)]
    (found,) = store.trials(study.id, with_assignments=True)[had:]
    assert (store.study(study.id).state, found.state, found.parent) == ("finished", "complete", parent.number)
    # The same as without a break, and cancelled is finished again.
    again = recover_trial(store, study.id, parent.number, Training(12, rate=3.0))
    assert again.number == found.number
    asked[2] = "cancel"
    jobs.recover(store, study.id, parent.number, {"steps": 13})
    assert runner.run(store, study.id) == 0
    assert (store.study(study.id).state, len(store.trials(study.id))) == ("finished", had + 1)
    # What goes wrong is said on the study, which stays finished.
    keep = next(t for t in store.trials(study.id) if t.baseline == "unquantized")
    with pytest.raises(BadInput, match="has nothing to train"):
        jobs.recover(store, study.id, keep.number, {"steps": 3})
    training = {"steps": 3}
    store.queue.enqueue(study.id, job={"kind": "recover", "trial": keep.number, "training": training})
    assert runner.run(store, study.id) == 1
    record = store.study(study.id)
    assert record.state == "finished"
    assert record.message.startswith(f"recover: trial {keep.number} of 'tiny' has nothing to train: ")
    assert not store.queue.lease(study.id).live
