"""The description of a device: a YAML file of peak rates, memory, energy and kernels, each number cited.

A number is written `{value: 614e9, source: KEY}`, where KEY is one of the file's `sources` or the text
`assumption: WHY`. So a reader sees of every figure whether somebody published it or somebody guessed.
`devices/` beside this file holds the shipped ones. No torch.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from autoq import strict_yaml
from autoq.energy.work import ComputeFormat
from autoq.errors import SpecError
from autoq.scheme import KernelActivation, ZeroPoint
from autoq.spec_errors import one_line
from autoq.spec_fields import Bytes, GroupSize, Number

WeightFormat = Literal[
    "int2", "int3", "int4", "int5", "int6", "int8", "codebook2", "codebook3", "codebook4", "codebook8",
    "fp8", "fp8_e5m2", "fp4", "mxfp8", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "nvfp4",
]  # fmt: skip
Place = Literal["linear", "conv1d", "embedding", "head"]
Multiple = Annotated[int, Field(strict=True, ge=1, le=65536)]
ASSUMPTION = "assumption: "


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Cited(_Section):
    source: Annotated[str, Field(min_length=1, max_length=1000)]


class Rate(_Cited):
    """More than zero of something, and who says so."""

    value: Annotated[Number, Field(gt=0)]


class Amount(_Cited):
    """Zero or more of something, and who says so."""

    value: Annotated[Number, Field(ge=0)]


class Size(_Cited):
    """Bytes, and who says so."""

    value: Bytes


class Arithmetic(_Section):
    """What one number format is computed at; a multiplication and an addition are two operations."""

    operations_per_second: Rate
    picojoule_per_operation: Amount


class Memory(_Section):
    """The memory that weights, keys and values lie in."""

    bandwidth_bytes_per_second: Rate
    capacity_bytes: Size
    picojoule_per_byte: Amount


class Launch(_Section):
    """What starting a kernel takes, and how many run per attention block beside its layers."""

    seconds: Amount
    others_per_block: Amount


class KernelRule(_Section):
    """Weights that the device multiplies, and with what.

    Without quantized activations the weights are turned into the model's dtype on the way, which is what
    is computed in. With them `computes` says the format.
    """

    weights: WeightFormat
    group_sizes: Annotated[tuple[GroupSize, ...], Field(min_length=1)] = ("channel",)
    zero_points: Annotated[tuple[ZeroPoint, ...], Field(min_length=1)] = ("none",)
    activations: Annotated[tuple[Literal["none", KernelActivation], ...], Field(min_length=1)] = ("none",)
    computes: ComputeFormat | None = None
    layers: Annotated[tuple[Place, ...], Field(min_length=1)] = ("linear", "conv1d", "head")
    in_multiple: Multiple = 1
    out_multiple: Multiple = 1

    @model_validator(mode="after")
    def _says_what_it_computes(self) -> KernelRule:
        quantized = [a for a in self.activations if a != "none"]
        if quantized and self.computes is None:
            raise ValueError(f"activations {quantized[0]} need computes: the format that is multiplied in")
        if self.computes is not None and "none" in self.activations:
            raise ValueError("computes is for quantized activations; give 'none' a kernel of its own")
        if quantized and self.weights != "fp8" and not self.weights.startswith("int"):
            raise ValueError(f"weights {self.weights} have no scheme with quantized activations")
        return self


class Device(_Section):
    """A whole description."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")]
    summary: Annotated[str, Field(min_length=1, max_length=300)]
    sources: dict[str, Annotated[str, Field(min_length=10, max_length=1000)]]
    arithmetic: Annotated[dict[ComputeFormat, Arithmetic], Field(min_length=1)]
    memory: Memory
    launch: Launch
    idle_watt: Amount
    kernels: Annotated[tuple[KernelRule, ...], Field(min_length=1)]

    @field_validator("kernels")
    @classmethod
    def _rules_are_told_apart(cls, kernels: tuple[KernelRule, ...]) -> tuple[KernelRule, ...]:
        seen: set[tuple[object, ...]] = set()
        for rule in kernels:
            own = {(rule.weights, activation, place) for activation in rule.activations for place in rule.layers}
            if own & seen:
                raise ValueError(f"two kernels take weights {rule.weights} with the same activations and layers")
            seen |= own
        return kernels

    @model_validator(mode="after")
    def _holds_together(self) -> Device:
        for index, rule in enumerate(self.kernels):
            if rule.computes is not None and rule.computes not in self.arithmetic:
                known = ", ".join(self.arithmetic)
                raise ValueError(f"kernels.{index}.computes: no arithmetic for {rule.computes}; there is {known}")
        for where, source in _citations(self.model_dump()):
            guessed = source.startswith(ASSUMPTION) and len(source) > len(ASSUMPTION)
            if source not in self.sources and not guessed:
                known = ", ".join(self.sources) or "(there are none)"
                raise ValueError(
                    f"{where}.source: {source[:80]!r} is not one of the sources {known}, nor '{ASSUMPTION}WHY'"
                )
        return self

    @property
    def digest(self) -> str:
        """Eight digits that change with anything in the description."""
        return hashlib.sha256(json.dumps(self.model_dump(), sort_keys=True).encode()).hexdigest()[:8]


def _citations(tree: Any, path: str = "") -> list[tuple[str, str]]:
    """(path, source) of every cited number in a dumped description."""
    if not isinstance(tree, dict):
        return []
    if "source" in tree:
        return [(path, tree["source"])]
    return [found for key, value in tree.items() for found in _citations(value, f"{path}.{key}".lstrip("."))]


def shipped() -> dict[str, str]:
    """Name -> YAML text of the descriptions that are installed with AutoQ."""
    folder = resources.files("autoq.targets") / "devices"
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in sorted(folder.iterdir(), key=lambda entry: entry.name)
        if entry.name.endswith(".yaml")
    }


def load_device(source: str) -> Device:
    """The description in a YAML file, or a shipped one by name. Raises `SpecError` with one line."""
    known, shown = shipped(), f"device {source[:80]!r}"
    path = Path(source)
    if source not in known:
        try:
            exists = path.is_file()
        except (OSError, ValueError):  # a name that no file can have
            exists = False
        if not exists:
            near = difflib.get_close_matches(source[:80], known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise SpecError(
                f"target.device: no file {source[:80]!r} and no shipped description of that name{hint}; "
                f"shipped are {', '.join(known)}"
            )
    return parse_device(known[source] if source in known else strict_yaml.read(path, shown), shown)


def parse_device(text: str, shown: str = "the description") -> Device:
    """The description in a YAML text. Raises `SpecError` with one line that begins with `shown`."""
    tree = strict_yaml.parse(text, shown)
    if not isinstance(tree, dict):
        raise SpecError(f"{shown} must be a mapping with the keys {', '.join(Device.model_fields)}")
    try:
        return Device.model_validate(tree)
    except ValidationError as problem:
        raise SpecError(f"{shown}: {one_line(problem, Device).removeprefix('spec: ')}") from None
