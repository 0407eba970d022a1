"""Rotated checkpoints: the same outputs, fewer outliers, and refusals; Hadamard matrices by their definition."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from autoq.errors import ModelRefused
from autoq.models import inspect, load
from autoq.models._hadamard import Rotation, hadamard
from autoq.models.rotation import FAMILIES
from autoq.search.controller import create_study, run_study
from autoq.shipping.export import export
from autoq.shipping.verify import verify
from autoq.spec import ModelSpec, build_spec
from autoq.store import Store

SIZES = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 128,
}
# name -> config class, what it has beside the sizes
MODELS = {
    "llama": ("LlamaConfig", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True}),
    "mistral": ("MistralConfig", {"tie_word_embeddings": False, "sliding_window": 16}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"tie_word_embeddings": False, "head_dim": 16}),
}
IDS = torch.arange(2, 42).view(1, -1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tiny_models, tmp_path):
    """A function name -> the folder of a model whose norms, biases and channels are as uneven as trained ones."""

    def make(name: str, dtype=torch.float32, seed: int = 0) -> Path:
        torch.manual_seed(seed)
        config, more = MODELS[name]
        own = getattr(transformers, config)(
            **{**SIZES, **({"head_dim": 12} if config != "Qwen2Config" else {}), **more}
        )
        model = transformers.AutoModelForCausalLM.from_config(own, dtype=dtype)
        for parameter in model.parameters():
            uneven = torch.rand(parameter.shape) * 2 + 0.1
            parameter.data = (uneven if parameter.ndim == 1 else torch.randn(parameter.shape) * 0.15).to(dtype)
        for layer in model.model.layers:
            layer.input_layernorm.weight.data[[3, 17]] *= 30
            layer.post_attention_layernorm.weight.data[[5]] *= 30
        model.save_pretrained(tmp_path / name)
        tiny_models.tokenizer().save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def outputs(folder: Path, transform: str, **fields) -> torch.Tensor:
    with torch.inference_mode():
        return load(ModelSpec(id=str(folder), transform=transform, dtype="float32", **fields)).outputs(IDS)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_are_those_of_the_original(folder, name):
    source = folder(name)
    original, rotated = outputs(source, "none"), outputs(source, "hadamard")
    assert torch.allclose(rotated, original, rtol=0, atol=2e-5 * float(original.abs().max()))
    before, after = (load(ModelSpec(id=str(source), transform=t, dtype="float32")) for t in ("none", "hadamard"))
    for layer in before.info.layers:
        if layer.kind == "linear":
            assert not torch.allclose(before.weight(layer.name), after.weight(layer.name), atol=1e-2), layer.name


def kurtosis(weight: torch.Tensor) -> float:
    return float(weight.float().pow(4).mean() / weight.float().square().mean() ** 2)


def test_outliers_are_spread(folder):
    """Folding the gains makes columns of outliers, and the rotation makes all but Gaussians of them (kurtosis 3)."""
    source = folder("llama")
    stored = load_file(source / "model.safetensors")
    rotated = load(ModelSpec(id=str(source), transform="hadamard", dtype="float32"))
    for block in range(2):
        for name, norm in (("self_attn.q_proj", "input_layernorm"), ("mlp.up_proj", "post_attention_layernorm")):
            folded = stored[f"model.layers.{block}.{name}.weight"] * stored[f"model.layers.{block}.{norm}.weight"]
            assert kurtosis(folded) > 8
            assert kurtosis(rotated.weight(f"model.layers.{block}.{name}")) < 4
    gains = [p for name, p in rotated.model.named_parameters() if "norm" in name]
    assert len(gains) == 5
    assert all((gain == 1).all() for gain in gains)


def test_a_tied_head_is_untied_and_counted(folder):
    source = folder("llama-tied")
    tied, untied = (inspect(ModelSpec(id=str(source), transform=t)) for t in ("none", "hadamard"))
    assert tied.layer("lm_head").tied == ("model.embed_tokens",)
    assert untied.layer("lm_head").tied == ()
    assert untied.layer("model.embed_tokens").parameters == untied.layer("lm_head").parameters == 300 * 48
    sizes = [
        info.other_bytes + sum(layer.parameters * layer.dtype_bytes for layer in info.layers) for info in (tied, untied)
    ]
    assert sizes[1] - sizes[0] == 300 * 48 * 2
    loaded = load(ModelSpec(id=str(source), transform="hadamard"))
    assert loaded.weight("lm_head").data_ptr() != loaded.weight("model.embed_tokens").data_ptr()


def test_shards_and_sixteen_bits(folder):
    """Files by shard, written in the study's dtype with one rounding, whatever dtype is stored."""
    source = folder("llama-tied")
    whole = load_file(source / "model.safetensors")
    names = sorted(whole)
    for shard, own in (("a", names[::2]), ("b", names[1::2])):
        save_file({name: whole[name] for name in own}, source / f"{shard}.safetensors", metadata={"format": "pt"})
    index = {name: f"{'ab'[i % 2]}.safetensors" for i, name in enumerate(names)}
    one = load(ModelSpec(id=str(source), transform="hadamard", dtype="float32"))
    (source / "model.safetensors").unlink()
    (source / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    for dtype in ("float32", "bfloat16"):
        sharded = load(ModelSpec(id=str(source), transform="hadamard", dtype=dtype))
        assert [layer.name for layer in sharded.info.layers] == [layer.name for layer in one.info.layers]
        for layer in sharded.info.layers:
            assert torch.equal(sharded.weight(layer.name), one.weight(layer.name).to(getattr(torch, dtype))), layer.name


@pytest.mark.slow
@pytest.mark.timeout(900)
class TestReal:
    @pytest.fixture(autouse=True)
    def cache(self) -> None:
        """Overrides the empty cache of the other tests."""

    def test_smollm2_stays_the_same_to_rounding(self):
        found = []
        for transform in ("none", "hadamard"):
            model = load(ModelSpec(id="demo:smollm2", transform=transform, dtype="float32"))
            ids = model.tokenizer("A rotation keeps the length of a vector, and so does", return_tensors="pt")[
                "input_ids"
            ]
            with torch.inference_mode():
                found.append(model.outputs(ids)[0].double().log_softmax(-1))
        kl = (found[0].exp() * (found[0] - found[1])).sum(-1)
        assert float(kl.max()) < 1e-6


def edit(source: Path, change) -> Path:
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    return source


def refusal(source: Path, **fields) -> str:
    with pytest.raises(ModelRefused) as caught:
        load(ModelSpec(id=str(source), transform="hadamard", **fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "mixtral", "phi3", "bert"])
def test_a_family_that_is_not_known_to_stay_the_same_is_named(tiny_model_dir, family):
    line = refusal(tiny_model_dir(family))
    architecture = json.loads((tiny_model_dir(family) / "config.json").read_text())["architectures"][0]
    assert f"is {architecture}; use none" in line
    assert line.startswith("model.transform: hadamard rotates LlamaForCausalLM, MistralForCausalLM")
    assert inspect(ModelSpec(id=str(tiny_model_dir(family)))).layers  # without a transform it is welcome


def test_what_has_no_place_and_what_is_not_finite_is_named(folder):
    more = edit(folder("llama"), lambda t: t.update({"model.layers.0.mlp.gate.weight": torch.ones(4, 48)}))
    assert "has the tensor model.layers.0.mlp.gate.weight, whose part is not known" in refusal(more)
    broken = edit(folder("mistral"), lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(float("nan")))
    assert "model.layers.1.mlp.up_proj.weight of model" in refusal(broken)
    assert "NaN or infinite" in refusal(broken)
    huge = edit(folder("mistral", seed=1), lambda t: t["model.layers.1.mlp.up_proj.weight"].fill_(6e4))
    assert "does not fit torch.float16; choose model.dtype bfloat16" in refusal(huge, dtype="float16")
    bare = edit(folder("qwen3"), lambda t: t.pop("model.norm.weight"))
    assert "stores no model.norm.weight" in refusal(bare)


@pytest.mark.parametrize("order", [1, 4, 8, 12, 20, 24, 28, 36, 44, 60, 76])
def test_hadamard_matrices_are(order):
    found = hadamard(order)
    assert set(found.unique().tolist()) <= {-1.0, 1.0}
    assert torch.equal(found @ found.T, order * torch.eye(order).double())


@pytest.mark.parametrize("size", [1, 2, 8, 12, 48, 64, 96, 576, 896, 960, 1536, 3, 18, 22, 250])
def test_rotations_are_orthogonal_and_spread_a_coordinate(size):
    matrix = Rotation.random(size, 0).apply(torch.eye(size))
    assert torch.allclose(matrix @ matrix.T, torch.eye(size).double(), atol=1e-12)
    if size % 4 == 0 or size < 3:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5))  # every entry alike: Hadamard
    assert torch.equal(matrix, Rotation.random(size, 0).apply(torch.eye(size)))
    if size > 4:
        assert not torch.equal(matrix, Rotation.random(size, 1).apply(torch.eye(size)))


