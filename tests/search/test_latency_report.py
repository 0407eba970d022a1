"""Latencies of a study: one table per device, kept for later studies, and reports at its speed."""

import pytest

from autoq.measurement import Measurement
from autoq.search.controller import create_study, run_study
from autoq.search.executors import LocalExecutor
from autoq.search.observer import Observer
from autoq.search.reporting import at_table_speed
from autoq.spec import build_spec
from autoq.store import Store
from autoq.targets import UNQUANTIZED, CostTable

DECODE = "latency_decode_ms"


class Evaluator:
    """Times whatever it is asked to: 1 ms a layer, 2 ms unless kept, on a machine of `speed`."""

    device, speed, tables, drift = "machine A", 1.0, 0, 0.0

    def __init__(self, spec):
        self.spec = spec

    def describe(self):
        return {"device": type(self).device, "threads": 1}

    def measure(self, assignment, part):
        return []

    def cost_table(self, choices):
        type(self).tables += 1
        layers = {name: {text: 1.0 if text == "keep" else 2.0 for text in texts} for name, texts in choices.items()}
        detail = {UNQUANTIZED: {DECODE: 5.0 + len(layers)}, "drift": {DECODE: type(self).drift}}
        return CostTable(type(self).device, {DECODE: 5.0}, {DECODE: layers}, detail)

    def time(self, assignment):
        slow = 1 / type(self).speed
        quantized = sum(str(scheme) != "keep" for scheme in assignment.values())
        value = (5.0 + len(assignment) + quantized) * slow
        detail = {UNQUANTIZED: (5.0 + len(assignment)) * slow}
        return [Measurement(DECODE, value, "ms", "measured", "report", 0.1 * slow, 3, type(self).device, detail)]


class Notes(Observer):
    """What the study had to say."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.fixture
def run(tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(Evaluator, "tables", 0)
    store = Store.open(str(tmp_path / "autoq.db"))

    def run(**more):
        tree = {
            "model": {"id": str(tiny_model_dir("llama"))},
            "objectives": ["size_bytes", DECODE],
            "space": {"schemes": ["rtn-int4-g32", "keep"]},
            "budget": {"trials": 6},
        }
        notes = Notes()
        study = create_study(store, build_spec(tree | more))
        run_study(store, study.id, notes, lambda spec: LocalExecutor(spec, Evaluator))
        return store.trials(study.id, states=["complete"]), notes.notes

    yield run
    store.close()


def test_a_later_study_takes_the_table_of_an_earlier_one(run):
    run()
    assert Evaluator.tables == 1
    run(budget={"trials": 4})
    assert Evaluator.tables == 1


@pytest.mark.parametrize(
    "more",
    [
        {"target": {"prompt_tokens": 64}},
        {"space": {"schemes": ["rtn-int4-g32", "rtn-int4-g32-sym", "keep"]}},
        {"model_dtype": "float32"},
    ],
)
def test_what_a_table_does_not_cover_is_timed(run, more, tiny_model_dir):
    run()
    if "model_dtype" in more:
        model = {"id": str(tiny_model_dir("llama")), "dtype": "float32"}
        more = {"model": model, "space": {"schemes": ["rtn-int8-channel-sym-a8dyn", "keep"]}}
    run(**more)
    assert Evaluator.tables == 2


def test_another_device_times_its_own(run, monkeypatch):
    run()
    monkeypatch.setattr(Evaluator, "device", "machine B")
    run()
    assert Evaluator.tables == 2


def test_a_table_of_a_restless_machine_is_used_said_and_not_handed_on(run, monkeypatch):
    monkeypatch.setattr(Evaluator, "drift", 0.3)
    trials, notes = run()
    assert trials
    assert any("speed moved by 30% while latencies were timed" in note for note in notes)
    monkeypatch.setattr(Evaluator, "drift", 0.2)
    _, notes = run()
    assert Evaluator.tables == 2
    assert notes == []
    run()
    assert Evaluator.tables == 2


def test_a_slower_machine_reports_the_same(run, monkeypatch):
    fast, _ = run()
    monkeypatch.setattr(Evaluator, "speed", 0.5)
    slow, _ = run()
    values = [[t.measurements[DECODE, "report"].value for t in trials if t.baseline] for trials in (fast, slow)]
    assert values[0] == pytest.approx(values[1])
    one = next(t for t in slow if t.baseline == "uniform-int4").measurements[DECODE, "report"]
    assert one.detail["clock_ms"] == pytest.approx(2 * one.value)
    assert one.detail["predicted_ms"] == pytest.approx(one.value)
    assert one.stderr == pytest.approx(0.1 / 2**0.5)


def test_timings_of_another_device_are_left_out_and_said(run, monkeypatch):
    def elsewhere(self, assignment):
        return [Measurement(DECODE, 1.0, "ms", "measured", "report", 0.1, 3, "machine B", {UNQUANTIZED: 1.0})]

    monkeypatch.setattr(Evaluator, "time", elsewhere)
    trials, notes = run()
    assert all((DECODE, "report") not in trial.measurements for trial in trials)
    assert any("timed on machine B, not on the device of the study's table" in note for note in notes)


def test_a_measurement_with_nothing_beside_it_stays_as_it_is():
    alone = Measurement(DECODE, 3.0, "ms", "measured", "report", 0.1)
    assert at_table_speed(alone, {"detail": {UNQUANTIZED: {DECODE: 6.0}}}) is alone
    assert at_table_speed(alone, None) is alone
