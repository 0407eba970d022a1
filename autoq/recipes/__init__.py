"""Recipes: assignments made elsewhere, which become baselines of a study and start its search.

    folder or file                                   read by
    autoq.json beside assignment.json,
    or what `autoq pick --json|--yaml` prints         autoq_export
    quantize_config.json, config.json of a model
    with quant_method gptq                            gptq
    config.json with quant_method compressed-tensors  compressed_tensors
    GGUF file, or words expression=type               gguf

A kind is recognised by its content. Files are read as plain data, within limits; nothing in them is run,
and no path or link in them is followed. A recipe says how layers are represented: the weights are made
anew by methods of AutoQ, so a recipe is compared as a recipe, whoever made it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoq import plugins, strict_yaml
from autoq.assignment import Assignment
from autoq.errors import BadInput, ExportBroken
from autoq.layer import Layer, ModelInfo
from autoq.methods import Method
from autoq.recipes import autoq_export, compressed_tensors, gguf, gptq
from autoq.recipes._files import Section, decode, kind_of, listed, member, parse_json, read_bytes, read_json, shown
from autoq.recipes._gguf_header import MAGIC
from autoq.scheme import Keep, Scheme
from autoq.targets import Target

__all__ = ["Recipe", "RecipeRefused", "read"]

# Layer name -> schemes in order of preference; a layer that is not in it is left as it is.
Wanted = Mapping[str, Sequence[Scheme]]

_KINDS = (
    "a folder or manifest that autoq export wrote, an assignment as autoq pick prints it, quantize_config.json or "
    "config.json of a GPTQ or compressed-tensors model, a list of tensor types for llama-quantize, a GGUF file"
)
# Names that say what a file is, not which one: the folder's name tells more.
_COMMON_NAMES = {"autoq", "assignment", "quantize_config", "config", "model"}
_MAX_NAME = 60


class RecipeRefused(BadInput):
    """A recipe that cannot be used with this model and target."""


@dataclass(frozen=True)
class Recipe:
    """An assignment for every layer of the model, by the name that its trial is known under."""

    name: str
    assignment: Assignment


def read(path: str, info: ModelInfo, target: Target) -> Recipe:
    """The recipe in a file or folder, for a model on a target.

    Layers that the recipe says nothing of keep their weights. Raises `RecipeRefused` with one line for a
    path that is not there, a file of no known kind or with something in it that there is no scheme for,
    layers that the model does not have, and schemes that the target cannot run.
    """
    try:
        if not path:
            raise BadInput("the path is empty")
        place = Path(path)
        wanted = _read(place, info)
        return Recipe(_name(place), _assignment(wanted, info, target))
    except (BadInput, ExportBroken) as problem:
        raise RecipeRefused(f"recipe {shown(path)}: {problem}") from None
    except OSError as problem:
        raise RecipeRefused(f"recipe {shown(path)}: cannot be read: {problem.strerror or problem}") from None


def _name(place: Path) -> str:
    """What the recipe is called: by its file, or its folder where the file's name is everybody's."""
    place = place.absolute()
    stem = place.name if place.is_dir() else place.stem
    if stem.lower() in _COMMON_NAMES and not place.is_dir():
        stem = place.parent.name
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", stem)[:_MAX_NAME].strip("-.")
    return plain or "recipe"


def _read(place: Path, info: ModelInfo) -> Wanted:
    if kind_of(place) == "folder":
        return _read_folder(place, info)
    with place.open("rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            return gguf.file_schemes(place, info)
    text = decode(read_bytes(place), place.name)
    if text.lstrip().startswith("{"):
        return _read_tree(parse_json(text, place.name), place, info)
    if gguf.is_type_list(text):
        return gguf.list_schemes(text, info)
    return _read_tree(strict_yaml.parse(text, place.name), place, info)


def _read_folder(folder: Path, info: ModelInfo) -> Wanted:
    if member(folder, autoq_export.MANIFEST) is not None:
        return autoq_export.folder_schemes(folder)
    for name in ("quantize_config.json", "config.json"):
        if (path := member(folder, name)) is not None:
            return _read_tree(read_json(path), path, info)
    raise BadInput(f"the folder holds no recipe; choose from {_KINDS}")


def _read_tree(tree: object, place: Path, info: ModelInfo) -> Wanted:
    """A recipe in plain data, recognised by its keys."""
    if isinstance(tree, Mapping) and all(isinstance(key, str) for key in tree):
        if autoq_export.is_manifest(tree) and place.name == autoq_export.MANIFEST:
            return autoq_export.folder_schemes(place.parent)
        if "assignment" in tree:
            return autoq_export.tree_schemes(tree["assignment"], "assignment")
        if "quantization_config" in tree:
            return _read_config(Section(tree["quantization_config"], "quantization_config"), info)
        if "quant_method" in tree or "config_groups" in tree or {"bits", "group_size"} <= set(tree):
            return _read_config(Section(tree, place.name), info)
        if tree and all(isinstance(value, str) for value in tree.values()):
            return autoq_export.tree_schemes(tree, place.name)
    raise BadInput(f"{place.name} is no recipe; choose from {_KINDS}")


def _read_config(config: Section, info: ModelInfo) -> Wanted:
    implied = "compressed-tensors" if "config_groups" in config else "gptq"
    if config.choice("quant_method", ("gptq", "compressed-tensors"), implied) == "gptq":
        return gptq.schemes(config, info)
    return compressed_tensors.schemes(config, info)


def _assignment(wanted: Wanted, info: ModelInfo, target: Target) -> Assignment:
    layers = {layer.name: layer for layer in info.layers}
    if unknown := [name for name in wanted if name not in layers]:
        example = next(iter(layers))
        raise BadInput(f"the model has no layers {listed(unknown)}; its layers are named like {example}")
    schemes: dict[str, Scheme] = dict.fromkeys(layers, Keep())
    refused: dict[str, str] = {}
    for name, layer in layers.items():
        if name not in wanted:
            continue
        rules = {scheme: _refusal(layer, scheme, target) for scheme in wanted[name]}
        chosen = next((scheme for scheme, rule in rules.items() if rule is None), None)
        if chosen is None:
            # The last one is what there is for everybody: its rule is the target's, not a method's.
            scheme, rule = list(rules.items())[-1]
            refused[name] = f"{scheme}: {rule}"
        else:
            schemes[name] = chosen
    if refused:
        first = next(iter(refused.values()))
        raise BadInput(f"the target cannot run layers {listed(list(refused))} as the recipe has them ({first})")
    if target.fuses:
        _check_fusion(info, schemes)
    return Assignment(schemes)


def _refusal(layer: Layer, scheme: Scheme, target: Target) -> str | None:
    rule = plugins.load("methods", scheme.method, Method).refuses(layer, scheme)
    return target.refuses(layer, scheme) if rule is None else rule


def _check_fusion(info: ModelInfo, schemes: Mapping[str, Scheme]) -> None:
    """Refuse different schemes for layers that the target runs as one."""
    first: dict[str, Layer] = {}
    for layer in info.layers:
        if layer.fusion_group is None:
            continue
        other = first.setdefault(layer.fusion_group, layer)
        if schemes[layer.name] != schemes[other.name]:
            raise BadInput(
                f"the target runs {other.name} and {layer.name} as one layer, and the recipe gives them "
                f"{schemes[other.name]} and {schemes[layer.name]}"
            )