def test_butterflies_are_sylvester_s_kronecker_product():
    rotation = Rotation.random(48, 3)
    two = torch.tensor([[1.0, 1], [1, -1]]).double()
    whole = torch.diag(rotation.signs) @ torch.kron(torch.kron(two, two) / 2, rotation.factor)
    rows = torch.randn(5, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(rotation.apply(rows), rows @ whole)


def test_the_families_are_those_that_are_tested():
    tested = {
        getattr(transformers, config).__name__.removesuffix("Config") + "ForCausalLM" for config, _ in MODELS.values()
    }
    assert tested == set(FAMILIES)


def test_a_study_of_a_rotated_model_ships_and_verifies(folder, tmp_path):
    spec = build_spec(
        {
            "name": "rotated",
            "model": {"id": str(folder("llama-tied", torch.bfloat16)), "transform": "hadamard"},
            "data": {"calibration_tokens": 64, "search_tokens": 64, "report_tokens": 128, "window_tokens": 32},
            "target": {"name": "torch-cpu", "prompt_tokens": 16, "threads": 1},
            "space": {"schemes": ["rtn-int8-channel-sym", "keep"], "overrides": [
                {"match": "*_proj", "schemes": ["rtn-int8-channel-sym", "rtn-int8-channel-sym-a8dyn", "keep"]}]},
            "objectives": ["kl_nats_per_token", "size_bytes"],
            "budget": {"trials": 6, "report_points": 2},
            "workers": {"cpus": 1},
        }
    )  # fmt: skip
    with Store.open(str(tmp_path / "autoq.db")) as store:
        study = create_study(store, spec)
        run_study(store, study.id)
        frontier = store.frontier(study.id, with_assignments=True)
        trial = min(frontier, key=lambda t: t.best_measurements()["size_bytes"].value)
        export(store, store.study(study.id), trial, tmp_path / "shipped")
    assert verify(tmp_path / "shipped").ok
    assert "transformed before (hadamard)" in (tmp_path / "shipped" / "README.md").read_text()
    config = json.loads((tmp_path / "shipped" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False
    with safe_open(tmp_path / "shipped" / "model.safetensors", framework="pt") as stored:
        assert (stored.get_tensor("model.norm.weight") == 1).all()
        assert "lm_head.weight" in stored.keys()  # noqa: SIM118
