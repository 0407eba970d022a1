"""What is refused before weights are read, and that nothing of a refused model ever runs."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from autoq.errors import BadInput, ModelRefused
from autoq.models import inspect, load
from autoq.models.sources import resolve
from autoq.spec import ModelSpec


class Canary:
    """Writes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


@pytest.fixture
def folder(tiny_model_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model_dir("llama-tied"), tmp_path / "model"))


def edit(folder: Path, file: str, **values) -> None:
    path = folder / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def refusal(model: object, kind: type[BadInput] = ModelRefused) -> str:
    """The one line with which both `inspect` and `load` refuse the model."""
    lines = set()
    for use in (inspect, load):
        with pytest.raises(kind) as caught:
            use(ModelSpec(id=str(model)))
        lines.add(str(caught.value))
    (line,) = lines
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth", "model.ckpt"])
def test_pickles_are_refused_and_never_read(folder, tmp_path, name):
    (folder / "model.safetensors").unlink()
    canary = tmp_path / "canary"
    (folder / name).write_bytes(pickle.dumps(Canary(canary)))
    assert f"only pickled weights ({name})" in refusal(folder)
    assert f"only pickled weights ({name})" in refusal(folder / name)
    assert not canary.exists()
    pickle.loads((folder / name).read_bytes())
    assert canary.exists()


def test_a_pickle_beside_safetensors_is_left_alone(folder, tmp_path):
    canary = tmp_path / "canary"
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Canary(canary)))
    assert load(ModelSpec(id=str(folder))).info.architecture == "LlamaForCausalLM"
    assert not canary.exists()


