"""Mixtures of experts end to end: searched, exported where a target can, and read back."""

from __future__ import annotations

import pytest
from safetensors import safe_open

import autoq
from autoq.errors import SpecError
from autoq.scheme import Keep
from autoq.search.controller import create_study, run_study
from autoq.search.setup import pose
from autoq.shipping.export import export
from autoq.shipping.verify import verify
from autoq.spec import build_spec
from autoq.store import Store
from autoq.targets._torch_cpu_costs import _quiet


def spec_of(folder, **changes):
    spec = {
        "name": "experts",
        "model": {"id": str(folder), "dtype": "bfloat16"},
        "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 64, "window_tokens": 32},
        "target": {"name": "torch-cpu", "prompt_tokens": 16, "threads": 1},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        "budget": {"trials": 10, "report_points": 1},
        "workers": {"cpus": 1},
    }
    return build_spec({**spec, **changes})


@pytest.fixture(scope="module", params=["mixtral", "qwen2-moe", "qwen3-moe"])
def family(request):
    return request.param


@pytest.fixture(scope="module")
def finished(family, steady_costs, tiny_model_dir, tmp_path_factory):
    """A finished study of a family, each expert a decision of its own in one of them, and its folder."""
    folder = tmp_path_factory.mktemp(family)
    changes = {"space": {"experts": "apart"}} if family == "mixtral" else {}
    if family == "qwen3-moe":
        changes = {"objectives": ["kl_nats_per_token", "size_bytes", "latency_decode_ms"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOQ_CACHE", str(folder / "cache"))
        with Store.open(str(folder / "autoq.db")) as store:
            study = create_study(store, spec_of(tiny_model_dir(family), **changes))
            run_study(store, study.id)
            yield store, store.study(study.id), folder


def test_experts_are_searched_and_the_frontier_is_more_than_baselines(finished, family):
    store, study, _ = finished
    trials = store.frontier(study.id, with_assignments=True)
    assert [trial for trial in trials if trial.baseline is None]
    for trial in trials:
        experts = {name: scheme for name, scheme in trial.assignment.items() if ".experts." in name}
        assert len(experts) == {"mixtral": 16, "qwen2-moe": 32, "qwen3-moe": 32}[family]
        per_stack: dict[str, set] = {}
        for name, scheme in experts.items():
            stem, _, matrix = name.rpartition(".")
            per_stack.setdefault(f"{stem.rpartition('.')[0]}.{matrix}", set()).add(scheme)
        if family != "mixtral":
            assert all(len(schemes) == 1 for schemes in per_stack.values())
        assert all(scheme == Keep() for name, scheme in trial.assignment.items() if name.endswith("mlp.gate"))
        for measured in trial.best_measurements().values():
            assert measured.value >= 0


def test_an_export_is_read_back_and_as_large_as_was_said(finished):
    store, study, folder = finished
    best = min(
        (t for t in store.frontier(study.id, with_assignments=True) if set(t.assignment.values()) != {Keep()}),
        key=lambda trial: trial.values(["size_bytes"]),
    )
    assert any(".experts." in name and scheme != Keep() for name, scheme in best.assignment.items())
    export(store, study, best, folder / "small")
    report = verify(folder / "small", latency=False)
    assert report.ok, [check for check in report.checks if check.ok is False]
    with safe_open(folder / "small" / "model.safetensors", framework="pt") as file:
        shipped = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118 - not a mapping
    assert shipped == best.values(["size_bytes"])[0]
    model, tokenizer = autoq.load(str(folder / "small"))
    ids = tokenizer("The quick brown fox", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] == ids.input_ids.shape[1] + 4


def test_an_expert_costs_its_quiet_time_by_how_often_it_is_called():
    assert _quiet([4.0, 0.0, 8.0, 0.0, 0.0, 0.0, 4.0, 4.0]) == 4.0 * 4 / 8
    assert _quiet([4.0, 8.0, 4.0, 4.0]) == 4.0
    assert _quiet([0.0, 0.0]) == 0.0


@pytest.mark.parametrize(
    ("name", "dtype", "rule"),
    [
        ("onnxruntime", "float32", "experts that run as tokens need them"),
        ("llama-cpp", "float32", "knows no Qwen3MoeForCausalLM"),
        ("vllm", "bfloat16", "takes all experts for quantized alike"),
        ("cuda", "bfloat16", "layers that every token reaches"),
    ],
)
def test_targets_that_cannot_run_experts_say_so_in_one_clause(name, dtype, rule, tiny_model_dir):
    spec = spec_of(
        tiny_model_dir("qwen3-moe"),
        model={"id": str(tiny_model_dir("qwen3-moe")), "dtype": dtype},
        target={"name": name, "prompt_tokens": 16},
    )
    with pytest.raises(SpecError, match=rule):
        pose(spec)
