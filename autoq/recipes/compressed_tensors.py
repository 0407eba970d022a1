"""compressed-tensors: `quantization_config` in the `config.json` of a checkpoint, as vLLM loads it.

`config_groups` hold what is done to which layers, in `targets`: a layer's name, `re:` and a regular
expression that must fit the beginning of the name, or the name of a module class (`Linear`,
`Embedding`). As in compressed_tensors.utils.match and quantization/lifecycle/apply.py: a layer that any
entry of `ignore` fits (in the same three ways) stays as it is; of the targets that fit, names come
before expressions and these before classes, each in alphabetical order, and the first decides; a
target that two groups name belongs to the last of them.

Weights are quantized anew: integers by the method gptq where it exists, otherwise by rtn, floats by
rtn. Activations are said as the scheme says them: dynamic ones per token, static ones per tensor, with
the number format of the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from autoq.errors import BadInput
from autoq.layer import Layer, LayerKind, ModelInfo
from autoq.recipes._files import Rules, Section, listed, shown
from autoq.recipes._integers import group_granularity, integers
from autoq.scheme import Activation, Float, Granularity, Keep, PerBlock, PerChannel, PerGroup, PerTensor, Scheme

# The classes that a module of a kind is an instance of, in alphabetical order. GPT-2's Conv1D is no Module here:
# it is not quantized by class.
_CLASSES: dict[LayerKind, tuple[str, ...]] = {
    "linear": ("Linear", "Module"),
    "head": ("Linear", "Module"),
    "embedding": ("Embedding", "Module"),
    "conv1d": ("Conv1D",),
    "router": (),  # a class of its own in every family, so only its name can be meant
}
# Formats whose weights are sparse too, in which a group's numbers are half of the story.
_SPARSE = ("marlin-24", "sparse-bitmask", "sparse-24-bitmask")


def schemes(config: Section, info: ModelInfo) -> Mapping[str, Sequence[Scheme]]:
    """Layer name -> schemes in order of preference, for the layers that the config quantizes.

    Raises `BadInput` naming field, value and choices.
    """
    _refuse_what_no_scheme_says(config)
    targets: dict[str, tuple[Scheme, ...]] = {}
    groups = config.section("config_groups")
    for name in groups.fields():
        group = groups.section(name)
        targets |= dict.fromkeys(group.names("targets"), _group(group))
    match = _Matching(targets, config.names("ignore"))
    found: dict[str, Sequence[Scheme]] = {}
    for layer in info.layers:
        modules = [(layer.name, layer.kind), *((name, _tied_kind(layer)) for name in layer.tied)]
        chosen = {name: match.target(name, kind) for name, kind in modules}
        made = {name: () if target is None else targets[target] for name, target in chosen.items()}
        if len(set(made.values())) > 1:
            says = "; ".join(f"{name}: {schemes[0] if schemes else Keep()}" for name, schemes in made.items())
            raise BadInput(f"{config.where} gives modules that share one weight different schemes ({says})")
        if made[layer.name]:
            found[layer.name] = made[layer.name]
    if unused := [target for target in targets if target not in match.fitting]:
        raise BadInput(f"{groups.where} has targets that fit nothing in the model: {listed(unused)}")
    return found


def _tied_kind(layer: Layer) -> LayerKind:
    """What the modules are that share a layer's weight: a head and its embeddings, or several embeddings."""
    return "embedding" if layer.kind in ("head", "embedding") else layer.kind


class _Matching:
    """Which target decides about a module, and which targets fit any at all."""

    def __init__(self, targets: Iterable[str], ignore: Sequence[str]) -> None:
        ordered = sorted(targets, key=lambda target: ("re:" in target, target))
        self._names = set(ordered)
        self._expressions = [target for target in ordered if target.startswith("re:")]
        self._ignored = set(ignore)
        self._ignored_expressions = [entry for entry in ignore if entry.startswith("re:")]
        self._rules = Rules()
        self.fitting: set[str] = set()

    def target(self, name: str, kind: LayerKind) -> str | None:
        """The target that decides about a module, or None where it stays as it is."""
        classes = _CLASSES[kind]
        fitting = [name] if name in self._names else []
        fitting += [target for target in self._expressions if self._rules.match(target.removeprefix("re:"), name)]
        fitting += [each for each in classes if each in self._names]
        self.fitting.update(fitting)
        if not fitting or name in self._ignored or any(each in self._ignored for each in classes):
            return None
        if any(self._rules.match(entry.removeprefix("re:"), name) for entry in self._ignored_expressions):
            return None
        if kind == "conv1d":
            raise BadInput(f"the target {shown(fitting[0])} fits {name}, a Conv1D, which the format does not hold")
        return fitting[0]


