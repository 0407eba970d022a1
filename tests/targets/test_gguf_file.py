"""GGUF files: llama.cpp computes from them what transformers computes, and they say what is in them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers

from autoq import plugins
from autoq.errors import AutoQError, ModelRefused, SchemeRefused
from autoq.methods import Method
from autoq.models import load
from autoq.models.loaded import LoadedModel
from autoq.scheme import Gguf, Keep, parse_scheme
from autoq.spec import ModelSpec
from autoq.targets import _gguf_file, _gguf_names
from autoq.targets._gguf_file import GgufFile, layer_types, other_bytes, read_layer, write
from autoq.targets._gguf_names import FAMILIES, layer_tensors, supported, tensor_name
from autoq.targets._llama_cpp_engine import Engine

METHOD = plugins.load("methods", "gguf", Method)
_SHARP = {
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}  # so that attention looks somewhere
_GROUPED = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    **_SHARP,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
_PARTIAL = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}
_GPT2 = {"vocab_size": 300, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, **_SHARP}

# name -> (config class, model class, config): every way that a supported model may differ from its fellows
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": False}),
    "llama-tied": ("Llama", "LlamaForCausalLM", {**_GROUPED, "tie_word_embeddings": True}),
    "llama-biased": ("Llama", "LlamaForCausalLM", {**_GROUPED, "attention_bias": True, "mlp_bias": True}),
    "llama-wide-heads": ("Llama", "LlamaForCausalLM", {**_GROUPED, "head_dim": 16}),
    "llama-scaled": ("Llama", "LlamaForCausalLM", {**_GROUPED, "rope_parameters": _LLAMA3}),
    "llama-stretched": ("Llama", "LlamaForCausalLM", {**_GROUPED, "rope_parameters": _LINEAR}),
    "mistral": ("Mistral", "MistralForCausalLM", {**_GROUPED, "sliding_window": 96}),
    "qwen2": ("Qwen2", "Qwen2ForCausalLM", _GROUPED),
    "qwen2-stretched": ("Qwen2", "Qwen2ForCausalLM", {**_GROUPED, "rope_parameters": _LINEAR}),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", {**_GROUPED, "head_dim": 16}),
    "phi3": ("Phi3", "Phi3ForCausalLM", _GROUPED),
    "phi3-partial": ("Phi3", "Phi3ForCausalLM", {**_GROUPED, "rope_parameters": _PARTIAL}),
    "gpt2": ("GPT2", "GPT2LMHeadModel", _GPT2),
}


@pytest.fixture(scope="module")
def model_dir(tiny_models: ModuleType, tmp_path_factory: pytest.TempPathFactory):
    """Variant -> folder of a checkpoint in float32 whose norms and biases are random, too."""
    made: dict[str, Path] = {}

    def folder(name: str) -> Path:
        if name not in made:
            config_class, model_class, settings = VARIANTS[name]
            torch.manual_seed(1)
            config = getattr(transformers, f"{config_class}Config")(**settings)
            model = getattr(transformers, model_class)(config)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
            tiny_models.tokenizer().save_pretrained(made[name])
        return made[name]

    return folder


def loaded(folder: Path, dtype: Any = "float32") -> LoadedModel:
    return load(ModelSpec(id=str(folder), dtype=dtype))


def quantized(model: LoadedModel, *texts: str):
    """Weights of every layer, the schemes in turn; a scheme that a layer cannot be is left out."""
    weights = {}
    for index, layer in enumerate(model.info.layers):
        scheme = parse_scheme(texts[index % len(texts)])
        if METHOD.refuses(layer, scheme) is None:
            weights[layer.name] = METHOD.quantize(model.weight(layer.name), scheme)
    return weights


def kl(reference: torch.Tensor, logits: np.ndarray[Any, Any]) -> float:
    """The largest KL divergence of a token, in nats."""
    p = reference.double().log_softmax(-1)
    q = torch.from_numpy(logits).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).max())


def divergence(model: LoadedModel, weights: Any, path: Path) -> float:
    """KL of llama.cpp's logits from transformers' on the dequantized weights."""
    tokens = torch.randint(0, model.info.vocab_size, (48,), generator=torch.Generator().manual_seed(0))
    model.swap({name: weight.dequantize(model.weight(name).dtype) for name, weight in weights.items()})
    try:
        with torch.inference_mode():
            reference = model.outputs(tokens.unsqueeze(0))[0].float()
    finally:
        model.restore()
    with Engine(path, threads=1, context=64) as engine:
        return kl(reference, engine.logits(tokens.tolist()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_llama_cpp_computes_what_transformers_computes(variant, model_dir, tmp_path):
    """To what its half-precision cache of keys and values leaves. Logits are sharp: misplaced rows cost nats."""
    model = loaded(model_dir(variant))
    write(model, {}, tmp_path / "model.gguf")
    assert divergence(model, {}, tmp_path / "model.gguf") < 1e-4


@pytest.mark.parametrize("variant", ["llama-tied", "qwen3", "gpt2"])
def test_quantized_layers_arrive_where_they_belong(variant, model_dir, tmp_path):
    """What is left is llama.cpp's 8-bit activations."""
    model = loaded(model_dir(variant))
    weights = quantized(model, "gguf-q8_0", "gguf-q5_1", "gguf-f16")
    write(model, weights, tmp_path / "model.gguf")
    right = divergence(model, weights, tmp_path / "model.gguf")
    assert right < 0.05
    first, *_ = (name for name in weights if name.endswith(("q_proj", "c_attn")))
    shuffled = dict(weights)
    shuffled[first] = METHOD.quantize(model.weight(first).roll(1, 0), Gguf("q8_0"))
    write(model, shuffled, tmp_path / "other.gguf")
    assert divergence(model, weights, tmp_path / "other.gguf") > 5 * right


