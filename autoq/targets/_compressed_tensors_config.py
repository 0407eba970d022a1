"""The vocabulary of compressed-tensors: config groups from schemes, and back. No torch.

A `config_groups` entry says of the layers that it targets how weights and inputs are stored, in the
fields of `QuantizationArgs`, and in which `format`. Only fields that releases 0.15 and later know are
written, for readers refuse what they do not know.
"""

from __future__ import annotations

import collections
import re
from collections.abc import Mapping
from typing import Any

from autoq.scheme import Float, Integer, Keep, PerBlock, PerGroup, PerTensor, Scheme
from autoq.targets._vllm_rules import layout

MIXED = "mixed-precision"
_FOUR_BIT_FLOATS = {
    # format: (strategy, what a scale is)
    "mxfp4": ("group", "torch.uint8"),
    "nvfp4": ("tensor_group", "torch.float8_e4m3fn"),
}


def storage_format(scheme: Integer | Float) -> str:
    """The name of the layout that a scheme's tensors have in the file."""
    if isinstance(scheme, Float):
        return "float-quantized" if scheme.format == "fp8" else f"{scheme.format}-pack-quantized"
    return "pack-quantized" if scheme.activation is None else "int-quantized"


def group_of(scheme: Integer | Float, targets: list[str]) -> dict[str, Any]:
    """The config group that stores `targets`, names of layers, as `scheme`."""
    weights: dict[str, Any] = {
        "num_bits": scheme.bits,
        "type": "int" if isinstance(scheme, Integer) else "float",
        "symmetric": isinstance(scheme, Float) or scheme.zero == "none",
        "strategy": "tensor" if isinstance(scheme.granularity, PerTensor) else "channel",
        "group_size": None,
        "dynamic": False,
    }
    if isinstance(scheme.granularity, PerBlock):
        weights |= {"strategy": "block", "block_structure": [scheme.granularity.rows, scheme.granularity.columns]}
    if isinstance(scheme.granularity, PerGroup):
        weights |= {"strategy": "group", "group_size": scheme.granularity.size}
    if isinstance(scheme, Float) and scheme.format in _FOUR_BIT_FLOATS:
        strategy, scale = _FOUR_BIT_FLOATS[scheme.format]
        weights |= {"strategy": strategy, "scale_dtype": scale, "zp_dtype": scale}
    inputs = None
    if scheme.activation is not None:
        dynamic = scheme.activation == "a8dyn"
        inputs = {
            "num_bits": 8,
            "type": weights["type"],
            "symmetric": True,
            "strategy": "token" if dynamic else "tensor",
            "group_size": None,
            "dynamic": dynamic,
        }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": inputs,
        "output_activations": None,
        "format": storage_format(scheme),
    }


def quantization_config(schemes: Mapping[str, Scheme], kept: list[str]) -> dict[str, Any]:
    """The `quantization_config` of a model whose layers have `schemes`; `kept` names the linears left as they are.

    Layers are targeted by their exact names: a pattern could match what nobody meant.
    """
    groups: dict[str, list[str]] = collections.defaultdict(list)
    for name, scheme in schemes.items():
        groups[layout(scheme)].append(name)
    by_layout = {layout(scheme): scheme for scheme in schemes.values()}
    written = {}
    for index, (text, names) in enumerate(sorted(groups.items())):
        scheme = by_layout[text]
        assert isinstance(scheme, Integer | Float), scheme
        written[f"group_{index}"] = group_of(scheme, names)
    formats = {group["format"] for group in written.values()}
    return {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else MIXED,
        "quantization_status": "compressed",
        "config_groups": written,
        "ignore": kept,
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def layout_of(group: Mapping[str, Any]) -> str:
    """The inverse of `group_of`, without the method: `int4-g64-sym`, `fp8-channel-a8dyn`.

    What no scheme says comes back as a description in words.
    """
    weights, inputs = group.get("weights") or {}, group.get("input_activations")
    bits, kind, strategy = weights.get("num_bits"), weights.get("type"), weights.get("strategy")
    size = weights.get("group_size")
    if strategy is None:  # as QuantizationArgs infers it
        strategy = "tensor" if size is None else "channel" if size == -1 else "group"
    granularity = f"g{size}" if strategy in ("group", "tensor_group") else strategy
    if strategy == "block" and isinstance(structure := weights.get("block_structure"), list) and len(structure) == 2:
        granularity = f"b{structure[0]}x{structure[1]}"
        strategy = granularity
    floats = {"8 b128x128": "fp8", "8 channel": "fp8", "8 tensor": "fp8", "4 group": "mxfp4", "4 tensor_group": "nvfp4"}
    symmetric = weights.get("symmetric", True)
    number = None
    if kind == "int" and strategy in ("tensor", "channel", "group"):
        number = f"int{bits}"
    elif kind == "float" and symmetric:
        number = floats.get(f"{bits} {strategy}")
    if number is None or weights.get("dynamic") or group.get("output_activations"):
        return f"weights {dict(weights)}, outputs {group.get('output_activations')}"
    text = f"{number}-{granularity}" + ("-sym" if kind == "int" and symmetric else "")
    if not inputs:
        return text
    ways = {(True, "token"): "a8dyn", (False, "tensor"): "a8static"}
    way = ways.get((bool(inputs.get("dynamic")), inputs.get("strategy")))
    plain = inputs.get("num_bits") == 8 and inputs.get("type") == kind and inputs.get("symmetric", True)
    return f"{text}-{way}" if way and plain else f"{text}, inputs {dict(inputs)}"


def layouts(config: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """Layer name -> layout by a model's `config.json`; `names` gives each layer's class name.

    By the rules of compressed-tensors: `ignore` wins, then the first target that is the layer's name,
    a pattern (`re:`) of it, or its class.
    """
    settings = config.get("quantization_config") or {}
    groups = settings.get("config_groups") or {}
    found = {}
    for name, kind in names.items():
        if any(_matches(name, kind, pattern) for pattern in settings.get("ignore") or ()):
            found[name] = str(Keep())
            continue
        matching = (g for g in groups.values() if any(_matches(name, kind, t) for t in g.get("targets") or ()))
        group = next(matching, None)
        found[name] = str(Keep()) if group is None else layout_of(group)
    return found


def _matches(name: str, kind: str, pattern: str) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), name) is not None
    return pattern in (name, kind)
