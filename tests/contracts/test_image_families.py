"""Vision transformers end to end, on models that know something: searched, exported, read back, verified, recovered."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import autoq
from autoq import plugins, trained
from autoq.assignment import Assignment
from autoq.errors import BadInput, ExportBroken
from autoq.evaluation import Evaluator
from autoq.measurement import Measurement
from autoq.models import load
from autoq.objectives import load as load_objective
from autoq.scheme import Keep
from autoq.search.controller import create_study, run_study
from autoq.search.costing import predict
from autoq.search.setup import pose
from autoq.shipping.export import export
from autoq.shipping.verify import verify
from autoq.spec import ModelSpec, StudySpec, TaskSpec, build_spec
from autoq.statistics import paired
from autoq.store import Store
from autoq.targets import Target
from autoq.tasks import Source
from autoq.tasks.kinds.labels import Labels

datasets = pytest.importorskip("datasets")

FAMILIES = ("vit", "deit")
# What is the same for any family is tried on the first, on the study that it has anyway.
of_one_family = pytest.mark.parametrize("finished", FAMILIES[:1], indirect=True)
CALIBRATION, SEARCH, REPORT, LEFT = 32, 32, 64, 96  # images


@pytest.fixture(scope="module")
def pictures(tiny_vision, tmp_path_factory) -> Path:
    """A folder of images for the study's data, and one of labelled examples."""
    folder = tmp_path_factory.mktemp("pictures")
    tiny_vision.folder_of_images(folder / "data", CALIBRATION + SEARCH + REPORT + LEFT, seed=2)
    tiny_vision.folder_of_images(folder / "labelled", 240, seed=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


def spec_of(pictures: Path, model: Path, tokens: int, **fields: Any) -> StudySpec:
    counts = {"calibration_tokens": CALIBRATION, "search_tokens": SEARCH, "report_tokens": REPORT}
    tree = {
        "name": "pictures",
        "model": {"id": str(model)},
        "data": {
            "source": str(pictures / "data"),
            "column": "image",
            **{name: count * tokens for name, count in counts.items()},
        },
        "tasks": {
            "digits": {"source": str(pictures / "labelled"), "search_examples": 50, "report_examples": 190},
        },
        "target": {"name": "generic", "threads": 1},
        # What torch-cpu runs too, so that whatever is found can be exported.
        "space": {"schemes": ["keep", "rtn-int8-channel-sym", "rtn-int4-g32"], "exclude": ["classifier"]},
        "objectives": ["kl_nats_per_token", "size_bytes"],
        "report": ["accuracy"],
        "budget": {"trials": 12, "report_points": 1},
        "workers": {"cpus": 1},
    }
    return build_spec(tree | fields)


@pytest.fixture(scope="module", params=FAMILIES)
def finished(request, pictures, tiny_vision, vision_model_dir, tmp_path_factory):
    """A finished study of a family: (store, study, folder for exports)."""
    folder = tmp_path_factory.mktemp("study")
    spec = spec_of(pictures, vision_model_dir(request.param), tiny_vision.FAMILIES[request.param][2])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AUTOQ_CACHE", str(folder / "cache"))
        with Store.open(str(folder / "autoq.db")) as store:
            study = create_study(store, spec)
            run_study(store, study.id)
            yield store, store.study(study.id), folder


@pytest.fixture(scope="module")
def exported(finished) -> Path:
    """The smallest assignment that was found, as torch-cpu runs it."""
    store, study, folder = finished
    found = [
        trial
        for trial in store.trials(study.id, with_assignments=True)
        if trial.baseline is None and set(trial.assignment.values()) != {Keep()}
    ]
    export(store, study, min(found, key=lambda t: t.values(["size_bytes"])[0]), folder / "small", "torch-cpu")
    return folder / "small"


@pytest.fixture(scope="module")
def evaluator(finished) -> Evaluator:
    _, study, _ = finished
    return Evaluator(study.study_spec())


def uniform(evaluator: Evaluator, scheme: str) -> Assignment:
    return Assignment.from_dict({layer.name: scheme for layer in evaluator.info.layers})


def by_name(found: list[Measurement]) -> dict[str, Measurement]:
    return {each.objective: each for each in found}


def test_quality_is_lost_bit_by_bit(finished):
    store, study, _ = finished
    trials = {trial.baseline: trial for trial in store.trials(study.id) if trial.baseline}
    order = ["unquantized", "uniform-int8", "uniform-int4", "uniform-int2"]
    lost = [trials[name].measurements["kl_nats_per_token", "search"].value for name in order]
    assert lost == sorted(set(lost)), dict(zip(order, lost, strict=True))
    assert lost[-1] > 100 * lost[1] > 0
    assert trials["unquantized"].measurements["accuracy", "report"].value > 0.85


def test_accuracy_falls_with_the_bits(evaluator):
    """By more than chance, on the same images, which nothing was chosen by."""
    whole, two = (
        by_name(evaluator.measure(uniform(evaluator, scheme), "report"))["accuracy"]
        for scheme in ("rtn-int8-channel-sym", "rtn-int2-tensor-sym")
    )
    fall, stderr, n = paired(whole.per_token, two.per_token)
    assert fall == pytest.approx(whole.value - two.value, abs=1e-6)
    assert fall > 2 * stderr > 0
    assert n == 190


def test_the_frontier_holds_more_than_baselines(finished):
    store, study, _ = finished
    assert {trial.state for trial in store.trials(study.id)} == {"complete"}
    assert [trial for trial in store.frontier(study.id) if trial.baseline is None]


@of_one_family
def test_a_worker_counts_an_image_as_its_tokens(evaluator):
    tokens = evaluator.info.images.tokens
    told = evaluator.describe()
    assert told["window_tokens"] == tokens
    counted = {part: told[f"{part}_tokens"] for part in ("calibration", "search", "report")}
    assert counted == {"calibration": CALIBRATION * tokens, "search": SEARCH * tokens, "report": REPORT * tokens}


@of_one_family
def test_kl_is_that_of_the_class_distributions(evaluator):
    assignment, part = uniform(evaluator, "rtn-int4-g32"), evaluator.parts.report
    with torch.inference_mode():
        p = evaluator.model.outputs(part)[:, 0].float().log_softmax(-1)
        with evaluator.swapped(assignment):
            q = evaluator.model.outputs(part)[:, 0].float().log_softmax(-1)
    expected = (p.exp() * (p - q)).sum(-1)
    found = by_name(evaluator.measure(assignment, "report"))["kl_nats_per_token"]
    assert found.n == len(part)
    np.testing.assert_allclose(found.per_token[:, 0], expected, rtol=0.02, atol=2e-4)


@of_one_family
def test_second_moments_are_of_all_patches_of_all_images(evaluator):
    layer = evaluator.info.layers[0]
    read = []
    handle = evaluator.model.modules_of(layer)[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    with torch.inference_mode():
        evaluator.model.outputs(evaluator.parts.calibration)
    handle.remove()
    rows = read[0].flatten(0, 1).float()
    assert len(rows) == CALIBRATION * evaluator.info.images.tokens
    found = evaluator.statistics(layer.name)["input_mean_square"]
    torch.testing.assert_close(found, rows.square().mean(0), rtol=1e-3, atol=1e-5)


def test_the_smallest_assignment_is_what_was_searched(exported):
    report = verify(exported, latency=False)
    assert report.ok, [check for check in report.checks if check.ok is False]
    assert {"outputs", "kl_nats_per_token"} <= {check.name for check in report.checks if check.ok}


@of_one_family
def test_an_export_with_other_weights_is_found_out(exported, tmp_path):
    """The control of the test before: weights of the right form whose outputs are others."""
    import shutil

    from safetensors import safe_open
    from safetensors.torch import save_file

    from autoq.shipping import manifest as files

    copy = shutil.copytree(exported, tmp_path / "copy")
    with safe_open(copy / "model.safetensors", framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    name = next(name for name in tensors if name.endswith("position_embeddings"))
    save_file(tensors | {name: tensors[name].flip(1).contiguous()}, copy / "model.safetensors", metadata)
    told = files.read(copy)
    told.files["model.safetensors"] = files.digest(copy / "model.safetensors")
    files.write(copy, told)
    failed = {check.name for check in verify(copy, latency=False).checks if check.ok is False}
    assert "outputs" in failed


@of_one_family
def test_what_the_card_says_runs(exported, tmp_path, tiny_vision, monkeypatch):
    text = (exported / "README.md").read_text()
    code = re.search(r"## Run it\n\n```\n(.*?)\n```", text, re.DOTALL)[1]
    drawn = {name: image for image, name in tiny_vision.pictures(10, seed=4)}
    right = 0
    monkeypatch.chdir(exported.parent)
    for name, image in drawn.items():
        image.save(exported.parent / "image.png")
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(code, "card", "exec"), {})
        right += said.getvalue().strip() == name
    assert right >= 7


@of_one_family
def test_a_reloaded_export_is_complete_without_the_original(exported):
    model, processor = autoq.load(exported)
    assert type(processor).__name__.endswith("ImageProcessorPil")
    assert model.config.id2label[0] == "digit 9"
    (exported.parent / "broken").mkdir(exist_ok=True)
    for name in ("config.json", "preprocessor_config.json"):
        (exported.parent / "broken" / name).write_bytes((exported / name).read_bytes())
    (exported.parent / "broken" / "model.safetensors").write_bytes((exported / "model.safetensors").read_bytes()[:-9])
    with pytest.raises(ExportBroken, match="not a whole checkpoint"):
        autoq.load(exported.parent / "broken")


@of_one_family
def test_recovery_lowers_the_loss_on_images_that_it_was_not_trained_on(evaluator, tmp_path):
    assignment = uniform(evaluator, "rtn-int2-tensor-sym")
    before = by_name(evaluator.measure(assignment, "report"))["kl_nats_per_token"].value
    notes: list[str] = []
    layers, facts = evaluator.recover(
        assignment, 40, None, 4, 0.3, 0, "blocks", lambda *_: None, notes.append, str(tmp_path)
    )
    tokens = evaluator.info.images.tokens
    assert facts["tokens"] + facts["deciding_tokens"] == LEFT * tokens
    assert facts["losses"]["40"] < facts["losses"]["0"]
    learned = Assignment(dict(assignment.items()), {name: found[0] for name, found in layers.items()})
    trained.place(learned, lambda _: dict(layers.values()))
    assert by_name(evaluator.measure(learned, "report"))["kl_nats_per_token"].value < 0.7 * before


@of_one_family
def test_layers_can_be_quantized_in_sequence(evaluator):
    layers, facts = evaluator.sequence(uniform(evaluator, "gptq-int3-g32"), lambda *_: None)
    assert facts["tokens"] == CALIBRATION * evaluator.info.images.tokens
    assert len(layers) >= 9  # all but the first that read what is not quantized


def test_a_class_is_known_by_its_name_whatever_number_a_folder_gives_it(pictures, vision_model_dir):
    """The model numbers its classes backwards: by the folder's numbers next to nothing would be right."""
    model = load(ModelSpec(id=str(vision_model_dir("vit"))))
    spec = TaskSpec(source=str(pictures / "labelled"), search_examples=50, report_examples=190)
    kind, source = Labels(), Source("mine", spec, 0)
    examples = kind.read(source, model.info)
    prepared = kind.prepare(model, examples.report, source)
    accuracy = load_objective("accuracy")
    with torch.inference_mode():
        answers = kind.answers(model, prepared)
        right = [accuracy.score(row, answer)[0] for row, answer in zip(examples.report, answers, strict=True)]
        assert np.mean(right) > 0.85
        # What a picture is answered does not depend on what it was batched with.
        assert [kind.answers(model, [each])[0] for each in prepared[:5]] == answers[:5]


# -- specs that do not fit ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit(vision_model_dir) -> Path:
    return vision_model_dir("vit")


def refused(spec: StudySpec) -> str:
    with pytest.raises(BadInput) as caught:
        pose(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_targets_run_images_or_say_who_does(pictures, vit):
    targets = [name for name in plugins.names("targets") if not plugins.load("targets", name, Target).reads_images]
    assert {"llama_cpp", "onnxruntime", "vllm", "cuda"} <= set(targets)
    for name in targets:
        told = refused(spec_of(pictures, vit, 17, target={"name": name.replace("_", "-")}))
        assert "reads images; choose from described, generic, torch-cpu" in told, told


def test_objectives_of_text_do_not_fit(pictures, vit):
    for objective in ("latency_decode_ms", "perplexity", "next_token_accuracy", "masked_token_accuracy", "bleu",
                      "multiple_choice_accuracy", "cosine_distance", "ndcg", "peak_memory_bytes"):  # fmt: skip
        told = refused(spec_of(pictures, vit, 17, objectives=[objective, "size_bytes"], target={"name": "torch-cpu"}))
        assert told.startswith(f"objectives: {objective} does not fit model "), told


def test_a_pass_is_over_whole_images(pictures, vit):
    latency = {"objectives": ["kl_nats_per_token", "latency_prefill_ms"]}
    told = refused(spec_of(pictures, vit, 17, target={"name": "torch-cpu"}, **latency))
    assert told.startswith("target.prompt_tokens: an image is 17 tokens to ")
    assert told.endswith("set it to 17 (got 512)")
    assert pose(spec_of(pictures, vit, 17, target={"name": "torch-cpu", "prompt_tokens": 17}, **latency)).timed
    assert pose(spec_of(pictures, vit, 17))  # where nothing is timed nobody asks


def test_data_are_looked_at_before_a_study_is_written(pictures, vit, tmp_path):
    with Store.open(str(tmp_path / "autoq.db")) as store:
        for fields, said in (
            ({"data": {"source": "python-docs"}}, "'python-docs' is no dataset, and the model reads images"),
            ({"data": {"source": str(pictures / "data")}}, "has no column 'text'; choose from image, label"),
            (
                {"tasks": {"digits": {"source": str(pictures / "labelled")}}},
                "has 240 examples that differ, and 640 are",
            ),
            ({"tasks": {}}, "it needs labelled examples"),
        ):
            with pytest.raises(BadInput, match=re.escape(said)):
                create_study(store, spec_of(pictures, vit, 17, **fields))
        assert store.studies() == []


def test_a_batch_of_images_is_timed_and_a_described_device_predicts_it(
    pictures, vit, brief_timings, tmp_path, monkeypatch
):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path))
    workload = {"name": "torch-cpu", "prompt_tokens": 17, "batch_size": 4, "threads": 1}
    fields = {"objectives": ["latency_prefill_ms", "size_bytes", "energy_joule_per_token"], "report": []}
    evaluator = Evaluator(spec_of(pictures, vit, 17, target=workload, **fields))
    seen = []
    handle = evaluator.model.model.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["pixel_values"].shape), with_kwargs=True
    )
    (timed,) = evaluator.time(uniform(evaluator, "rtn-int8-channel-sym"))
    handle.remove()
    assert (timed.objective, timed.kind, set(seen)) == ("latency_prefill_ms", "measured", {(4, 3, 16, 16)})
    assert timed.value > 0
    workload = {"name": "described", "device": "edge-npu", "prompt_tokens": 17, "batch_size": 4}
    problem = pose(spec_of(pictures, vit, 17, target=workload, space={},
                           **fields))  # fmt: skip
    assert not problem.timed
    assert problem.latencies == ["latency_prefill_ms"]


def test_a_plan_counts_answers_per_image(pictures, vit):
    spec = spec_of(pictures, vit, 17)
    figures = {figure.what: figure.value for figure in predict(spec).figures}
    assert 0 < figures["a trial"] < 60
    assert figures["memory of a worker"] < 2e9


def test_an_image_model_has_no_cache_to_quantize(pictures, vit):
    assert "decodes nothing" in refused(spec_of(pictures, vit, 17, space={"kv_cache": [8]}))
