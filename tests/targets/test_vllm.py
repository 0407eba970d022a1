"""The target vllm: what it refuses, what it exports, and that transformers runs exactly what was evaluated."""

from __future__ import annotations

import json

import pytest
import torch

from autoq import plugins
from autoq.assignment import Assignment
from autoq.calibration.histogram import Histogram
from autoq.errors import AutoQError, ModelRefused, SchemeRefused
from autoq.layer import Layer
from autoq.methods import Method
from autoq.scheme import Keep, parse_scheme
from autoq.spec import ModelSpec
from autoq.targets import Target
from autoq.targets._vllm_rules import layout

VLLM = plugins.load("targets", "vllm", Target)
COUNTS = Histogram()
COUNTS.add(torch.randn(4000, generator=torch.Generator().manual_seed(0)).clamp(-3.0, 4.0))
RANGE = {
    "input_range": torch.tensor([-3.0, 4.0]),
    "input_counts": COUNTS.sums,
    "input_exponent": torch.tensor([COUNTS.exponent]),
}
EVERY = (
    "rtn-int4-g32-sym",
    "rtn-int4-g32",
    "hqq-int4-g64",
    "rtn-int4-channel",
    "rtn-int4-channel-sym",
    "rtn-int8-channel-sym",
    "rtn-int8-g32-sym",
    "rtn-int8-channel-sym-a8dyn",
    "rtn-int8-channel-sym-a8static",
    "rtn-int8-channel-sym-a8mse",
    "rtn-int8-tensor-sym-a8dyn",
    "rtn-fp8-channel",
    "rtn-fp8-tensor",
    "rtn-fp8-channel-a8dyn",
    "rtn-fp8-channel-a8static",
    "rtn-fp8-channel-a8pct",
    "rtn-fp8-channel-a8ent",
    "rtn-mxfp4-g32",
    "rtn-nvfp4-g16",
)


@pytest.fixture(scope="module")
def model(tiny_model_dir):
    """Family -> a tiny model, loaded once."""
    from autoq.models import load

    loaded = {}

    def get(family: str):
        if family not in loaded:
            loaded[family] = load(ModelSpec(id=str(tiny_model_dir(family))))
        return loaded[family]

    return get


def dealt(model, texts):
    """Weights of a model whose fusion groups take the schemes in turn, where the target runs them."""
    groups = {}
    for layer in model.info.layers:
        groups.setdefault(layer.fusion_group or layer.name, []).append(layer)
    weights = {}
    for index, members in enumerate(groups.values()):
        turn = (parse_scheme(texts[(index + shift) % len(texts)]) for shift in range(len(texts)))
        usable = (s for s in turn if all(VLLM.refuses(layer, s) is None for layer in members))
        scheme = next(usable, Keep())
        for layer in members:
            weights[layer.name] = plugins.load("methods", scheme.method, Method).quantize(
                model.weight(layer.name), scheme
            )
    return weights


def assignment(weights):
    return Assignment({name: weight.scheme for name, weight in weights.items()})


def export(model, weights, folder):
    folder.mkdir()
    return VLLM.export(model, weights, folder, lambda _: RANGE)


def evaluated(model, weights, tokens):
    """Logits as the evaluation computes them."""
    swapped = {n: w.dequantize(torch.bfloat16) for n, w in weights.items() if w.scheme != Keep()}
    functions = {n: f for n in swapped if (f := VLLM.activation(weights[n].scheme, RANGE)) is not None}
    model.swap(swapped, functions)
    try:
        with torch.inference_mode():
            return model.outputs(tokens.unsqueeze(0))[0].float()
    finally:
        model.restore()


def tokens(count=48):
    return torch.randint(4, 250, (count,), generator=torch.Generator().manual_seed(0))