def test_rows_out_of_order_would_show(model_dir, tmp_path, monkeypatch):
    model = loaded(model_dir("llama"))
    monkeypatch.setattr(_gguf_file, "heads_of", lambda *_: None)
    write(model, {}, tmp_path / "model.gguf")
    assert divergence(model, {}, tmp_path / "model.gguf") > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_weights_come_back_as_they_went_in(variant, model_dir, tmp_path):
    model = loaded(model_dir(variant), "bfloat16")
    weights = quantized(model, "gguf-q4_0", "gguf-q5_1", "gguf-f16", "keep")
    path = tmp_path / "model.gguf"
    write(model, weights, path)
    names = [layer.name for layer in model.info.layers]
    types = layer_types(path, model.info.architecture, names)
    for name in names:
        weight = weights.get(name)
        assert types[name] == ("bf16" if weight is None or isinstance(weight.scheme, Keep) else weight.scheme.type)
        back = read_layer(path, model.info.architecture, name)
        expected = model.weight(name) if weight is None else weight.dequantize(torch.float32)
        assert torch.equal(back.dequantize(), expected.float())
        if weight is not None:
            assert torch.equal(back.tensors["blocks"], weight.tensors["blocks"])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kept_layers_ship_in_the_models_numbers_and_all_else_in_float32(dtype, model_dir, tmp_path):
    model = loaded(model_dir("gpt2"), dtype)
    write(model, {}, tmp_path / "model.gguf")
    file = gguf.GGUFReader(tmp_path / "model.gguf")
    kept = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    layers = set(layer_tensors("GPT2LMHeadModel", model.info.layers).values())
    assert {"token_embd.weight", "position_embd.weight", "blk.1.attn_qkv.weight"} <= layers
    for tensor in file.tensors:
        assert tensor.tensor_type.name == (kept if tensor.name in layers else "F32"), tensor.name
    assert len({tensor.name for tensor in file.tensors}) == 2 + 2 * 12 + 2


def test_the_file_is_what_the_package_gguf_reads(model_dir, tmp_path):
    model = loaded(model_dir("llama-tied"))
    write(model, quantized(model, "gguf-q4_1"), tmp_path / "model.gguf")
    file = gguf.GGUFReader(tmp_path / "model.gguf")
    told = {name: field.contents() for name, field in file.fields.items()}
    assert told["GGUF.version"] == 3
    assert told["GGUF.tensor_count"] == len(file.tensors) == 1 + 2 * 9 + 1
    assert told["general.architecture"] == "llama"
    assert told["llama.attention.head_count_kv"] == 2
    assert told["llama.rope.dimension_count"] == 8
    assert told["general.quantization_version"] == gguf.GGML_QUANT_VERSION
    assert len(told["tokenizer.ggml.tokens"]) == 300
    head, *others = file.tensors
    assert head.name == "token_embd.weight"
    assert head.tensor_type.name == "Q4_1"
    assert list(head.shape) == [32, 300]
    assert all(tensor.data_offset % 32 == 0 for tensor in others)
    norm = next(tensor for tensor in others if tensor.name == "output_norm.weight")
    assert np.array_equal(norm.data, model.model.state_dict()["model.norm.weight"].numpy())


