"""Scales of inputs that are folded: searched, exported as plain checkpoints of each runtime, read back and verified."""

from __future__ import annotations

import pytest

from autoq.scheme import Keep
from autoq.search.controller import create_study, run_study
from autoq.search.sequencing import sequence_trial
from autoq.shipping.export import export
from autoq.shipping.verify import verify
from autoq.spec import build_spec
from autoq.store import Store

KL, SIZE = "kl_nats_per_token", "size_bytes"


@pytest.fixture(scope="module", params=["vllm", "onnxruntime"])
def finished(request, trained_models, trained_model_dir, tmp_path_factory):
    """A finished study whose every layer has folded scales or is kept."""
    folder = tmp_path_factory.mktemp("folded-study")
    (folder / "text.txt").write_text(trained_models.documentation())
    spec = {
        "name": "folded",
        "model": {"id": str(trained_model_dir("llama")), "dtype": "bfloat16" if request.param == "vllm" else "float32"},
        "data": {
            "source": str(folder / "text.txt"),
            **{f"{part}_tokens": 512 for part in ("calibration", "search", "report")},
            "window_tokens": 64,
        },
        "target": {"name": request.param},
        "space": {"methods": ["awq", "keep"], "bits": [4], "group_size": [32], "zero_points": ["integer"]},
        "objectives": [KL, SIZE],
        "sampler": {"name": "random", "seeds": 0},
        "budget": {"trials": 12, "stop_confidence": None},
        "workers": {"cpus": 1},
    }
    with pytest.MonkeyPatch.context() as patch, Store.open(str(folder / "autoq.db")) as store:
        patch.setenv("AUTOQ_CACHE", str(folder / "cache"))
        study = create_study(store, build_spec(spec))
        run_study(store, study.id)
        yield store, store.study(study.id)


@pytest.fixture
def trial(finished):
    """The smallest of all trials whose layers are folded or kept."""
    store, study = finished
    own = [
        trial
        for trial in store.trials(study.id, states=("complete",), with_assignments=True)
        if {str(scheme) for scheme in trial.assignment.values()} == {"keep", "awq-int4-g32-fold"}
    ]
    return min(own, key=lambda trial: trial.measurements[SIZE, "search"].value)


def test_a_folded_trial_is_what_was_measured_in_its_runtime(finished, trial, tmp_path):
    store, study = finished
    assert sum(scheme != Keep() for scheme in trial.assignment.values()) >= 5
    own = study.study_spec().target.name
    for target in (own, "torch-cpu") if own == "vllm" else (own,):
        manifest = export(store, study, store.trial(study.id, trial.number), tmp_path / target, target)
        report = verify(tmp_path / target, latency=False)
        assert report.ok, [check for check in report.checks if check.ok is False]
        assert {"bytes", "formats", "outputs", KL} <= {check.name for check in report.checks if check.ok}
        if target == own:
            assert manifest.size_bytes == trial.measurements[SIZE, "search"].value


def test_a_folded_trial_in_sequence_ships_too(finished, trial, tmp_path):
    store, study = finished
    found = sequence_trial(store, study.id, trial.number)
    assert found.measurements[SIZE, "search"].value == trial.measurements[SIZE, "search"].value
    export(store, study, found, tmp_path / "out")
    report = verify(tmp_path / "out", latency=False)
    assert report.ok, [check for check in report.checks if check.ok is False]
