"""A whole study with everything real: a tiny model, the real kernels, the real store."""

import pytest

from autoq.models import inspect as inspect_model
from autoq.search.controller import create_study, run_study
from autoq.spec import build_spec
from autoq.store import Store
from autoq.store.dominance import non_dominated

OBJECTIVES = ["kl_nats_per_token", "size_bytes", "latency_decode_ms"]


@pytest.fixture
def spec(brief_timings, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    return build_spec(
        {
            "model": {"id": str(tiny_model_dir("llama"))},
            "data": {"calibration_tokens": 128, "search_tokens": 128, "report_tokens": 128, "window_tokens": 64},
            "target": {"name": "torch-cpu", "prompt_tokens": 16, "threads": 1},
            "space": {"schemes": ["rtn-int4-g32", "rtn-int8-channel-sym", "rtn-int8-channel-sym-a8dyn", "keep"]},
            "objectives": OBJECTIVES,
            "budget": {"trials": 16, "report_points": 4},
            "workers": {"cpus": 1},
        }
    )


def test_from_spec_to_reported_frontier(spec, tmp_path):
    store = Store.open(f"sqlite:///{tmp_path}/autoq.db")
    study = create_study(store, spec)
    run_study(store, study.id)
    trials = store.trials(study.id, states=["complete"])
    assert len(trials) == 16
    for trial in trials:
        kinds = {name: m.kind for (name, part), m in trial.measurements.items() if part == "search"}
        assert kinds == dict(zip(OBJECTIVES, ["measured", "computed", "predicted"], strict=True))
    values = [trial.values(OBJECTIVES) for trial in trials]
    expected = {trials[i].number for i in non_dominated(values, ["minimize"] * 3)}
    assert {trial.number for trial in store.frontier(study.id)} == expected
    timed = [t for t in trials if ("latency_decode_ms", "report") in t.measurements]
    assert {t.number for t in trials if t.baseline} <= {t.number for t in timed}
    for trial in timed:
        latency = trial.measurements["latency_decode_ms", "report"]
        assert latency.kind == "measured"
        assert latency.value > 0
        assert len(latency.detail["sweeps"]) == 2
        assert latency.detail["threads"] == 1
        assert latency.device
        assert ("kl_nats_per_token", "report") in trial.measurements
    # The unquantized model is at zero, and what the table predicts for it was measured on it.
    unquantized = next(t for t in trials if t.baseline == "unquantized")
    assert abs(unquantized.measurements["kl_nats_per_token", "search"].value) < 1e-4
    # Running it again finds nothing left to do.
    before = [t.to_json() for t in store.trials(study.id)]
    run_study(store, study.id)
    assert [t.to_json() for t in store.trials(study.id)] == before


def test_a_second_study_of_the_same_model_quantizes_nothing_again(spec, tmp_path, monkeypatch):
    store = Store.open(f"sqlite:///{tmp_path}/autoq.db")
    run_study(store, create_study(store, spec).id)
    from autoq.methods.rtn import RoundToNearest

    def never(*_):
        raise AssertionError("quantized again")

    monkeypatch.setattr(RoundToNearest, "quantize", never)
    again = create_study(store, spec)
    run_study(store, again.id)
    assert {t.state for t in store.trials(again.id)} <= {"complete", "duplicate"}


def test_a_space_that_mixes_pruned_and_dense_schemes(spec, tmp_path):
    tree = spec.model_dump(mode="json")
    schemes = ["rtn-int4-g16", "wanda24-int4-g16", "wanda50-int8-channel-sym", "magnitude30", "keep"]
    tree |= {"target": {"name": "generic"}, "space": {"schemes": schemes}, "objectives": OBJECTIVES[:2]}
    tree["sampler"]["name"] = "random"  # which tries them all, good or not
    store = Store.open(f"sqlite:///{tmp_path}/autoq.db")
    study = create_study(store, build_spec(tree))
    run_study(store, study.id)
    trials = store.trials(study.id, states=["complete"], with_assignments=True)
    assert len(trials) == 16
    used = {str(scheme) for trial in trials if trial.baseline is None for scheme in trial.assignment.values()}
    assert set(schemes) <= used
    info = inspect_model(build_spec(tree).model)
    for trial in trials:
        expected = info.other_bytes + sum(layer.nbytes(trial.assignment[layer.name]) for layer in info.layers)
        assert trial.measurements["size_bytes", "search"].value == expected
        assert trial.measurements["kl_nats_per_token", "search"].value >= -1e-6
    assert {trial.number for trial in store.frontier(study.id)} <= {trial.number for trial in trials}