def test_a_sliding_window_ends_the_context(model_dir, tmp_path):
    """llama.cpp attends to everything, which within one window is the same."""
    write(loaded(model_dir("mistral")), {}, tmp_path / "model.gguf")
    assert gguf.GGUFReader(tmp_path / "model.gguf").fields["llama.context_length"].contents() == 96


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("schemes", [["keep"], ["gguf-q8_0"], ["gguf-q4_0", "gguf-q5_0", "gguf-f16"]])
def test_the_size_is_known_before_there_are_weights(variant, schemes, model_dir, tmp_path):
    folder = model_dir(variant)
    model = loaded(folder, "bfloat16")
    weights = quantized(model, *schemes)
    write(model, weights, tmp_path / "model.gguf")
    layers = sum(
        layer.nbytes(weights[layer.name].scheme if layer.name in weights else Keep()) for layer in model.info.layers
    )
    short = (tmp_path / "model.gguf").stat().st_size - layers - other_bytes(model.info, folder)
    assert 0 <= short < 32 * len(model.info.layers)
    if schemes == ["keep"]:
        assert short == 0


def test_the_same_model_gives_the_same_bytes(model_dir, tmp_path):
    for name in ("a", "b"):
        model = loaded(model_dir("llama"))
        write(model, quantized(model, "gguf-q4_0"), tmp_path / name)
        write(model, quantized(model, "gguf-q4_0"), tmp_path / f"{name}-again")
    contents = {path.read_bytes() for path in tmp_path.iterdir()}
    assert len(contents) == 1
    assert str(model_dir("llama")).encode() not in contents.pop()


def test_names_of_tensors():
    assert tensor_name("LlamaForCausalLM", "model.layers.11.mlp.up_proj") == "blk.11.ffn_up.weight"
    assert tensor_name("Qwen3ForCausalLM", "model.layers.0.self_attn.o_proj") == "blk.0.attn_output.weight"
    assert tensor_name("GPT2LMHeadModel", "transformer.h.3.attn.c_attn") == "blk.3.attn_qkv.weight"
    assert tensor_name("LlamaForCausalLM", "lm_head") == "output.weight"
    with pytest.raises(ModelRefused, match=r"model.layers.0.nothing.weight of LlamaForCausalLM has no place"):
        tensor_name("LlamaForCausalLM", "model.layers.0.nothing")


def test_other_architectures_are_refused_with_the_choices():
    assert all(supported(architecture) is None for architecture in FAMILIES)
    reason = supported("GemmaForCausalLM")
    assert reason == f"GGUF export knows no GemmaForCausalLM; choose from {', '.join(FAMILIES)}"
    with pytest.raises(ModelRefused, match="knows no BertModel"):
        tensor_name("BertModel", "encoder")


