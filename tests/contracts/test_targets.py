"""What every target promises, whichever it is."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from autoq import plugins
from autoq.kv_cache import BITS, Cache, KeyValue
from autoq.layer import Layer
from autoq.methods import Method
from autoq.scheme import Gguf, Keep, parse_scheme
from autoq.spec import TargetSpec
from autoq.targets import Target

LAYERS = [
    Layer("linear", "linear", 96, 64, 2, fusion_group="a"),
    Layer("biased", "linear", 96, 64, 2, has_bias=True),
    Layer("odd", "linear", 7, 5, 2),
    Layer("float32", "linear", 96, 64, 4),
    Layer("conv1d", "conv1d", 192, 64, 2, has_bias=True),
    Layer("embedding", "embedding", 100, 64, 2),
    Layer("head", "head", 112, 64, 2),
    Layer("tied", "head", 112, 64, 2, tied=("embedding",)),
]
NAMES = plugins.names("targets")


def load(name):
    return plugins.load("targets", name, Target)


def schemes_of(target):
    grid = target.grid()
    return [s for name in grid.methods for s in plugins.load("methods", name, Method).schemes(name, grid)]


def test_there_are_targets():
    assert {"generic", "torch_cpu"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
class TestTarget:
    def test_is_described_in_one_line_and_named_in_specs(self, name):
        assert 10 < len(plugins.summary("targets", name)) < 120
        assert TargetSpec(name=name.replace("_", "-")).plugin == name

    def test_grid_has_axes_of_known_values(self, name):
        grid = load(name).grid()
        for axis in ("methods", "bits", "granularities", "zero_points", "activations"):
            values = getattr(grid, axis)
            assert values
            assert len(set(values)) == len(values)
        assert set(grid.methods) <= set(plugins.names("methods"))

    def test_every_layer_may_be_kept(self, name):
        assert all(load(name).refuses(layer, Keep()) is None for layer in LAYERS)

    def test_refuses_with_one_clause_or_none(self, name):
        target = load(name)
        for layer in LAYERS:
            for scheme in schemes_of(target):
                rule = target.refuses(layer, scheme)
                assert rule is None or (rule and "\n" not in rule and not rule.endswith("."))
                assert rule == target.refuses(layer, scheme)

    def test_pruned_weights_run_where_nothing_times_them(self, name):
        """No runtime here has a kernel for them; a new one that has is to say so here."""
        for text in ("wanda24", "magnitude50-int8-channel-sym", "wanda24-int4-g64"):
            rule = load(name).refuses(LAYERS[0], parse_scheme(text))
            assert (rule is None) == (name == "generic")
            assert rule is None or ("\n" not in rule and not rule.endswith("."))

    def test_quantized_caches_run_where_nothing_times_or_exports_them(self, name):
        """A target whose kernels and exports have them is to say so here."""
        for bits in BITS:
            rule = load(name).refuses_cache(Cache("attention", 2, 64, 64, 2), KeyValue(bits))
            assert (rule is None) == (name == "generic")
            assert rule is None or (rule and "\n" not in rule and not rule.endswith("."))

    def test_the_grid_holds_something_to_run_beside_keep(self, name):
        target = load(name)
        runs = {s for s in schemes_of(target) if target.refuses(LAYERS[0], s) is None}
        assert len(runs) > 1
        assert any(plugins.load("methods", s.method, Method).refuses(LAYERS[0], s) is None for s in runs - {Keep()})

    def test_baselines_are_schemes_of_known_methods(self, name):
        baselines = load(name).baselines()
        assert list(baselines["unquantized"]) == [Keep()]
        for title, preference in baselines.items():
            assert preference, title
            for scheme in preference:
                assert parse_scheme(str(scheme)) == scheme
                assert scheme.method in plugins.names("methods")

    def test_every_baseline_runs_on_an_ordinary_layer(self, name):
        target = load(name)
        for title, preference in target.baselines().items():
            usable = [
                s
                for s in preference
                if target.refuses(LAYERS[0], s) is None
                and plugins.load("methods", s.method, Method).refuses(LAYERS[0], s) is None
            ]
            assert usable, title

    def test_latencies_are_latency_objectives(self, name):
        target = load(name)
        assert target.latencies <= set(plugins.names("objectives"))
        assert all(objective.startswith("latency_") for objective in target.latencies)

    def test_activations_are_functions_where_a_scheme_has_them(self, name):
        target = load(name)
        for scheme in schemes_of(target):
            if target.refuses(LAYERS[0], scheme) is None:
                quantizes = getattr(scheme, "activation", None) is not None
                statistics = {"input_range": torch.tensor([-1.0, 2.0])} if quantizes else None
                # A type of llama.cpp quantizes its input too, as the type says; not every one does.
                if quantizes or not isinstance(scheme, Gguf):
                    assert callable(target.activation(scheme, statistics)) == quantizes

    def test_availability_is_one_line(self, name):
        missing = load(name).unavailable()
        assert missing is None or (missing and "\n" not in missing)


# Weights that few runtimes multiply, and who does; whoever is not named must say no.
RARE = {
    "rtn-fp8-channel": {"generic", "vllm"},
    "rtn-fp8-b128x128": {"generic", "vllm"},
    "rtn-mxfp4-g32": {"generic", "vllm"},
    "rtn-nvfp4-g16": {"generic", "vllm"},
    **{
        text: {"generic"}
        for text in (
            "rtn-fp8-g32", "rtn-fp8_e5m2-channel", "rtn-fp8_e5m2-g32", "rtn-fp8_e5m2-b32x32",
            "rtn-fp4-g32", "rtn-fp4-channel", "rtn-mxfp8-g32", "rtn-mxfp8_e5m2-g32", "rtn-mxfp6_e2m3-g32",
            "rtn-mxfp6_e3m2-g32", "nf4-g64", "nf2-channel", "log4-g64", "kmeans4-channel",
        )
    },
}  # fmt: skip


@pytest.mark.parametrize("text", RARE)
def test_rare_formats_run_only_where_a_kernel_is_known(text):
    scheme, layer = parse_scheme(text), Layer("x", "linear", 256, 256, 2)
    rules = {name: load(name).refuses(layer, scheme) for name in NAMES}
    assert {name for name, rule in rules.items() if rule is None} == RARE[text]
    assert all(rule is None or (rule and "\n" not in rule) for rule in rules.values())


def test_loading_and_asking_targets_imports_no_torch():
    program = f"""
import json, sys
from autoq import plugins
from autoq.layer import Layer
from autoq.scheme import Gguf, parse_scheme
from autoq.targets import Target
layer = Layer("proj", "linear", 96, 64, 2)
for name in {list(NAMES)!r}:
    target = plugins.load("targets", name, Target)
    target.refuses(layer, parse_scheme("rtn-int4-g64"))
    target.baselines()
    target.unavailable()
print(json.dumps([m for m in ("torch", "transformers", "numpy") if m in sys.modules]))
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert json.loads(ended.stdout) == []