class TestRefuses:
    LINEAR = Layer("q", "linear", 96, 128, 2, fusion_group="attn.q+k")

    @pytest.mark.parametrize("text", [*EVERY, "keep", "rtn-int4-g128-sym", "rtn-int8-g64-sym"])
    def test_not_what_runs(self, text):
        assert VLLM.refuses(self.LINEAR, parse_scheme(text)) is None

    @pytest.mark.parametrize(
        ("text", "rule"),
        [
            ("rtn-int3-g64", "there is no 3-bit kernel; choose 4 or 8 bits"),
            ("hqq-int4-g64-rz", r"zero points are codes \(integer\) or there are none"),
            ("rtn-int8-channel", "zero points run in 4 bits only"),
            ("rtn-int4-g16", "no kernel for groups of 16; choose from 32, 64, 128, channel"),
            ("rtn-int8-tensor-sym", "weight-only kernels have a scale per group or channel"),
            ("rtn-int4-g64-sym-a8dyn", "8-bit activations run with int8-channel-sym or int8-tensor-sym"),
            ("rtn-int8-g64-sym-a8dyn", "8-bit activations run with int8-channel-sym or int8-tensor-sym"),
            ("kmeans4-channel", "there is no kernel for kmeans4-channel"),
            ("gguf-q8_0", "there is no kernel for gguf-q8_0"),
            ("rtn-mxfp8-g32", "there is no kernel for mxfp8; choose from fp8, mxfp4, nvfp4"),
            ("rtn-fp8-g32", "fp8 runs with a scale per channel, tensor or b128x128, not per g32"),
            ("rtn-fp8-b64x128", "fp8 runs with a scale per channel, tensor or b128x128, not per b64x128"),
            ("rtn-fp8-b128x128", r"blocks of 128x128 must divide the layer, which has shape \(96, 128\)"),
            ("rtn-fp8-tensor-a8dyn", r"attn.q\+k run as one layer, whose FP8 codes vLLM would round again"),
        ],
    )
    def test_names_the_rule(self, text, rule):
        import re

        assert re.search(rule, VLLM.refuses(self.LINEAR, parse_scheme(text)))

    def test_shapes(self):
        def rule(out, inputs, text):
            return VLLM.refuses(Layer("x", "linear", out, inputs, 2), parse_scheme(text))

        assert rule(96, 96, "rtn-int4-g64") == "group size 64 does not divide the 96 inputs of shape (96, 96)"
        assert "inputs in multiples of 32, and the layer has shape (96, 48)" in rule(96, 48, "rtn-int4-channel")
        assert "outputs in multiples of 16, and the layer has shape (40, 64)" in rule(40, 64, "rtn-fp8-channel")
        assert rule(96, 96, "rtn-fp8-tensor-a8dyn") is None
        assert rule(40, 48, "keep") is None

    @pytest.mark.parametrize(
        ("layer", "rule"),
        [
            (Layer("e", "embedding", 96, 64, 2), "looks up rows of an embedding"),
            (Layer("h", "head", 96, 64, 2, tied=("e",)), "a head tied to one"),
            (Layer("c", "conv1d", 96, 64, 2), "a Conv1D stores its weight the other way round"),
            (Layer("f", "linear", 96, 64, 4), "scales ship in bfloat16"),
        ],
    )
    def test_layers_that_stay(self, layer, rule):
        assert rule in VLLM.refuses(layer, parse_scheme("rtn-int8-channel-sym"))
        assert VLLM.refuses(layer, Keep()) is None

    def test_an_untied_head_may_go(self):
        assert VLLM.refuses(Layer("lm_head", "head", 96, 64, 2), parse_scheme("rtn-int8-channel-sym")) is None

    def test_models(self, model):
        import dataclasses

        info = model("llama").info
        assert VLLM.refuses_model(info) is None
        assert VLLM.refuses_model(dataclasses.replace(info, task="seq2seq")) == (
            "vLLM generates with causal models, and LlamaForCausalLM is seq2seq"
        )
        assert "set model.dtype to bfloat16" in VLLM.refuses_model(dataclasses.replace(info, dtype="float16"))


@pytest.mark.parametrize("text", EVERY)
def test_every_scheme_comes_back_bit_for_bit(model, tmp_path, text):
    """Weights and logits as transformers computes them from the files are those that were evaluated."""
    llama = model("llama")
    weights = dealt(llama, [text])
    assert sum(weight.scheme == parse_scheme(text) for weight in weights.values()) >= 2
    exported = export(llama, weights, tmp_path / "out")
    assert exported.weights == ("model.safetensors",)
    assert exported.run == "vllm serve {folder}"
    with VLLM.reload(tmp_path / "out") as runtime:
        assert runtime.differences(assignment(weights)) == []
        for name, weight in weights.items():
            assert torch.equal(runtime.model.get_submodule(name).weight, weight.dequantize(torch.bfloat16)), name
        found = runtime.outputs(tokens())
    assert found.dtype == torch.float32
    assert torch.equal(found, evaluated(llama, weights, tokens()))