@pytest.mark.parametrize(("file", "auto"), [("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "x")])
def test_own_code_is_refused_and_never_run(folder, tmp_path, file, auto):
    canary = tmp_path / "canary"
    (folder / "modeling_own.py").write_text(f"open({str(canary)!r}, 'w').close()\nclass Own: pass\n")
    edit(folder, file, auto_map={auto: "modeling_own.Own", "AutoConfig": "modeling_own.Own"})
    assert f"brings its own code ('auto_map' in {file})" in refusal(folder)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized already (gptq in config.json)"),
        ({"text_config": {"auto_map": {"AutoModel": "x.Y"}}}, "brings its own code"),
        ({"attn_implementation": "someone/kernels"}, "asks for code from the hub"),
        ({"transformers_weights": "other.safetensors"}, "renames its weights"),
        ({"architectures": ["LlamaForTokenClassification"]}, "'LlamaForTokenClassification' of model type 'llama'"),
        ({"architectures": ["os"]}, "architecture 'os'"),
        ({"architectures": None}, "architecture None"),
        ({"model_type": "nonesuch"}, "config.json is not usable"),
        ({"num_attention_heads": "many"}, "config.json is not usable"),
    ],
)
def test_configs_that_cannot_be_used(folder, change, line):
    edit(folder, "config.json", **change)
    assert line in refusal(folder)


def test_a_reason_on_two_lines_is_told_whole(folder):
    edit(folder, "config.json", num_attention_heads="many")
    assert "'num_attention_heads': TypeError: Field 'num_attention_heads' expected int" in refusal(folder)


def test_a_revision_is_for_the_hub(folder):
    with pytest.raises(ModelRefused, match=r"^model\.revision 'main' is for hub ids"):
        inspect(ModelSpec(id=str(folder), revision="main"))


def test_configs_that_are_not_json(folder):
    (folder / "config.json").write_text("{")
    assert "config.json cannot be read" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "config.json is not a mapping" in refusal(folder)
    (folder / "config.json").write_text('{"a":' * 100_000)
    assert "config.json cannot be read" in refusal(folder)
    (folder / "config.json").unlink()
    assert "has no config.json" in refusal(folder)
    (folder / "small.gguf").touch()
    assert "give one of its GGUF files: small.gguf" in refusal(folder)


def test_adapters_are_refused(folder):
    (folder / "adapter_config.json").write_text("{}")
    assert "is an adapter" in refusal(folder)


def test_things_that_are_no_model(folder, tmp_path):
    assert "there is no such file or folder" in refusal("/no/such/folder")
    assert "there is no such file or folder" in refusal("./model.gguf")
    assert "give the folder that holds it" in refusal(folder / "model.safetensors")
    assert "is not a GGUF file" in refusal(folder / "tokenizer.json")
    assert "choose from minilm, smollm2" in refusal("demo:smolm2", BadInput)
    (folder / "model.safetensors").unlink()
    assert "has no model.safetensors" in refusal(folder)


def test_a_hub_id_without_a_network_says_what_to_do():
    line = refusal("nobody/no-such-model")
    assert "neither a folder here nor in the hub's cache" in line
    assert "demo:smollm2" in line


def test_a_damaged_weight_file(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert "not a whole safetensors file" in refusal(folder)


def test_an_index_may_not_lead_elsewhere(folder, tmp_path):
    (folder / "model.safetensors").rename(tmp_path / "away.safetensors")
    index = folder / "model.safetensors.index.json"
    for name in ("../away.safetensors", "/etc/passwd", "pytorch_model.bin"):
        index.write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
        assert f"names {name!r}" in refusal(folder)
    index.write_text(json.dumps({"weight_map": {"model.norm.weight": "a.safetensors"}}))
    assert "lacks its weight file a.safetensors" in refusal(folder)
    index.write_text("{}")
    assert "has no weight_map" in refusal(folder)


def shard(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Deal the folder's weights out to two files with an index; gives what is in each."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    parts: dict[str, dict[str, torch.Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for number, name in enumerate(sorted(tensors)):
        parts["ab"[number % 2] + ".safetensors"][name] = tensors[name]
    for file, part in parts.items():
        save_file(part, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return parts


def refused_to_load(folder: Path, dtype: str = "bfloat16") -> str:
    """The one line with which `load` refuses what `inspect` cannot see."""
    with pytest.raises(ModelRefused) as caught:
        load(ModelSpec(id=str(folder), dtype=dtype))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_shards_that_are_gone_cut_or_hold_something_else(folder):
    parts = shard(folder)
    second = folder / "b.safetensors"
    whole = second.read_bytes()
    second.unlink()
    assert "lacks its weight file b.safetensors" in refusal(folder)
    second.write_bytes(whole[:-100])
    assert "not a whole safetensors file" in refusal(folder)
    save_file({}, second, metadata={"format": "pt"})
    assert f"lacks {len(parts['b.safetensors'])} of its weights" in refused_to_load(folder)
    save_file(parts["a.safetensors"], second, metadata={"format": "pt"})
    assert f"lacks {len(parts['b.safetensors'])} of its weights" in refused_to_load(folder)


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"num_hidden_layers": 3}, "lacks 9 of its weights, the first being model.layers.2."),
        (
            {"num_hidden_layers": 1},
            "has 9 weights of blocks that its config does not have, the first being model.layers.1.",
        ),
        ({"intermediate_size": 48}, "has another shape than its config says for 6 of its weights"),
        ({"vocab_size": 200}, "has another shape than its config says for"),
        ({"hidden_size": 64}, "has another shape than its config says for"),
        ({"num_key_value_heads": 4}, "has another shape than its config says for 4 of its weights"),
    ],
)
def test_configs_that_say_other_shapes_than_the_weights_have(folder, change, line):
    edit(folder, "config.json", **change)
    assert line in refused_to_load(folder)
    assert line in refused_to_load(folder, "float32")


@pytest.mark.parametrize("family", ["mixtral", "qwen3-moe"])
def test_experts_that_are_too_few_or_too_many(family, tiny_model_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_model_dir(family), tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    key = next(key for key in ("num_local_experts", "num_experts") if key in config)
    count = config[key]
    for other in (count - 1, count + 1):
        edit(folder, "config.json", **{key: other})
        assert "its weights" in refused_to_load(folder)
    edit(folder, "config.json", **{key: count})
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if ".experts.1." in name)
    save_file({n: t for n, t in tensors.items() if n != gone}, folder / "model.safetensors", {"format": "pt"})
    assert "its weights" in refused_to_load(folder)


def test_shards_are_read(folder, tiny_model_dir):
    shard(folder)
    whole = load(ModelSpec(id=str(tiny_model_dir("llama-tied"))))
    sharded = load(ModelSpec(id=str(folder)))
    assert sharded.info == whole.info
    assert all(torch.equal(sharded.weight(layer.name), whole.weight(layer.name)) for layer in whole.info.layers)


def test_resolving_a_folder_gives_it_back(folder):
    assert resolve(ModelSpec(id=str(folder))) == folder
