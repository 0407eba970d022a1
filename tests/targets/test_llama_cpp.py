"""The target llama-cpp: what it refuses, times, writes and loads again."""

from __future__ import annotations

import gc
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from autoq import plugins
from autoq.assignment import Assignment
from autoq.errors import AutoQError, ModelRefused, SpecError
from autoq.layer import Layer
from autoq.methods import Method
from autoq.models import inspect, load
from autoq.scheme import Gguf, Keep, parse_scheme
from autoq.spec import ModelSpec, TargetSpec
from autoq.targets import UNQUANTIZED, Target, load_target
from autoq.targets import _llama_cpp_timing as timing
from autoq.targets._gguf_file import layer_types, write
from autoq.targets._llama_cpp_engine import Engine
from autoq.targets._llama_cpp_files import TimingFiles

TARGET = plugins.load("targets", "llama_cpp", Target)
GGUF = plugins.load("methods", "gguf", Method)
WORKLOAD = TargetSpec(name="llama-cpp", batch_size=2, prompt_tokens=8, threads=1)
TOKENS = torch.tensor([1, 200, 30, 4, 77, 250, 5, 5, 101, 9])
LATENCIES = {"latency_decode_ms", "latency_prefill_ms"}


@pytest.fixture(scope="module")
def spec(tiny_model_dir):
    return ModelSpec(id=str(tiny_model_dir("llama")), dtype="float32")


@pytest.fixture(scope="module")
def model(spec):
    return load(spec)


def quantized(model, *kinds):
    """Every layer but the embedding, in each of `kinds` in turn."""
    layers = [layer for layer in model.info.layers if layer.kind != "embedding"]
    schemes = [parse_scheme(f"gguf-{kinds[i % len(kinds)]}") for i in range(len(layers))]
    return {
        layer.name: GGUF.quantize(model.weight(layer.name), scheme)
        for layer, scheme in zip(layers, schemes, strict=True)
    }


def assigned(model, weights):
    return Assignment({x.name: weights[x.name].scheme if x.name in weights else Keep() for x in model.info.layers})


@pytest.mark.parametrize(
    ("scheme", "rule"),
    [
        ("gguf-q4_k", r"blocks of 256 do not divide the 576 inputs of shape \(192, 576\)"),
        ("rtn-int4-g32", "llama.cpp runs GGUF types .* not rtn-int4-g32"),
        ("gguf-q4_0-im", None),
        ("gguf-f16", None),
        ("keep", None),
    ],
)
def test_rules_name_the_shape(scheme, rule):
    found = TARGET.refuses(Layer("k_proj", "linear", 192, 576, 4), parse_scheme(scheme))
    if rule is None:
        assert found is None
    else:
        assert re.search(rule, found)


def test_an_architecture_that_gguf_does_not_know_is_refused(tiny_model_dir):
    assert "MixtralForCausalLM" in TARGET.refuses_model(inspect(ModelSpec(id=str(tiny_model_dir("mixtral")))))
    assert TARGET.refuses_model(inspect(ModelSpec(id=str(tiny_model_dir("qwen3"))))) is None


def test_presets_cover_every_layer_with_what_runs(spec):
    info = inspect(spec)
    found = TARGET.presets(info)
    assert {"q4_0", "q4_k_m", "q8_0"} <= set(found)
    for name, schemes in found.items():
        assert set(schemes) == {layer.name for layer in info.layers}, name
        assert all(TARGET.refuses(layer, schemes[layer.name]) is None for layer in info.layers)


def test_missing_packages_are_named(monkeypatch, spec):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "libgguf" else object())
    assert TARGET.unavailable() == "libgguf is not installed: pip install 'autoq[llama-cpp]'"
    with pytest.raises(AutoQError, match="target llama-cpp: libgguf is not installed"):
        TARGET.other_bytes(inspect(spec), spec)


@pytest.fixture(scope="module")
def weights(model):
    return quantized(model, "q4_0", "q8_0", "f16")


