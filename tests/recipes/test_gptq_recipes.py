"""GPTQ configs: base values, dynamic rules as GPTQModel reads them, and what is refused."""

from dataclasses import replace

import pytest

from autoq import plugins
from autoq.layer import Layer
from autoq.recipes import RecipeRefused, _integers

from .conftest import Anything, llama

LINEARS = [layer.name for layer in llama().layers if layer.kind == "linear"]
BASE = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False}


@pytest.fixture(autouse=True)
def _only_rtn(monkeypatch):
    monkeypatch.setattr(_integers, "_METHODS", ("rtn",))


def test_the_base_holds_for_the_linears_of_the_blocks(recipe):
    assert recipe("quantize_config.json", BASE) == dict.fromkeys(LINEARS, "rtn-int4-g128-sym")


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"bits": 8, "group_size": -1}, "rtn-int8-channel-sym"),
        ({"bits": 3, "group_size": 64, "sym": False}, "rtn-int3-g64"),
        ({"bits": 4}, "rtn-int4-g128-sym"),
        ({"bits": 4, "group_size": 32, "desc_act": True, "static_groups": True}, "rtn-int4-g32-sym"),
        ({"bits": 4, "group_size": -1, "desc_act": True}, "rtn-int4-channel-sym"),
        ({"bits": 4, "checkpoint_format": "gptq_v2", "meta": {"quantizer": "x"}, "damp_percent": 0.1}, None),
    ],
)
def test_base_values(recipe, values, text):
    wanted = {"quantization_config": {"quant_method": "gptq"} | values}
    assert recipe("config.json", wanted) == dict.fromkeys(LINEARS, text or "rtn-int4-g128-sym")


def test_rules_are_asked_in_order_and_the_first_that_fits_the_beginning_decides_alone(recipe):
    dynamic = {
        r"-:.*\.1\.self_attn": {},
        r"+:.*\.mlp\.(up|gate)_proj": {"bits": 8},
        r".*\.mlp\.": {"bits": 2, "group_size": 64, "sym": False},
        r"+:model\.layers\.0\.mlp\.up_proj": {"bits": 3},
        r"-:self_attn": {},  # would fit if expressions were searched for
    }
    found = recipe("quantize_config.json", BASE | {"dynamic": dynamic})
    for name in LINEARS:
        if ".1.self_attn" in name:
            assert name not in found
        elif "mlp.up" in name or "mlp.gate" in name:
            assert found[name] == "rtn-int8-g128-sym"
        elif "mlp" in name:
            assert found[name] == "rtn-int2-g64"
        else:
            assert found[name] == "rtn-int4-g128-sym"


def test_the_head_takes_part_where_it_is_asked_for(recipe):
    assert recipe("c.json", BASE | {"lm_head": True})["lm_head"] == "rtn-int4-g128-sym"
    with pytest.raises(RecipeRefused, match="lm_head needs a head of its own"):
        recipe("c.json", BASE | {"lm_head": True}, llama(tied=True))


@pytest.mark.parametrize("steps", [["self_attn.k_proj", "mlp.up_proj"], [["self_attn.k_proj"], ["mlp.up_proj"]]])
def test_named_modules_of_a_block(recipe, steps):
    found = recipe("c.json", BASE | {"modules_in_block_to_quantize": steps})
    assert set(found) == {name for name in LINEARS if name.endswith((".k_proj", ".up_proj"))}


def test_the_first_method_that_can_makes_the_weights(recipe, monkeypatch):
    monkeypatch.setattr(_integers, "_METHODS", ("hqq", "rtn"))

    def made(*refused):
        target = Anything(lambda layer, scheme: f"no {scheme.method}" if scheme.method in refused else None)
        return set(recipe("c.json", BASE | {"sym": False}, target=target).values())

    assert made() == {"hqq-int4-g128"}
    assert made("hqq") == {"rtn-int4-g128"}
    with pytest.raises(RecipeRefused, match="rtn-int4-g128: no rtn"):
        made("hqq", "rtn")


def test_gptq_makes_them_where_it_exists(monkeypatch):
    monkeypatch.undo()
    assert _integers._METHODS == ("gptq", "rtn")
    assert "rtn" in plugins.names("methods")


def test_conv1d_of_a_block_takes_part(recipe):
    info = llama()
    layers = [
        Layer("h.0.attn.c_attn", "conv1d", 768, 256, 2, block=0),
        Layer("wte", "embedding", 300, 256, 2),
        Layer("classifier", "linear", 256, 256, 2),
    ]
    assert recipe("c.json", BASE, replace(info, layers=tuple(layers))) == {"h.0.attn.c_attn": "rtn-int4-g128-sym"}


@pytest.mark.parametrize(
    ("more", "fragment"),
    [
        ({"bits": 9}, "c.json.bits: 9 bits is out of range; choose from 2 to 8"),
        ({"bits": "4"}, "c.json.bits must be a whole number (got '4')"),
        ({"bits": True}, "c.json.bits must be a whole number (got True)"),
        ({"group_size": 0}, "c.json.group_size must be at least 2, or -1"),
        ({"group_size": None, "sym": "yes"}, "c.json.sym must be true or false (got 'yes')"),
        ({"desc_act": True}, "c.json.desc_act puts inputs that are no neighbours into a group"),
        ({"format": "gguf"}, "c.json.format must be one of gptq, gptq_v2, marlin, bitblas (got 'gguf')"),
        ({"adapter": {"rank": 8}}, "c.json.adapter has no scheme here"),
        ({"dynamic": []}, "c.json.dynamic must be a mapping (got [])"),
        ({"dynamic": {"x": 4}}, "c.json.dynamic['x'] must be a mapping (got 4)"),
        ({"dynamic": {".*": {"bits": 1}}}, "c.json.dynamic['.*'].bits: 1 bits is out of range"),
        ({"dynamic": {".*": {"adapter": {}}}}, "dynamic['.*'].adapter has no scheme here; choose from bits, group_"),
        ({"dynamic": {"+:no": {"bits": 3}}}, "dynamic: the rule '+:no' fits no layer that is quantized"),
        ({"dynamic": {"-:(": {}}}, "the pattern '(' is not a regular expression"),
        ({"dynamic": {"x" * 3000: {}}}, "is longer than 2000 characters"),
        ({"group_size": 48}, "group size 48 does not divide"),
        ({"modules_in_block_to_quantize": ["fc1"]}, "'fc1' is no layer of a block"),
        ({"modules_in_block_to_quantize": 3}, "modules_in_block_to_quantize must be a list of texts (got 3)"),
    ],
)
def test_what_has_no_scheme_is_refused(recipe, more, fragment):
    with pytest.raises(RecipeRefused) as caught:
        recipe("c.json", BASE | more)
    assert fragment in str(caught.value)


def test_a_rule_that_leaves_layers_alone_may_fit_none(recipe):
    assert set(recipe("c.json", BASE | {"dynamic": {r"-:.*\.vision": {}}})) == set(LINEARS)


def test_a_pattern_that_never_ends_is_cut_off(recipe, monkeypatch):
    monkeypatch.setattr("autoq.recipes._files.MAX_MATCHING_SECONDS", 0.05)
    with pytest.raises(RecipeRefused, match="takes too long to match"):
        recipe("c.json", BASE | {"dynamic": {r"-:(?:.*?(.)){12}\1{9}": {}}})
