"""What every target that exports promises: what it writes, its runtime loads, and it is what was searched."""

from __future__ import annotations

import pytest

from autoq import plugins
from autoq.scheme import Keep
from autoq.search.controller import create_study, run_study
from autoq.shipping import manifest as files
from autoq.shipping.export import export, exporting_targets
from autoq.shipping.verify import verify
from autoq.spec import build_spec
from autoq.store import Store
from autoq.targets import Target

TARGETS = exporting_targets()
# Their own studies measure what they can time too.
FAMILY = {"onnxruntime": "bert-mlm"}


@pytest.fixture(scope="module", params=TARGETS)
def finished(request, steady_costs, tiny_model_dir, tmp_path_factory):
    """A finished study on a target: (store, study, folder for exports)."""
    folder = tmp_path_factory.mktemp(request.param)
    name = request.param
    target = plugins.load("targets", name.replace("-", "_"), Target)
    causal = name not in FAMILY
    latencies = [] if target.unavailable() else sorted(target.latencies)
    if not causal:
        latencies = [phase for phase in latencies if "decode" not in phase]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOQ_CACHE", str(folder / "cache"))
        spec = build_spec(
            {
                "name": "tiny",
                "model": {
                    "id": str(tiny_model_dir(FAMILY.get(name, "llama"))),
                    "dtype": "float32" if name in ("llama-cpp", "onnxruntime") else "bfloat16",
                },
                "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 128, "window_tokens": 32},
                "target": {"name": name, "prompt_tokens": 16, "threads": 1},
                "objectives": ["kl_nats_per_token", "size_bytes", *latencies],
                "budget": {"trials": 12, "report_points": 3},
                "workers": {"cpus": 1},
            }
        )
        with Store.open(str(folder / "autoq.db")) as store:
            study = create_study(store, spec)
            run_study(store, study.id)
            yield store, store.study(study.id), folder


def mixed_trial(store, study):
    """The frontier's trial with the most different schemes."""
    frontier = store.frontier(study.id, with_assignments=True)
    return max(frontier, key=lambda trial: len(set(trial.assignment.values())))


def test_frontier_points_export_and_verify(finished):
    """Both ends of the frontier, the most mixed point, and one between."""
    store, study, folder = finished
    frontier = sorted(store.frontier(study.id, with_assignments=True), key=lambda trial: trial.values(["size_bytes"]))
    chosen = {t.number: t for t in (frontier[0], frontier[-1], frontier[len(frontier) // 2], mixed_trial(store, study))}
    for trial in chosen.values():
        out = folder / f"trial-{trial.number}"
        written = export(store, study, trial, out)
        assert set(written.weights) <= set(written.files)
        report = verify(out, latency=False)
        assert report.ok, [check for check in report.checks if check.ok is False]
        names = {check.name for check in report.checks}
        assert {"files", "bytes", "formats", "outputs", "kl_nats_per_token"} <= names
    assert not list(folder.glob(".*partial*"))


def test_the_unquantized_model_exports_too(finished):
    store, study, folder = finished
    (unquantized,) = [t for t in store.trials(study.id, with_assignments=True) if t.baseline == "unquantized"]
    assert set(unquantized.assignment.values()) == {Keep()}
    export(store, study, unquantized, folder / "unquantized")
    assert verify(folder / "unquantized", latency=False).ok


def test_latency_is_compared_where_the_study_measured_it(finished):
    """On a baseline, since those are always timed."""
    store, study, folder = finished
    trial = next(t for t in store.trials(study.id, with_assignments=True) if t.baseline not in (None, "unquantized"))
    export(store, study, trial, folder / "timed")
    timed = [
        name for name, m in trial.best_measurements().items() if name.startswith("latency_") and m.kind == "measured"
    ]
    assert timed == [name for name in study.spec["objectives"] if name.startswith("latency_")]
    checks = {check.name: check for check in verify(folder / "timed").checks}
    assert set(timed) <= set(checks)


def test_files_that_say_something_else_are_told_layer_by_layer(finished):
    """The checkpoint of one trial under the name of another: only the files themselves can tell.

    Among uniform baselines, since two methods with one grid leave files of one form, which nothing need tell apart.
    """
    store, study, folder = finished
    baselines = [t for t in store.trials(study.id, with_assignments=True) if t.baseline]
    small, *others = sorted(baselines, key=lambda trial: trial.values(["size_bytes"]))
    target = plugins.load("targets", study.study_spec().target.plugin, Target)
    export(store, study, small, folder / "small")
    assert len(others) >= 2
    with target.reload(folder / "small", 1) as runtime:
        assert runtime.differences(small.assignment) == []
        for other in others:
            changed = [n for n, scheme in small.assignment.items() if scheme != other.assignment[n]]
            lines = runtime.differences(other.assignment)
            assert len(lines) == len(changed) > 0
            assert all(any(name in line for line in lines) for name in changed)


def test_a_truncated_file_is_named_and_not_loaded(finished):
    store, study, folder = finished
    out = folder / "cut"
    export(store, study, mixed_trial(store, study), out)
    weights = out / files.read(out).weights[0]
    weights.write_bytes(weights.read_bytes()[:-100])
    report = verify(out, latency=False)
    assert not report.ok
    assert [check.name for check in report.checks] == ["files"]
    assert weights.name in report.checks[0].found
