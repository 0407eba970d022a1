"""Every model family end to end, on models that know something: searched, exported, read back, verified."""

from __future__ import annotations

import pytest

from autoq.scheme import Keep
from autoq.search.controller import create_study, run_study
from autoq.shipping.export import export
from autoq.shipping.verify import verify
from autoq.spec import build_spec
from autoq.store import Store

FAMILIES = (
    *("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi", "phi3", "opt", "gpt2", "gpt-neox", "mixtral"),
    *("bert", "roberta", "minilm", "t5", "bart"),
)


def test_every_trained_family_is_here(trained_models):
    assert set(FAMILIES) == set(trained_models.FAMILIES)


@pytest.fixture(scope="module", params=FAMILIES)
def finished(request, trained_models, trained_model_dir, tmp_path_factory):
    """A finished study of a family: (store, study, the objective of quality, folder for exports)."""
    folder = tmp_path_factory.mktemp("study")
    (folder / "text.txt").write_text(trained_models.documentation())
    quality = "cosine_distance" if request.param == "minilm" else "kl_nats_per_token"
    spec = build_spec(
        {
            "name": request.param,
            "model": {"id": str(trained_model_dir(request.param)), "dtype": "bfloat16"},
            "data": {
                "source": str(folder / "text.txt"),
                **{f"{part}_tokens": 256 for part in ("calibration", "search", "report")},
                "window_tokens": 64,
            },
            "target": {"name": "generic"},
            # What torch-cpu runs too, so that whatever is found can be exported.
            "space": {"schemes": ["keep", "rtn-int8-channel-sym", "rtn-int4-g32"]},
            "objectives": [quality, "size_bytes"],
            "budget": {"trials": 14, "report_points": 2},
            "workers": {"cpus": 1},
        }
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOQ_CACHE", str(folder / "cache"))
        with Store.open(str(folder / "autoq.db")) as store:
            study = create_study(store, spec)
            run_study(store, study.id)
            yield store, store.study(study.id), quality, folder


def test_quality_is_lost_bit_by_bit(finished):
    store, study, quality, _ = finished
    lost = {
        trial.baseline: trial.measurements[quality, "search"].value
        for trial in store.trials(study.id)
        if trial.baseline
    }
    order = ["unquantized", "uniform-int8", "uniform-int4", "uniform-int2"]
    values = [lost[name] for name in order]
    assert values == sorted(set(values)), dict(zip(order, values, strict=True))
    assert values[-1] > 100 * values[1] > 0


def test_the_frontier_holds_more_than_baselines(finished):
    store, study, _, _ = finished
    assert {trial.state for trial in store.trials(study.id)} == {"complete"}
    assert [trial for trial in store.frontier(study.id) if trial.baseline is None]


def test_the_smallest_assignment_exports_and_is_what_was_searched(finished):
    store, study, _, folder = finished
    found = [
        trial
        for trial in store.trials(study.id, with_assignments=True)
        if trial.baseline is None and set(trial.assignment.values()) != {Keep()}
    ]
    # The best ones lose less than kernels round, which a runtime is not forgiven.
    small = min(found, key=lambda trial: trial.values(["size_bytes"])[0])
    export(store, study, small, folder / "small", "torch-cpu")
    report = verify(folder / "small", latency=False)
    assert report.ok, [check for check in report.checks if check.ok is False]
