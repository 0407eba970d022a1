"""GPTQ: `quantize_config.json` of GPTQModel and AutoGPTQ, or `quantization_config` of a GPTQ checkpoint.

`bits`, `group_size` and `sym` hold for every linear layer inside the model's blocks, and for an untied
head where `lm_head` is true; `modules_in_block_to_quantize` narrows that down. `dynamic` maps regular
expressions to other values, as GPTQModel's `dynamic_get` reads it (gptqmodel/quantization/config.py):
rules are asked in their order, an expression must fit the beginning of a layer's full name, and the
first rule that fits decides alone. `-:expression` leaves its layers as they are; `+:expression`, or the
bare expression, overrides the fields that it names, the others keep the base values. No rule adds a
layer.

Weights are quantized anew: by the method gptq where it exists, otherwise by rtn.

What there is no scheme for is refused: adapters, rotations, and `desc_act` with groups, whose inputs
then are no neighbours (unless `static_groups` keeps them).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from autoq.errors import BadInput
from autoq.layer import Layer, ModelInfo
from autoq.recipes._files import Rules, Section, shown
from autoq.recipes._integers import group_granularity, integers
from autoq.scheme import PerChannel, Scheme

_FORMATS = ("gptq", "gptq_v2", "marlin", "bitblas")
_REPRESENTATION = ("bits", "group_size", "sym", "desc_act", "static_groups")
# What a rule may say about how codes are searched for: it leaves the representation as it is.
_SEARCH = {"mse", "damp_percent", "damp_auto_increment", "true_sequential", "act_group_aware", "gptaq", "hessian"}
_DEFAULT_GROUP_SIZE = 128


def schemes(config: Section, info: ModelInfo) -> Mapping[str, Sequence[Scheme]]:
    """Layer name -> schemes in order of preference, for the layers that the config quantizes.

    Raises `BadInput` naming field, value and choices.
    """
    config.choice("quant_method", ("gptq",), "gptq")
    for field in ("format", "checkpoint_format"):
        config.choice(field, _FORMATS, "gptq")
    for field in ("adapter", "rotation"):
        if field in config:
            config.refuse(field, "has no scheme here; leave it out")
    # Read even where rules override it everywhere: a config whose base is not usable is not to be trusted.
    _quantized(config)
    layers = _layers(config, info)
    rules, dynamic = Rules(), _rules(config)
    used: set[str] = set()
    found: dict[str, Sequence[Scheme]] = {}
    for layer in layers:
        rule = next((rule for rule in dynamic if rules.match(_expression(rule), layer.name)), None)
        if rule is None:
            found[layer.name] = _quantized(config)
            continue
        used.add(rule)
        if (override := dynamic[rule]) is not None:
            merged = {field: config.fields().get(field) for field in _REPRESENTATION} | override.fields()
            found[layer.name] = _quantized(Section(merged, override.where))
    for rule, override in dynamic.items():
        if override is not None and rule not in used and not _fits_some(rules, rule, layers):
            raise BadInput(f"{config.name('dynamic')}: the rule {shown(rule)} fits no layer that is quantized")
    return found


def _expression(rule: str) -> str:
    return rule[2:] if rule.startswith(("+:", "-:")) else rule


def _fits_some(rules: Rules, rule: str, layers: Sequence[Layer]) -> bool:
    return any(rules.match(_expression(rule), layer.name) for layer in layers)


def _rules(config: Section) -> dict[str, Section | None]:
    """Rule -> what it overrides, None for a rule that leaves layers as they are."""
    if "dynamic" not in config:
        return {}
    rules: dict[str, Section | None] = {}
    entries = config.section("dynamic").fields()
    for rule, value in entries.items():
        if rule.startswith("-:"):
            rules[rule] = None
            continue
        override = Section(value, f"{config.name('dynamic')}[{shown(rule)}]")
        for field in override.fields():
            if field not in _REPRESENTATION and field not in _SEARCH:
                override.refuse(field, f"has no scheme here; choose from {', '.join(_REPRESENTATION)}")
        rules[rule] = override
    return rules


def _layers(config: Section, info: ModelInfo) -> list[Layer]:
    """The layers that the base values hold for."""
    named = _named_modules(config)
    found = [layer for layer in info.layers if layer.block is not None and layer.kind in ("linear", "conv1d")]
    if named is not None:
        for name in named:
            if not any(layer.name.endswith(f".{name}") for layer in found):
                raise BadInput(f"{config.name('modules_in_block_to_quantize')}: {shown(name)} is no layer of a block")
        found = [layer for layer in found if any(layer.name.endswith(f".{name}") for name in named)]
    if config.flag("lm_head", False):
        heads = [layer for layer in info.layers if layer.kind == "head" and not layer.tied]
        if not heads:
            config.refuse("lm_head", "needs a head of its own, and the model has none that is not its embedding too")
        found += heads
    return found


def _named_modules(config: Section) -> set[str] | None:
    value: Any = config.fields().get("modules_in_block_to_quantize")
    if value is None:
        return None
    # GPTQ takes them in steps: a list of lists.
    nested = isinstance(value, list) and all(isinstance(step, list) for step in value)
    names = [name for step in value for name in step] if nested else value
    return set(Section({"modules_in_block_to_quantize": names}, config.where).names("modules_in_block_to_quantize"))


def _quantized(values: Section) -> Sequence[Scheme]:
    granularity = group_granularity(values, "group_size", _DEFAULT_GROUP_SIZE)
    reorders = values.flag("desc_act", False) and not values.flag("static_groups", False)
    if reorders and granularity != PerChannel():
        values.refuse("desc_act", "puts inputs that are no neighbours into a group, for which there is no scheme here")
    return integers(values, "bits", granularity, values.flag("sym", True))
