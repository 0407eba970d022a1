"""Loading: dtype, memory, weights that are missing, ties that the config does not tell."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers.utils import logging

from autoq.errors import AutoQError, ModelRefused
from autoq.models import LoadedModel, inspect, load
from autoq.models.conversion import from_gguf
from autoq.spec import ModelSpec


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("AUTOQ_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tiny_model_dir, tmp_path) -> Path:
    return Path(shutil.copytree(tiny_model_dir("llama-tied"), tmp_path / "model"))


def rewrite(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def mapped_file(tensor: torch.Tensor) -> str:
    """The file that the tensor's memory is mapped to; empty for ordinary memory."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, *_, last = line.split(maxsplit=5)
        start, end = (int(bound, 16) for bound in span.split("-"))
        if start <= tensor.data_ptr() < end:
            return last
    return ""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="this system does not show memory maps")
def test_weights_stay_mapped_to_their_file_in_either_dtype(folder, cache):
    model = load(ModelSpec(id=str(folder)))
    assert {mapped_file(model.weight(layer.name)) for layer in model.info.layers} == {str(folder / "model.safetensors")}
    wide = load(ModelSpec(id=str(folder), dtype="float32"))
    (copy,) = {mapped_file(wide.weight(layer.name)) for layer in wide.info.layers}
    assert copy.startswith(str(cache))


def test_a_conversion_is_done_once_and_again_when_the_file_changed(folder, cache):
    spec = ModelSpec(id=str(folder), dtype="float32")
    load(spec)
    (first,) = (cache / "models").glob("cast-*")
    stamp = (first / "model.safetensors").stat().st_mtime_ns
    load(spec)
    assert (first / "model.safetensors").stat().st_mtime_ns == stamp
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(3.0))
    assert torch.all(load(spec).model.model.norm.weight == 3.0)
    assert len(list((cache / "models").glob("cast-*"))) == 2
    assert not list((cache / "models").glob(".*.partial"))


def test_numbers_that_do_not_fit_are_refused(folder):
    rewrite(folder, lambda tensors: tensors["model.norm.weight"].fill_(1e6))
    with pytest.raises(ModelRefused, match=r"model\.norm\.weight does not fit torch\.float16"):
        load(ModelSpec(id=str(folder), dtype="float16"))


def test_a_dtype_in_which_some_layers_stay_wide_is_refused(tiny_model_dir):
    with pytest.raises(ModelRefused, match=r"keeps .*\.wo in float32 .*choose model\.dtype bfloat16 or float32"):
        inspect(ModelSpec(id=str(tiny_model_dir("t5")), dtype="float16"))


def test_missing_weights_are_not_replaced_by_random_ones(folder):
    rewrite(folder, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelRefused, match=r"lacks 1 of its weights, the first being model\.layers\.1\.mlp\.up_proj"):
        load(ModelSpec(id=str(folder)))


def test_weights_of_another_shape_are_refused(folder):
    rewrite(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(7, dtype=torch.bfloat16)}))
    with pytest.raises(
        ModelRefused, match=r"has another shape .* for 1 of its weights, the first being model\.norm\.weight"
    ):
        load(ModelSpec(id=str(folder)))