@pytest.fixture(scope="module")
def folder(model, weights, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    exported = TARGET.export(model, weights, folder, {}.__getitem__)
    assert exported.weights == ("model.gguf",)
    assert "{folder}" in exported.run
    return folder


class TestExport:
    def test_the_file_has_the_promised_size(self, model, spec, weights, folder):
        layers = sum(layer.nbytes(assigned(model, weights)[layer.name]) for layer in model.info.layers)
        promised = layers + TARGET.other_bytes(model.info, spec)
        assert (folder / "model.gguf").stat().st_size == pytest.approx(promised, rel=0.005)

    def test_it_computes_what_was_searched(self, model, weights, folder):
        schemes = {name: weight.scheme for name, weight in weights.items()}
        activations = {name: TARGET.activation(scheme) for name, scheme in schemes.items()}
        model.swap({name: weight.dequantize() for name, weight in weights.items()}, activations)
        with torch.inference_mode():
            expected = model.outputs(TOKENS[None])[0].log_softmax(-1)
        model.restore()
        with TARGET.reload(folder, threads=1) as runtime:
            found = runtime.outputs(TOKENS).log_softmax(-1)
        assert F.kl_div(found, expected, reduction="batchmean", log_target=True) < 1e-5

    def test_its_types_are_the_assignment(self, model, weights, folder):
        assignment = assigned(model, weights)
        with TARGET.reload(folder, threads=1) as runtime:
            assert runtime.differences(assignment) == []
            name = "model.layers.0.mlp.up_proj"
            other = Assignment({**assignment, name: Gguf("q5_0"), "model.embed_tokens": Gguf("q8_0")})
            lines = runtime.differences(other)
        assert lines == [
            "model.embed_tokens is f32 in model.gguf, not q8_0 (gguf-q8_0)",
            f"{name} is {weights[name].scheme.type} in model.gguf, not q5_0 (gguf-q5_0)",
        ]

    def test_kept_layers_are_of_one_kind(self, model, folder, weights):
        kept = Assignment(dict.fromkeys(assigned(model, weights), Keep()))
        with TARGET.reload(folder, threads=1) as runtime:
            assert any("q4_0 in model.gguf, not f16 (keep)" in line for line in runtime.differences(kept))

    def test_it_is_timed(self, folder):
        with TARGET.reload(folder, threads=1) as runtime:
            found = runtime.time(WORKLOAD)
        assert {m.objective for m in found} == LATENCIES
        assert all(m.value > 0 and m.part == "report" and m.kind == "measured" for m in found)

    def test_long_windows_get_a_longer_context(self, folder, monkeypatch):
        monkeypatch.setattr("autoq.targets._llama_cpp_runtime._CONTEXT", 4)
        with TARGET.reload(folder, threads=1) as runtime:
            assert runtime.outputs(TOKENS).shape == (10, 300)

    def test_a_damaged_file_is_one_line(self, folder, tmp_path):
        with pytest.raises(AutoQError, match=r"there is no model\.gguf"):
            TARGET.reload(tmp_path)
        (tmp_path / "model.gguf").write_bytes((folder / "model.gguf").read_bytes()[:-4000])
        with pytest.raises(AutoQError, match=r"model\.gguf: it cannot load the file") as caught:
            TARGET.reload(tmp_path, threads=1)
        assert "\n" not in str(caught.value)


class TestTiming:
    def test_in_turns_with_the_unquantized_model(self, model):
        found = TARGET.time(model, quantized(model, "q4_0", "q8_0"), WORKLOAD)
        assert {m.objective for m in found} == LATENCIES
        for measurement in found:
            assert (measurement.kind, measurement.part, measurement.unit) == ("measured", "report", "ms")
            assert measurement.value > 0
            assert measurement.stderr > 0
            assert measurement.detail[UNQUANTIZED] > 0
            assert measurement.detail["threads"] == 1
            assert measurement.detail["runtime"].startswith("llama.cpp (xllamacpp ")
            assert measurement.detail["kernels"] == {"gguf-q4_0": "q4_0", "gguf-q8_0": "q8_0"}
            assert "cpu_ms" in measurement.detail

    def test_the_unquantized_model_is_loaded_once(self, model):
        bench = timing.bench_for(model, WORKLOAD)
        assert timing.bench_for(model, WORKLOAD) is bench
        longer = timing.bench_for(model, WORKLOAD.model_copy(update={"prompt_tokens": 12}))
        assert longer is not bench
        assert bench.unquantized.closed
        assert not longer.unquantized.closed
        assert list(Path(longer._folder.name).iterdir()) == []  # killed now, it would leave nothing behind

    def test_it_goes_with_the_model(self, spec):
        model = load(spec)
        bench = timing.bench_for(model, WORKLOAD)
        del model
        gc.collect()
        assert bench.unquantized.closed
        assert not Path(bench._folder.name).exists()

    def test_a_table_covers_its_choices_and_predicts_the_unquantized_model(self, model):
        choices = {
            layer.name: [GGUF.quantize(model.weight(layer.name), Gguf(kind)) for kind in ("q4_0", "q8_0")]
            for layer in model.info.layers
        }
        table = TARGET.cost_table(model, choices, WORKLOAD)
        texts = {name: ["gguf-q4_0", "gguf-q8_0", "keep"] for name in choices}
        assert table.covers(texts, sorted(LATENCIES))
        for phase in LATENCIES:
            kept = table.predict(phase, Assignment(dict.fromkeys(choices, Keep())))
            assert kept == pytest.approx(table.detail[UNQUANTIZED][phase])
        assert 4 <= table.detail["files"] <= 6  # each type on all layers, then mixed

    def test_a_prompt_beyond_the_positions_is_refused(self, model):
        with pytest.raises(SpecError, match=r"target\.prompt_tokens: 120 is too long for a model of 128 positions"):
            TARGET.time(model, {}, WORKLOAD.model_copy(update={"prompt_tokens": 120}))

    def test_a_model_that_gguf_cannot_hold_is_refused(self, tiny_model_dir):
        other = load(ModelSpec(id=str(tiny_model_dir("gpt-neox"))))
        with pytest.raises(ModelRefused, match="GPTNeoXForCausalLM"):
            TARGET.time(other, {}, WORKLOAD.model_copy(update={"prompt_tokens": 4}))


def test_a_timing_file_is_the_exported_one_but_for_the_order_of_rows(model, tmp_path):
    weights = quantized(model, "q4_0", "q8_0", "f16")
    files = TimingFiles(model, tmp_path / "unquantized.gguf")
    files.write(weights, tmp_path / "quick.gguf")
    write(model, weights, tmp_path / "whole.gguf")
    quick, whole = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("quick", "whole"))
    assert len(quick) == len(whole)
    names = [layer.name for layer in model.info.layers]
    assert layer_types(tmp_path / "quick.gguf", "LlamaForCausalLM", names) == layer_types(
        tmp_path / "whole.gguf", "LlamaForCausalLM", names
    )
    files.write({}, tmp_path / "kept.gguf")
    assert (tmp_path / "kept.gguf").read_bytes() == (tmp_path / "unquantized.gguf").read_bytes()
    with Engine(tmp_path / "quick.gguf", 1, 32) as engine:
        assert engine.logits([1]).shape == (1, 300)


def test_a_spec_of_this_target_takes_no_described_device():
    with pytest.raises(SpecError):
        load_target(TargetSpec(name="llama-cpp", device="phone"))