@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen3", "phi3", "gemma2", "gpt-neox"])
def test_all_schemes_in_one_model(model, tmp_path, family):
    own = model(family)
    weights = dealt(own, EVERY)
    assert len({weight.scheme for weight in weights.values()}) > 4
    export(own, weights, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["format"] == "mixed-precision"
    quantized = {name for name, weight in weights.items() if weight.scheme != Keep()}
    targets = [target for group in config["config_groups"].values() for target in group["targets"]]
    assert sorted(targets) == sorted(quantized)
    assert not quantized & set(config["ignore"])
    assert ("lm_head" in config["ignore"]) == ("lm_head" not in quantized)
    with VLLM.reload(tmp_path / "out") as runtime:
        assert runtime.differences(assignment(weights)) == []
        assert torch.equal(runtime.outputs(tokens()), evaluated(own, weights, tokens()))


def test_one_format_is_named_as_such_and_bytes_add_up(model, tmp_path):
    llama = model("llama")
    weights = dealt(llama, ["rtn-int4-g32-sym"])
    export(llama, weights, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["format"] == "pack-quantized"
    assert config["dtype"] == "bfloat16"
    from safetensors import safe_open

    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    shapes = [key for key in tensors if key.endswith("weight_shape")]
    stored = sum(t.numel() * t.element_size() for t in tensors.values()) - 16 * len(shapes)
    assert stored == sum(weight.nbytes for weight in weights.values()) + llama.info.other_bytes


def test_nothing_quantized_is_a_plain_checkpoint(model, tmp_path):
    llama = model("llama-tied")
    weights = dealt(llama, ["keep"])
    export(llama, weights, tmp_path / "out")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    with VLLM.reload(tmp_path / "out") as runtime:
        assert runtime.differences(assignment(weights)) == []
        assert torch.equal(runtime.outputs(tokens()), evaluated(llama, {}, tokens()))


def test_tokenizer_and_generation_config_go_with_it(model, tmp_path):
    from transformers import AutoTokenizer

    export(model("llama"), dealt(model("llama"), ["keep"]), tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").exists()
    again = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert again("hello")["input_ids"] == model("llama").tokenizer("hello")["input_ids"]


def test_large_models_are_written_in_shards(model, tmp_path, monkeypatch):
    from autoq.targets import _compressed_tensors_export as exporting

    monkeypatch.setattr(exporting, "SHARD_BYTES", 20_000)
    llama = model("llama")
    weights = dealt(llama, EVERY)
    exported = export(llama, weights, tmp_path / "out")
    assert len(exported.weights) > 2
    with VLLM.reload(tmp_path / "out") as runtime:
        assert runtime.differences(assignment(weights)) == []
        assert torch.equal(runtime.outputs(tokens()), evaluated(llama, weights, tokens()))


def test_blocks_of_fp8_come_back_bit_for_bit(tiny_models, tmp_path, monkeypatch):
    """As a DeepSeek-V3-style checkpoint: a scale per 128x128, beside layers that are stored otherwise."""
    from safetensors import safe_open

    from autoq.models import load

    kind, cls, settings = tiny_models.FAMILIES["llama"]
    wide = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setitem(tiny_models.FAMILIES, "llama", (kind, cls, {**settings, **wide}))
    own = load(ModelSpec(id=str(tiny_models.save("llama", tmp_path / "in"))))
    weights = dealt(own, ["rtn-fp8-b128x128", "rtn-fp8-b128x128", "rtn-int4-g32"])
    export(own, weights, tmp_path / "out")
    blocked = [name for name, weight in weights.items() if str(weight.scheme) == "rtn-fp8-b128x128"]
    assert len(blocked) > 4
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        for name in blocked:
            rows, columns = weights[name].shape
            scale = file.get_tensor(f"{name}.weight_scale")
            assert scale.shape == (rows // 128, columns // 128)
            blocks = file.get_tensor(f"{name}.weight").float().view(rows // 128, 128, columns // 128, 128)
            values = (blocks * scale.float()[:, None, :, None]).view(rows, columns)
            assert torch.equal(values, weights[name].dequantize())
    with VLLM.reload(tmp_path / "out") as runtime:
        assert runtime.differences(assignment(weights)) == []
        assert torch.equal(runtime.outputs(tokens()), evaluated(own, weights, tokens()))


class TestExportRefuses:
    def test_layers_that_run_as_one_and_differ(self, model, tmp_path):
        llama = model("llama")
        weights = dealt(llama, ["rtn-int8-channel-sym"])
        name = "model.layers.1.self_attn.k_proj"
        weights[name] = plugins.load("methods", "rtn", Method).quantize(
            llama.weight(name), parse_scheme("rtn-int4-g32")
        )
        with pytest.raises(SchemeRefused, match=r"q_proj \(rtn-int8.*k_proj \(rtn-int4-g32\) run as one layer"):
            export(llama, weights, tmp_path / "out")
        assert not list((tmp_path / "out").iterdir())

    def test_what_no_kernel_runs(self, model, tmp_path):
        llama = model("llama")
        name = "model.layers.1.mlp.down_proj"
        weights = {
            name: plugins.load("methods", "rtn", Method).quantize(llama.weight(name), parse_scheme("rtn-int3-g32"))
        }
        with pytest.raises(SchemeRefused, match=rf"layer {name} as rtn-int3-g32: there is no 3-bit kernel"):
            export(llama, weights, tmp_path / "out")

    def test_a_model_without_generation(self, model, tmp_path):
        bert = model("bert-mlm")
        with pytest.raises(ModelRefused, match="BertForMaskedLM is masked"):
            export(bert, {}, tmp_path / "out")

    def test_a_folder_that_cannot_be_written(self, model, tmp_path):
        (tmp_path / "out").write_text("")
        with pytest.raises(AutoQError, match="cannot be written"):
            VLLM.export(model("llama"), {}, tmp_path / "out", lambda _: RANGE)


class TestNvfp4:
    """vLLM reads one global scale of layers that it merges."""

    def test_layers_that_run_as_one_share_a_global_scale(self, model, tmp_path):
        from safetensors.torch import load_file

        llama = model("llama")
        names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
        weights = {}
        for factor, name in zip((1, 8, 0.3), names, strict=True):
            scaled = llama.weight(name) * factor
            weights[name] = plugins.load("methods", "rtn", Method).quantize(scaled, parse_scheme("rtn-nvfp4-g16"))
        assert len({float(w.tensors["global_scale"]) for w in weights.values()}) > 1
        export(llama, weights, tmp_path / "out")
        files = load_file(tmp_path / "out" / "model.safetensors")
        assert len({float(files[f"{name}.weight_global_scale"]) for name in names}) == 1
        with VLLM.reload(tmp_path / "out") as runtime:
            for name, weight in weights.items():
                assert torch.equal(runtime.model.get_submodule(name).weight, weight.dequantize(torch.bfloat16))

    def test_weights_too_far_apart_are_refused_by_name(self, model, tmp_path):
        llama = model("llama")
        names = [f"model.layers.0.self_attn.{part}_proj" for part in "qkv"]
        weights = {
            name: plugins.load("methods", "rtn", Method).quantize(
                llama.weight(name) * factor, parse_scheme("rtn-nvfp4-g16")
            )
            for factor, name in zip((1, 1e6, 1), names, strict=True)
        }
        with pytest.raises(AutoQError, match=r"q_proj runs as one layer with .*k_proj.*; choose another scheme"):
            export(llama, weights, tmp_path / "out")


class TestDamage:
    @pytest.fixture
    def exported(self, model, tmp_path):
        weights = dealt(model("llama"), ["rtn-int4-g32-sym"])
        export(model("llama"), weights, tmp_path / "out")
        return tmp_path / "out", weights

    def edited(self, folder, change):
        config = json.loads((folder / "config.json").read_text())
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config))

    def test_a_truncated_file(self, exported):
        file = exported[0] / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(AutoQError, match="transformers does not load"):
            VLLM.reload(exported[0])

    def test_a_layer_that_is_no_longer_targeted(self, exported):
        self.edited(exported[0], lambda config: config["config_groups"]["group_0"]["targets"].pop(0))
        with pytest.raises(AutoQError, match=r"lacks 1 of its tensors, the first being .*\.weight"):
            VLLM.reload(exported[0])

    def test_other_schemes_than_asked_for(self, exported):
        folder, weights = exported
        schemes = dict(assignment(weights))
        name = next(n for n, s in schemes.items() if s != Keep())
        other = next(n for n, s in schemes.items() if s == Keep())
        schemes[name], schemes[other] = parse_scheme("hqq-int4-g64"), parse_scheme("rtn-fp8-channel")
        schemes["nowhere"] = Keep()
        with VLLM.reload(folder) as runtime:
            assert sorted(runtime.differences(Assignment(schemes))) == sorted(
                [
                    "nowhere: no such layer in the files",
                    f"{name}: int4-g32-sym in the files, int4-g64 in the assignment",
                    f"{other}: keep in the files, fp8-channel in the assignment",
                ]
            )

    def test_tensors_that_are_not_those_of_the_config(self, exported, tmp_path):
        from safetensors.torch import load_file, save_file

        folder, weights = exported
        with VLLM.reload(folder) as runtime:
            tensors = load_file(folder / "model.safetensors")
            name = next(n for n, w in weights.items() if w.scheme != Keep())
            tensors[f"{name}.weight_scale"] = tensors[f"{name}.weight_scale"].float()
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
            found = runtime.differences(assignment(weights))
        assert len(found) == 1
        assert found[0].startswith(f"{name}.weight_scale: (torch.float32")


@pytest.mark.parametrize("text", ["rtn-int8-channel-sym-a8dyn", "rtn-fp8-channel-a8dyn"])
def test_inputs_are_rounded_per_token_as_compressed_tensors_does(text):
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStatus
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    x = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    x[0, 2] = 0
    x[0, 3] *= 1000
    kind = "int" if "int" in text else "float"
    args = QuantizationArgs(num_bits=8, type=kind, symmetric=True, strategy="token", dynamic=True)
    module = torch.nn.Linear(64, 64)
    module.quantization_status = QuantizationStatus.COMPRESSED
    before = x.clone()
    assert torch.equal(VLLM.activation(parse_scheme(text))(x), forward_quantize(module, x, "input", args))
    assert torch.equal(x, before)


def test_a_calibrated_range_ends_at_the_largest_code():
    function = VLLM.activation(
        parse_scheme("rtn-int8-channel-sym-a8static"), {"input_range": torch.tensor([-127.0, 63.5])}
    )
    assert function(torch.tensor([127.0, -130.0, 0.4, 0.6, 1.5])).tolist() == [127.0, -128.0, 0.0, 1.0, 2.0]


class TestConfig:
    @pytest.mark.parametrize("text", [*EVERY, "rtn-fp8-b128x128"])
    def test_groups_are_read_back_and_known_to_compressed_tensors(self, text):
        from compressed_tensors.quantization import QuantizationScheme

        from autoq.targets._compressed_tensors_config import group_of, layout_of

        group = group_of(parse_scheme(text), ["a.b"])
        assert layout_of(group) == layout(parse_scheme(text))
        known = QuantizationScheme.model_validate(group)
        assert layout_of(json.loads(known.model_dump_json())) == layout(parse_scheme(text))

    def test_names_patterns_and_classes_are_targets(self):
        from autoq.targets._compressed_tensors_config import group_of, layouts

        config = {
            "quantization_config": {
                "config_groups": {
                    "a": group_of(parse_scheme("rtn-int4-g32"), [r"re:.*\.q$"]),
                    "b": group_of(parse_scheme("rtn-fp8-channel"), ["Linear"]),
                },
                "ignore": ["lm_head"],
            }
        }
        names = {"x.q": "Linear", "x.k": "Linear", "lm_head": "Linear", "e": "Embedding"}
        assert layouts(config, names) == {"x.q": "int4-g32", "x.k": "fp8-channel", "lm_head": "keep", "e": "keep"}

    def test_what_no_scheme_says_is_told_in_words(self):
        from autoq.targets._compressed_tensors_config import layout_of

        blocks = {"num_bits": 8, "type": "float", "strategy": "block"}
        assert "block" in layout_of({"weights": blocks})
        assert "block" in layout_of({"weights": blocks | {"block_structure": [64, 64]}})
        inputs = {"num_bits": 4, "type": "int", "strategy": "token", "dynamic": True}
        weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
        assert layout_of({"weights": weights, "input_activations": inputs}).startswith("int4-channel-sym, inputs")


def test_availability_names_the_package(monkeypatch):
    import importlib.util

    assert VLLM.unavailable() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert VLLM.unavailable() == "compressed_tensors is not installed: pip install 'autoq[vllm]'"