def test_a_head_of_its_own_is_found_although_the_config_ties_it(folder):
    spec = ModelSpec(id=str(folder))
    assert inspect(spec).layer("lm_head").tied == ("model.embed_tokens",)
    rewrite(folder, lambda tensors: tensors.update({"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}))
    assert inspect(spec).layer("lm_head").tied == ("model.embed_tokens",)
    rewrite(folder, lambda tensors: tensors["lm_head.weight"].add_(1))
    info = inspect(spec)
    assert info.layer("lm_head").tied == ()
    assert info.layer("model.embed_tokens").kind == "embedding"
    assert load(spec).info == info


def test_a_checkpoint_without_tokenizer_is_refused(folder):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    with pytest.raises(ModelRefused, match="no usable tokenizer"):
        load(ModelSpec(id=str(folder)))


def test_a_decoder_without_start_token_is_refused(tiny_model_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_model_dir("t5-tied"), tmp_path / "t5"))
    config = json.loads((folder / "config.json").read_text())
    del config["decoder_start_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelRefused, match="no decoder_start_token_id"):
        inspect(ModelSpec(id=str(folder)))


def test_loading_says_nothing_and_leaves_logging_as_it_was(folder, capfd):
    before = logging.get_verbosity(), logging.is_progress_bar_enabled()
    load(ModelSpec(id=str(folder), dtype="float32"))
    assert capfd.readouterr() == ("", "")
    assert (logging.get_verbosity(), logging.is_progress_bar_enabled()) == before


def test_swap_refuses_unknown_names_before_it_changes_anything(tiny_model_dir):
    model: LoadedModel = load(ModelSpec(id=str(tiny_model_dir("llama"))))
    name = model.info.layers[0].name
    with pytest.raises(KeyError):
        model.swap({name: torch.zeros_like(model.weight(name)), "nonesuch": torch.zeros(1)})
    assert model.modules_of(model.info.layers[0])[0].weight.data_ptr() == model.weight(name).data_ptr()
    with pytest.raises(AssertionError):
        model.swap({name: model.weight(name).double()})
    with pytest.raises(AssertionError):
        model.swap({name: model.weight(name)[:1]})
    model.restore()
    assert model.modules_of(model.info.layers[0])[0].weight.data_ptr() == model.weight(name).data_ptr()


def test_a_seq2seq_model_sees_its_own_start_token(tiny_model_dir):
    model = load(ModelSpec(id=str(tiny_model_dir("bart"))))
    ids = torch.tensor([[7, 8, 9, 10]])
    shifted = torch.tensor([[model.model.config.decoder_start_token_id, 7, 8, 9]])
    expected = model.model(input_ids=ids, decoder_input_ids=shifted).logits
    assert torch.equal(model.outputs(ids), expected)
    changed = model.outputs(torch.tensor([[7, 8, 9, 11]]))
    assert not torch.equal(changed, expected)


class TestGGUF:
    @pytest.fixture
    def file(self, tmp_path) -> Path:
        """A GGUF file of a tiny Llama in float32, written from scratch: weights and tokenizer."""
        import gguf
        import tokenizers

        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(64)
        writer.add_embedding_length(32)
        writer.add_block_count(1)
        writer.add_feed_forward_length(64)
        writer.add_head_count(4)
        writer.add_head_count_kv(4)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_rope_freq_base(10000.0)
        writer.add_vocab_size(261)
        writer.add_tokenizer_model("gpt2")
        specials = ["<unk>", "<s>", "</s>", "<pad>"]
        letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
        writer.add_token_list([*specials, *letters, "ab"])
        writer.add_token_types([3] * 4 + [1] * 257)
        writer.add_token_merges(["a b"])
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        generator = torch.Generator().manual_seed(0)
        shapes = {"token_embd": (261, 32), "blk.0.ffn_down": (32, 64)}
        shapes |= {f"blk.0.attn_{part}": (32, 32) for part in ("q", "k", "v", "output")}
        shapes |= {f"blk.0.ffn_{part}": (64, 32) for part in ("gate", "up")}
        shapes |= dict.fromkeys(("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"), (32,))
        for name, shape in shapes.items():
            writer.add_tensor(f"{name}.weight", torch.randn(shape, generator=generator).numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    def test_it_is_converted_once_and_then_needs_no_gguf(self, file, cache, capfd):
        model = load(ModelSpec(id=str(file)))
        assert capfd.readouterr() == ("", "")
        assert model.info.architecture == "LlamaForCausalLM"
        assert model.info.dtype == "bfloat16"
        assert model.tokenizer.decode(model.tokenizer("hello").input_ids, skip_special_tokens=True) == "hello"
        (made,) = (cache / "models").glob("gguf-*-bfloat16")
        assert "quantization_config" not in json.loads((made / "config.json").read_text())
        stamp = (made / "model.safetensors").stat().st_mtime_ns
        assert inspect(ModelSpec(id=str(file))) == model.info
        assert (made / "model.safetensors").stat().st_mtime_ns == stamp
        wide = load(ModelSpec(id=str(file), dtype="float32"))
        layer = "model.layers.0.mlp.up_proj"
        assert torch.equal(wide.weight(layer).bfloat16(), model.weight(layer))
        assert not torch.equal(wide.weight(layer), model.weight(layer).float())

    def test_a_damaged_file_is_refused_and_leaves_nothing(self, file, cache):
        file.write_bytes(file.read_bytes()[:200])
        with pytest.raises(ModelRefused, match="cannot be read as GGUF"):
            load(ModelSpec(id=str(file)))
        assert [path.name for path in (cache / "models").iterdir() if not path.name.endswith(".lock")] == []

    def test_without_the_package_it_says_what_to_install(self, file, monkeypatch):
        real = importlib.util.find_spec
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gguf" else real(name, *a))
        with pytest.raises(AutoQError, match=r"pip install 'autoq\[gguf\]'"):
            from_gguf(file, "bfloat16")


def test_demo_models_and_sources_are_reachable_without_torch():
    code = (
        "import sys, autoq.models, autoq.models.demo, autoq.models.sources, autoq.cache\n"
        "heavy = {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
        "assert callable(autoq.models.load)\n"
        "try:\n    autoq.models.nonesuch\nexcept AttributeError: pass\nelse: raise AssertionError\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
