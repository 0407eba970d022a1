"""compressed-tensors configs: who is matched by what, which numbers are which scheme, what is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from autoq.layer import Layer
from autoq.recipes import RecipeRefused, _integers
from autoq.recipes.compressed_tensors import _Matching

from .conftest import llama

LINEARS = [layer.name for layer in llama().layers if layer.kind == "linear"]
Q = "model.layers.0.self_attn.q_proj"
W4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 128, "symmetric": True, "dynamic": False}
W8 = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
A8 = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}
F8 = {"num_bits": 8, "type": "float", "strategy": "tensor"}


@pytest.fixture(autouse=True)
def _only_rtn(monkeypatch):
    monkeypatch.setattr(_integers, "_METHODS", ("rtn",))


def config(*groups, ignore=("lm_head",), **more):
    named = {f"group_{i}": group for i, group in enumerate(groups)}
    tree = {"quant_method": "compressed-tensors", "config_groups": named, "ignore": list(ignore)}
    return {"architectures": ["LlamaForCausalLM"], "quantization_config": tree | more}


def group(weights=W4, targets=("Linear",), **more):
    return {"targets": list(targets), "weights": weights, "input_activations": None, "output_activations": None} | more


@pytest.mark.parametrize(
    ("weights", "inputs", "text"),
    [
        (W4, None, "rtn-int4-g128-sym"),
        (W4 | {"symmetric": False, "group_size": 64, "actorder": "weight"}, None, "rtn-int4-g64"),
        ({"num_bits": 4, "group_size": 32}, None, "rtn-int4-g32-sym"),
        ({"num_bits": 8, "group_size": -1}, None, "rtn-int8-channel-sym"),
        ({"num_bits": 8}, None, "rtn-int8-tensor-sym"),
        (W8, A8, "rtn-int8-channel-sym-a8dyn"),
        (W8, {"num_bits": 8, "dynamic": False, "strategy": "tensor"}, "rtn-int8-channel-sym-a8static"),
        (F8, F8, "rtn-fp8-tensor-a8static"),
        (F8 | {"strategy": "channel"}, A8 | {"type": "float"}, "rtn-fp8-channel-a8dyn"),
        (F8 | {"strategy": "block", "block_structure": [128, 128]}, None, "rtn-fp8-b128x128"),
        ({"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}, None, "rtn-nvfp4-g16"),
        ({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 32}, None, "rtn-mxfp4-g32"),
    ],
)
def test_numbers_are_schemes(recipe, monkeypatch, weights, inputs, text):
    monkeypatch.setattr("autoq.recipes._refusal", lambda *_: None)
    found = recipe("config.json", config(group(weights, input_activations=inputs)))
    assert found == dict.fromkeys(LINEARS, text)


def test_a_mixture_has_experts_that_are_linears_and_a_router_that_is_known_by_name():
    matching = _Matching(["Linear", "model.layers.1.mlp.gate"], ["re:.*experts.7.*"])
    assert matching.target("model.layers.0.mlp.experts.3.down_proj", "linear") == "Linear"
    assert matching.target("model.layers.0.mlp.experts.7.down_proj", "linear") is None
    assert matching.target("model.layers.0.mlp.gate", "router") is None
    assert matching.target("model.layers.1.mlp.gate", "router") == "model.layers.1.mlp.gate"


def test_names_come_before_expressions_and_these_before_classes(recipe):
    found = recipe(
        "config.json",
        config(
            group(W8, ["Linear"]),
            group(W4 | {"group_size": 64}, [r"re:.*\.mlp\..*", r"re:.*q_proj"]),
            group(W4, [Q, r"re:.*\.up_proj$"]),
            ignore=["lm_head", r"re:.*\.1\.mlp", "model.layers.1.self_attn.o_proj"],
        ),
    )
    expected = dict.fromkeys(LINEARS, "rtn-int8-channel-sym")
    expected |= {name: "rtn-int4-g64-sym" for name in LINEARS if ".mlp." in name or name.endswith("q_proj")}
    # Of two expressions the alphabet decides: `.*\.mlp` stands before `.*\.up_proj`.
    expected[Q] = "rtn-int4-g128-sym"
    for name in LINEARS:
        if ".1.mlp" in name or name == "model.layers.1.self_attn.o_proj":
            del expected[name]
    assert found == expected


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.q_proj, self.o_proj = nn.Linear(4, 4), nn.Linear(4, 4)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(4, 4)
        self.layers = nn.ModuleList([Attention(), Attention()])
        self.lm_head = nn.Linear(4, 4)


@pytest.mark.parametrize(
    ("targets", "ignore"),
    [
        (["Linear"], ["lm_head"]),
        (["Linear", "Embedding"], []),
        (["re:.*q_proj", "Linear", "layers.0.o_proj"], ["re:layers.1"]),
        (["re:q_proj", "re:layers.*", "re:lay"], ["re:.*o_proj$"]),
        (["Module"], ["Embedding"]),
        (["lm_head", "Embedding", "re:.*"], ["Linear"]),
        (["re:b.*|l.*", "re:[el].*"], []),
    ],
)
def test_matching_is_that_of_the_library(targets, ignore):
    import compressed_tensors.utils.match as library  # takes seconds, and one test needs it

    ours = _Matching(targets, ignore)
    with torch.device("meta"):
        model = Model()
    chosen = {
        name: library.match_targets(name, module, targets)[0]
        for name, module in library.match_named_modules(model, targets, ignore)
    }
    compared = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            kind = "embedding" if isinstance(module, nn.Embedding) else "head" if name == "lm_head" else "linear"
            assert ours.target(name, kind) == chosen.get(name), name
            compared += 1
    assert compared == 6


def test_the_last_group_that_names_a_target_has_it(recipe):
    assert set(recipe("config.json", config(group(W8), group(W4))).values()) == {"rtn-int4-g128-sym"}


def test_a_group_without_weights_leaves_its_layers_alone(recipe):
    found = recipe("config.json", config(group(W8), group(None, [Q])))
    assert set(found) == {*LINEARS} - {Q}


def test_a_shared_weight_must_be_said_once_or_twice_the_same(recipe):
    tied = llama(tied=True)
    assert set(recipe("config.json", config(group()), tied)) == set(LINEARS)
    with pytest.raises(RecipeRefused, match=r"lm_head: rtn-int4-g128-sym; model.embed_tokens: keep"):
        recipe("config.json", config(group(), ignore=()), tied)
    both = recipe("config.json", config(group(targets=["Linear", "Embedding"]), ignore=()), tied)
    assert both == dict.fromkeys([*LINEARS, "lm_head"], "rtn-int4-g128-sym")


def test_a_conv1d_is_not_quantized_by_class_and_refused_by_name(recipe):
    info = replace(llama(), layers=(Layer("h.0.c_attn", "conv1d", 768, 256, 2), Layer("lin", "linear", 256, 256, 2)))
    assert recipe("config.json", config(group()), info) == {"lin": "rtn-int4-g128-sym"}
    with pytest.raises(RecipeRefused, match=r"'re:h\.\*' fits h.0.c_attn, a Conv1D"):
        recipe("config.json", config(group(targets=["re:h.*"])), info)


@pytest.mark.parametrize(
    ("tree", "fragment"),
    [
        (config(group(W4 | {"num_bits": 16})), "group_0.weights.num_bits: 16 bits is out of range"),
        (config(group(W4 | {"type": "complex"})), "group_0.weights.type must be one of int, float (got 'complex')"),
        (config(group(W4 | {"strategy": "block"})), "weights.strategy must be one of group, channel, tensor"),
        (config(group(W4 | {"group_size": None})), "weights.group_size must be a whole number (got None)"),
        (config(group(W4 | {"actorder": "group"})), "weights.actorder puts inputs that are no neighbours"),
        (config(group(W4 | {"dynamic": True})), "weights.dynamic must be false for weights"),
        (config(group(F8 | {"num_bits": 6})), "weights.num_bits must be 4 or 8 for floats"),
        (config(group(F8 | {"symmetric": False})), "weights.symmetric must be true for floats"),
        (config(group(F8 | {"strategy": "group", "group_size": 32})), "strategy must be one of channel, tensor"),
        (config(group(F8 | {"strategy": "block"})), "block_structure must be two whole numbers of at least 2"),
        (
            config(group(F8 | {"strategy": "block", "block_structure": [128, "128"]})),
            "block_structure must be two whole numbers of at least 2",
        ),
        (
            config(
                group(
                    F8 | {"strategy": "block", "block_structure": [128, 128]},
                    input_activations=A8 | {"type": "float"},
                )
            ),
            "blocks of floats with inputs quantized per token have no scheme here",
        ),
        (config(group({"num_bits": 8, "type": "float", "group_size": 32})), "group_size makes the strategy group"),
        (
            config(group({"num_bits": 4, "type": "float", "strategy": "group", "group_size": 64})),
            "weights.group_size must be 32",
        ),
        (config(group(W8, input_activations=A8 | {"num_bits": 4})), "input_activations.num_bits must be 8"),
        (config(group(W8, input_activations=A8 | {"type": "float"})), "input_activations.type must be one of int"),
        (config(group(F8, input_activations={"num_bits": 8})), "input_activations.type must be one of float"),
        (config(group(W8, input_activations=A8 | {"symmetric": False})), "symmetric must be true for inputs"),
        (config(group(W8, input_activations=A8 | {"strategy": "tensor"})), "strategy must be one of token"),
        (config(group(W8, input_activations=A8 | {"dynamic": False})), "strategy must be one of tensor"),
        (config(group(W8, input_activations=A8 | {"dynamic": "local"})), "dynamic must be true or false"),
        (config(group(None, input_activations=A8)), "input_activations without weights has no scheme"),
        (config(group(W8, output_activations=A8)), "output_activations has no scheme here"),
        (config(group(), kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme has no scheme here"),
        (config(group(), transform_config={"u": 1}), "transform_config has no scheme here"),
        (config(group(), format="marlin-24"), "format is sparse"),
        (config(group(), sparsity_config={"format": "sparse-bitmask"}), "sparsity_config.format must be one of dense"),
        (
            config(group(targets=["Linear", "model.layers.7.fc"])),
            "targets that fit nothing in the model: model.layers.7",
        ),
        (config(group(targets=["re:("])), "the pattern '(' is not a regular expression"),
        (config(group(targets="Linear") | {"targets": "Linear"}), "group_0.targets must be a list of texts"),
        (config(["Linear"]), "config_groups.group_0 must be a mapping (got ['Linear'])"),
        (config(ignore=[3]), "ignore must be a list of texts"),
    ],
)
def test_what_has_no_scheme_is_refused(recipe, tree, fragment):
    with pytest.raises(RecipeRefused) as caught:
        recipe("config.json", tree)
    assert fragment in str(caught.value)
    assert "\n" not in str(caught.value)


def test_empty_sections_say_nothing(recipe):
    tree = config(group(), sparsity_config={}, transform_config={}, kv_cache_scheme=None, format="pack-quantized")
    assert set(recipe("config.json", tree)) == set(LINEARS)