def _refuse_what_no_scheme_says(config: Section) -> None:
    config.choice("quant_method", ("compressed-tensors",))
    for field in ("kv_cache_scheme", "transform_config"):
        if config.fields().get(field) not in (None, {}):
            config.refuse(field, "has no scheme here; leave it out")
    if config.fields().get("format") in _SPARSE:
        config.refuse("format", "is sparse, for which there is no scheme here")
    if config.fields().get("sparsity_config") not in (None, {}):
        config.section("sparsity_config").choice("format", ("dense",), "dense")


def _group(group: Section) -> tuple[Scheme, ...]:
    """The schemes of one group; none for a group that leaves weights and inputs as they are."""
    if "output_activations" in group:
        group.refuse("output_activations", "has no scheme here; leave it out")
    if "weights" not in group:
        if "input_activations" in group:
            group.refuse("input_activations", "without weights has no scheme here")
        return ()
    weights = group.section("weights")
    if weights.fields().get("dynamic") not in (None, False):
        weights.refuse("dynamic", "must be false for weights")
    number = weights.choice("type", ("int", "float"), "int")
    activation = _activation(group.section("input_activations"), number) if "input_activations" in group else None
    if number == "int":
        return tuple(_integers(weights, activation))
    return (_float(weights, activation),)


def _strategy(section: Section, choices: tuple[str, ...]) -> str:
    """The strategy, told by the group size where it is left out."""
    size = section.whole("group_size", 0)
    inferred = "group" if size > 0 else "channel" if size == -1 else "tensor"
    if inferred not in choices and "strategy" not in section:
        section.refuse("group_size", f"makes the strategy {inferred}, which has no scheme here")
    return section.choice("strategy", choices, inferred)


def _granularity(section: Section, strategy: str) -> Granularity:
    if strategy == "group":
        return group_granularity(section, "group_size")
    return PerChannel() if strategy == "channel" else PerTensor()


def _integers(weights: Section, activation: Activation | None) -> Sequence[Scheme]:
    granularity = _granularity(weights, _strategy(weights, ("group", "channel", "tensor")))
    if weights.fields().get("actorder") not in (None, False, "weight", "static"):
        weights.refuse("actorder", "puts inputs that are no neighbours into a group; choose from weight, static, null")
    return integers(weights, "num_bits", granularity, weights.flag("symmetric", True), activation)


def _float(weights: Section, activation: Activation | None) -> Scheme:
    if not weights.flag("symmetric", True):
        weights.refuse("symmetric", "must be true for floats")
    bits = weights.whole("num_bits", 8)
    if bits == 8:
        strategy = _strategy(weights, ("channel", "tensor", "block"))
        if strategy != "block":
            return Float("rtn", "fp8", _granularity(weights, strategy), activation)
        if activation is not None:
            raise BadInput(f"{weights.where}: blocks of floats with inputs quantized per token have no scheme here")
        return Float("rtn", "fp8", _block(weights))
    if bits != 4:
        weights.refuse("num_bits", "must be 4 or 8 for floats")
    if activation is not None:
        raise BadInput(f"{weights.where}: 4-bit floats with quantized inputs have no scheme here")
    if _strategy(weights, ("group", "tensor_group")) == "tensor_group":
        if weights.whole("group_size") != 16:
            weights.refuse("group_size", "must be 16 for 4-bit floats of strategy tensor_group")
        return Float("rtn", "nvfp4", PerGroup(16))
    if weights.whole("group_size") != 32:
        weights.refuse("group_size", "must be 32 for 4-bit floats of strategy group")
    return Float("rtn", "mxfp4", PerGroup(32))


def _block(weights: Section) -> PerBlock:
    sides = weights.fields().get("block_structure")
    if not (isinstance(sides, list) and len(sides) == 2 and all(type(side) is int and side >= 2 for side in sides)):
        weights.refuse("block_structure", "must be two whole numbers of at least 2, as [128, 128]")
    return PerBlock(*sides)


def _activation(inputs: Section, number: str) -> Activation:
    inputs.choice("type", (number,), "int")
    if inputs.whole("num_bits", 8) != 8:
        inputs.refuse("num_bits", "must be 8 for inputs")
    if not inputs.flag("symmetric", True):
        inputs.refuse("symmetric", "must be true for inputs")
    if inputs.flag("dynamic", False):
        inputs.choice("strategy", ("token",), "tensor")
        return "a8dyn"
    inputs.choice("strategy", ("tensor",), "tensor")
    return "a8static"