@pytest.mark.parametrize(
    ("variant", "changes", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu', and llama.cpp computes 'silu'"),
        (
            "llama",
            {"rope_parameters": {**_LINEAR, "rope_type": "yarn"}},
            "rope_type 'yarn'; choose from default, linear",
        ),
        ("qwen2", {"rope_parameters": _LLAMA3}, "rope_type 'llama3'; choose from default, linear$"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx True"),
        ("gpt2", {"activation_function": "relu"}, "activation_function 'relu'"),
    ],
)
def test_what_llama_cpp_does_not_compute_is_refused(variant, changes, message, model_dir, tmp_path):
    model = loaded(model_dir(variant))
    for name, value in changes.items():
        setattr(model.model.config, name, value)
    with pytest.raises(ModelRefused, match=message) as refusal:
        write(model, {}, tmp_path / "model.gguf")
    assert "\n" not in str(refusal.value)
    assert not list(tmp_path.iterdir())


def test_schemes_of_other_targets_are_refused(model_dir, tmp_path):
    model = loaded(model_dir("llama"))
    name = "model.layers.0.mlp.up_proj"
    rtn = plugins.load("methods", "rtn", Method).quantize(model.weight(name), parse_scheme("rtn-int4-g32"))
    with pytest.raises(SchemeRefused, match=f"^layer {name} as rtn-int4-g32: a GGUF file holds GGUF types"):
        write(model, {name: rtn}, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_no_file(model_dir, tmp_path, monkeypatch):
    model = loaded(model_dir("llama"))
    real = _gguf_file._bytes

    def full(tensor: Any, order: Any) -> Any:
        if order is not None:
            raise OSError(28, "No space left on device")
        return real(tensor, order)

    monkeypatch.setattr(_gguf_file, "_bytes", full)
    with pytest.raises(AutoQError, match=r"^model.gguf cannot be written: No space left on device$"):
        write(model, {}, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def whole(model_dir, tmp_path_factory):
    path = tmp_path_factory.mktemp("whole") / "model.gguf"
    write(loaded(model_dir("llama")), {}, path)
    return path


@pytest.mark.parametrize("share", [0.0, 0.00001, 0.0005, 0.01, 0.1, 0.3, 0.7, 0.999])
def test_a_truncated_file_is_one_line(share, whole, tmp_path):
    content = whole.read_bytes()
    (tmp_path / "cut.gguf").write_bytes(content[: int(len(content) * share)])
    with pytest.raises(AutoQError, match=r"^cut.gguf (cannot be read as GGUF|is not whole)") as problem:
        layer_types(tmp_path / "cut.gguf", "LlamaForCausalLM", ["lm_head"])
    assert "\n" not in str(problem.value)


def test_bytes_of_another_kind_are_one_line(tmp_path, whole):
    (tmp_path / "other.gguf").write_bytes(b"PK\x03\x04" + bytes(1000))
    with pytest.raises(AutoQError, match=r"^other.gguf cannot be read as GGUF: not a GGUF file"):
        GgufFile(tmp_path / "other.gguf", "LlamaForCausalLM")
    with pytest.raises(AutoQError, match=r"^none.gguf cannot be read as GGUF"):
        GgufFile(tmp_path / "none.gguf", "LlamaForCausalLM")
    generator = np.random.default_rng(0)
    content = bytearray(whole.read_bytes()[:4000])
    for _ in range(200):  # whatever a header says, it ends in time and in one line
        harmed = bytearray(content)
        for place in generator.integers(4, 4000, 8):
            harmed[place] = generator.integers(0, 256)
        (tmp_path / "harmed.gguf").write_bytes(harmed)
        with pytest.raises(AutoQError, match=r"^harmed.gguf"):
            GgufFile(tmp_path / "harmed.gguf", "LlamaForCausalLM")


def test_another_models_file_is_named(whole):
    with pytest.raises(AutoQError, match=r"^model.gguf holds a model of architecture llama, not of gpt2 \(GPT2LMHead"):
        GgufFile(whole, "GPT2LMHeadModel")
    with pytest.raises(AutoQError, match=r"^model.gguf has no tensor blk.7.ffn_up.weight for the layer model.layers.7"):
        layer_types(whole, "LlamaForCausalLM", ["model.layers.7.mlp.up_proj"])


def test_a_weight_that_is_shared_otherwise_is_refused():
    layer = SimpleNamespace(name="model.layers.0.mlp.up_proj", tied=("model.layers.1.mlp.up_proj",))
    with pytest.raises(ModelRefused, match=r"shares its weight with model.layers.1.mlp.up_proj, which GGUF cannot say"):
        _gguf_names.layer_tensors("LlamaForCausalLM", [layer])


@pytest.mark.slow
def test_a_real_model_in_half_precision_is_the_model(tmp_path):
    import pydoc_data.topics

    spec = ModelSpec(id="demo:smollm2", dtype="float32")
    model = load(spec)
    text = pydoc_data.topics.topics["assert"] + pydoc_data.topics.topics["lambda"]
    tokens = torch.tensor(model.tokenizer(text)["input_ids"][:128])
    with torch.inference_mode():
        reference = model.outputs(tokens.unsqueeze(0))[0]
    for kind in ("keep", "gguf-f16"):
        write(model, quantized(model, kind) if kind != "keep" else {}, tmp_path / "model.gguf")
        with Engine(tmp_path / "model.gguf", threads=2, context=160) as engine:
            assert kl(reference, engine.logits(tokens.tolist())) < 1e-4
    types = layer_types(tmp_path / "model.gguf", model.info.architecture, [layer.name for layer in model.info.layers])
    assert set(types.values()) == {"f16"}
