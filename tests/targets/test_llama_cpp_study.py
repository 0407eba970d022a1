"""A study on llama.cpp with everything real: presets as baselines, latencies by llama.cpp, exports that hold."""

from __future__ import annotations

import pytest

from autoq.evaluation import Evaluator
from autoq.search.controller import create_study, run_study
from autoq.search.setup import pose
from autoq.spec import build_spec
from autoq.store import Store

OBJECTIVES = ["kl_nats_per_token", "size_bytes", "latency_decode_ms", "latency_prefill_ms"]


@pytest.fixture
def spec(steady_costs, tiny_model_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    return build_spec(
        {
            "model": {"id": str(tiny_model_dir("llama-tied")), "dtype": "float32"},
            "data": {"calibration_tokens": 128, "search_tokens": 128, "report_tokens": 256, "window_tokens": 64},
            "target": {"name": "llama-cpp", "prompt_tokens": 16, "threads": 1},
            "space": {"kinds": ["linear", "head"], "schemes": ["gguf-q4_0-im", "gguf-q5_0", "gguf-q8_0", "gguf-f16"]},
            "objectives": OBJECTIVES,
            "budget": {"trials": 12, "report_points": 3},
            "workers": {"cpus": 1},
        }
    )


def test_presets_are_baselines_where_layers_are_searched(spec):
    problem = pose(spec)
    mix = problem.target.presets(problem.info)["q4_k_m"]
    assignment = problem.space.assignment_of(mix)
    assert {str(assignment[name]) for name in problem.space.choices} == {"gguf-q5_0", "gguf-q8_0"}
    narrow = pose(spec.model_copy(update={"space": spec.space.model_copy(update={"exclude": ("lm_head",)})}))
    assert str(narrow.space.assignment_of(mix)["lm_head"]) == "keep"


@pytest.mark.slow
def test_from_spec_to_files_that_keep_their_promise(spec, tmp_path):
    store = Store.open(f"sqlite:///{tmp_path}/autoq.db")
    study = create_study(store, spec)
    run_study(store, study.id)
    trials = store.trials(study.id, states=["complete"], with_assignments=True)
    assert len(trials) == 12
    names = {trial.baseline for trial in trials if trial.baseline}
    assert {"unquantized", "f16", "q8_0", "q4_0"} <= names
    for trial in trials:
        kinds = [trial.measurements[name, "search"].kind for name in OBJECTIVES]
        assert kinds == ["measured", "computed", "predicted", "predicted"]
    timed = [trial for trial in trials if ("latency_decode_ms", "report") in trial.measurements]
    assert timed
    assert all(t.measurements["latency_decode_ms", "report"].kind == "measured" for t in timed)
    point = next(trial for trial in store.frontier(study.id, with_assignments=True) if trial.baseline is None)
    evaluator = Evaluator(spec)
    target, folder = evaluator.target, tmp_path / "export"
    folder.mkdir()
    weights = {name: evaluator.quantized(name, scheme) for name, scheme in point.assignment.items()}
    target.export(evaluator.model, weights, folder, evaluator.statistics)
    size = point.measurements["size_bytes", "search"].value
    assert (folder / "model.gguf").stat().st_size == pytest.approx(size, rel=0.005)
    with target.reload(folder, threads=1) as runtime:
        assert runtime.differences(point.assignment) == []
        compared = evaluator.compare(point.assignment, runtime.outputs)
    assert compared.apart < 1e-4  # two blocks, and 32 numbers a row, leave no room for noise to grow
    here, there = compared.here[0], compared.there[0]
    assert abs(here.value - there.value) <= max(there.stderr or 0.0, 1e-5)
