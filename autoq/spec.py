"""The study spec: what a user writes, validated before anything heavy is imported or loaded.

Every field has its unit in its name or takes text with a unit (`120MB`, `30m`). Anything unknown is
refused in one line that names the field, the value and the choices.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from autoq import plugins, strict_yaml
from autoq.errors import BadInput, SpecError, UnknownName
from autoq.kv_cache import parse_key_value
from autoq.scheme import FloatFormat, ZeroPoint, parse_scheme
from autoq.spec_errors import field_path, one_line, short
from autoq.spec_fields import (
    ActivationChoice,
    Address,
    Bits,
    Bytes,
    CacheBits,
    Count,
    GroupSizeOrBlock,
    LayerKindChoice,
    Number,
    Seconds,
    Sparsity,
    Threads,
)
from autoq.spec_units import parse_bytes

_GRID_AXES = ("methods", "bits", "group_size", "zero_points", "activations", "formats", "sparsity")


def split_objective(name: str) -> tuple[str, str | None]:
    """`accuracy:sst2` as the objective's own name and the task that it is measured on, None where none is named."""
    metric, sign, task = name.partition(":")
    return metric, task if sign else None


def _objective(name: str) -> str:
    _known("objectives", split_objective(str(name))[0])
    if len(name) > 120:
        raise ValueError(f"{name[:80]!r} is too long; a task's name may have 60 characters")
    return name


def _known(folder: plugins.Folder, name: str) -> str:
    if name not in plugins.names(folder):
        kind = folder.rsplit(".", 1)[-1].removesuffix("s")
        raise ValueError(str(UnknownName(kind, str(name)[:80], plugins.names(folder))))
    return name


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


class ModelSpec(_Section):
    """`id`: hub id, folder, GGUF file, or `demo:NAME`. `revision` is for hub ids.

    `transform` is what the model becomes before anything else sees it, without changing what it computes:
    `hadamard` rotates the residual stream and the heads' values (`autoq.models.rotation`), so that quantization
    loses less.
    """

    id: Annotated[str, Field(min_length=1, max_length=4096)]
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    revision: str | None = None
    transform: Literal["none", "hadamard"] = "none"


class DataSpec(_Section):
    """Three disjoint parts of one source: calibration, search, report.

    `source` is `python-docs`, a text file or folder of text files, or the name of a Hugging Face
    dataset (with `config`, `split`, `column`). Text is cut into windows of `window_tokens`.
    """

    source: Annotated[str, Field(min_length=1, max_length=4096)] = "python-docs"
    config: str | None = None
    split: str = "train"
    column: str = "text"
    calibration_tokens: Count = 4096
    search_tokens: Count = 2048
    report_tokens: Count = 16384
    window_tokens: Annotated[int, Field(strict=True, ge=8, le=2**31 - 1)] = 512
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0


class TaskSpec(_Section):
    """Labelled examples, and how many of them the search and the report see; no example is in both.

    `source` is a JSONL or CSV file, a saved dataset's folder, or the name of a Hugging Face dataset (with
    `config`, `split`). `columns` says what the source calls the columns that the task needs, where it calls
    them otherwise. What is generated ends after `new_tokens`.
    """

    source: Annotated[str, Field(min_length=1, max_length=4096)]
    config: str | None = None
    split: str = "train"
    columns: dict[str, str] = Field(default_factory=dict)
    search_examples: Count = 128
    report_examples: Count = 512
    new_tokens: Count = 64


class TargetSpec(_Section):
    """The deployment runtime and the workload that latency is measured on.

    `device` names the description that the target `described` predicts for: a file, or a shipped one.
    """

    name: str = "torch-cpu"
    batch_size: Count = 1
    prompt_tokens: Count = 512
    threads: Threads | None = None
    device: Annotated[str, Field(min_length=1, max_length=4096)] | None = None

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        choices = [known.replace("_", "-") for known in plugins.names("targets")]
        if name not in choices:
            raise ValueError(str(UnknownName("target", name[:80], choices)))
        return name

    @property
    def plugin(self) -> str:
        """The name of the target's file: `torch-cpu` lives in `torch_cpu.py`."""
        return self.name.replace("-", "_")


class _Choices(_Section):
    """Either `schemes`, spelled out, or a grid of methods × bits × group sizes × zero points.

    `formats` are floating-point formats, which a grid holds where its bits and group sizes are theirs and
    it has weights without zero points. Some know blocks of outputs by inputs: `group_size: [128x128]`.
    `sparsity` is what the methods that prune (magnitude, wanda) leave out: 24 for two of every four inputs, or a
    percentage of each row. Its default is none, and then they make nothing. What is left is quantized by every
    width of the grid, and also stays as it is where `methods` hold `keep`.
    """

    schemes: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    bits: tuple[Bits, ...] | None = None
    group_size: tuple[GroupSizeOrBlock, ...] | None = None
    zero_points: tuple[ZeroPoint, ...] | None = None
    activations: tuple[ActivationChoice, ...] | None = None
    formats: tuple[FloatFormat, ...] | None = None
    sparsity: tuple[Sparsity, ...] | None = None

    @field_validator("schemes")
    @classmethod
    def _schemes(cls, texts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for text in texts or ():
            try:
                if (cached := parse_key_value(text)) is not None:
                    raise BadInput(f"{text} is a scheme of KV caches, not of layers: space.kv_cache: [{cached.bits}]")
                scheme = parse_scheme(text)
            except BadInput as problem:
                raise ValueError(str(problem)) from None
            _known("methods", scheme.method)
        return texts

    @field_validator("methods")
    @classmethod
    def _methods(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for name in names or ():
            _known("methods", name)
        return names

    @model_validator(mode="after")
    def _one_way(self) -> _Choices:
        for name in ("schemes", *_GRID_AXES):
            if getattr(self, name) == ():
                raise ValueError(f"{name} must not be empty; leave it out for the default")
        both = [name for name in _GRID_AXES if self.schemes is not None and getattr(self, name) is not None]
        if both:
            raise ValueError(f"give either schemes or a grid, not both schemes and {both[0]}")
        return self


class OverrideSpec(_Choices):
    """Other choices for the layers whose names match a glob."""

    match: Annotated[str, Field(min_length=1)]


class SpaceSpec(_Choices):
    """Which layers are searched and what each may be.

    `kinds` are searched, all others keep their weights; `exclude` takes globs on layer names out.
    What is left open is filled in by the target: everything it runs.

    `experts`: whether the experts of a block share a scheme for each of their matrices (`together`) or each expert
    has its own (`apart`). Together is the default: 64 experts in 48 blocks are 6,144 decisions apart and 96
    together, an expert that few tokens came to is judged by few, and a runtime that runs all experts of a block
    in one kernel wants one format. What a decision loses is the sum over its experts.

    `kv_cache`: widths in bits that the KV cache of each attention block may be quantized to, beside being kept in the
    model's dtype. Its default is none, and then all are kept.
    """

    kinds: tuple[LayerKindChoice, ...] = ("linear",)
    experts: Literal["together", "apart"] = "together"
    exclude: tuple[str, ...] = ()
    overrides: tuple[OverrideSpec, ...] = ()
    kv_cache: tuple[CacheBits, ...] = ()


class Bound(_Section):
    """A limit on one objective, in its unit; limits on `…_bytes` may be written `120MB`."""

    min: Number | None = None
    max: Number | None = None

    @model_validator(mode="after")
    def _some(self) -> Bound:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        if self.min is not None and self.max is not None and self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


def parse_bound(objective: str, value: object) -> object:
    """A limit as it is written: text with a size unit becomes bytes where the objective is in bytes.

    Everything else is given back as it is, for `Bound` to judge. Raises `ValueError` for a size that
    is not one.
    """
    return parse_bytes(value) if isinstance(value, str) and objective.endswith("_bytes") else value


def _read_bound(objective: str, sides: Mapping[str, object]) -> dict[str, object]:
    read = {}
    for side, value in sides.items():
        try:
            read[side] = parse_bound(objective, value)
        except ValueError as problem:
            raise ValueError(f"{objective}.{side} {problem} (got {short(value)})") from None
    return read


class SamplerSpec(_Section):
    """What proposes assignments after the baselines and `seeds` exact-budget proposals.

    `options` go to the sampler. `seeds: null` spends half of the trials that the baselines leave, at most
    128, or half as many as the sampler measures with slopes if that is less.
    """

    name: str = "frontier"
    seed: Annotated[int, Field(strict=True, ge=0, lt=2**32)] = 0
    seeds: Annotated[int, Field(strict=True, ge=0)] | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    @field_validator("options")
    @classmethod
    def _options(cls, options: dict[str, Any]) -> dict[str, Any]:
        for key, value in options.items():
            if not isinstance(value, int | float | bool | str | None):
                raise ValueError(f"{key[:80]!r} must be a number, text, true, false or null (got {short(value)})")
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f"{key[:80]!r} must be finite (got {value})")
        return options

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return _known("search.samplers", name)


class BudgetSpec(_Section):
    """When a study ends, and a candidate: after `trial_time`, or when it allocates more than `trial_memory`
    beside the model. `report_points` bounds how many frontier points are measured again on the
    report data and timed end to end (null: all of them). A candidate that is worse than a finished trial
    is given up once that is known with `stop_confidence` (null: never)."""

    trials: Count = 96
    wall_time: Seconds | None = None
    trial_time: Seconds | None = None
    trial_memory: Bytes | None = None
    report_points: Count | None = None
    stop_confidence: Annotated[Number, Field(gt=0.5, lt=1)] | None = 0.99


class WorkersSpec(_Section):
    """Who evaluates: this process, or `count` Ray actors with `cpus`, `gpus` and `memory` each, on few nodes or many.
    `device` is part of the name of the one that latencies are of; default: that of the worker that is up first."""

    executor: Literal["local", "ray"] = "local"
    count: Count = 1
    cpus: Threads | None = None
    gpus: Annotated[Number, Field(ge=0)] = 0
    memory: Bytes | None = None
    placement: Literal["pack", "spread"] = "pack"
    device: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    address: Address | None = None

    @model_validator(mode="after")
    def _local_is_one_process(self) -> WorkersSpec:
        for name in ("count", "address", "memory", "device"):
            if self.executor == "local" and (value := getattr(self, name)) != WorkersSpec.model_fields[name].default:
                raise ValueError(f"{name} {short(value)} needs executor ray; local is this one process")
        if self.gpus > 1 and self.gpus % 1:
            raise ValueError(f"gpus {self.gpus:g} must be a fraction of one GPU or a whole number of them")
        return self


class BankSpec(_Section):
    """The store of quantized layers: bytes on disk, and bytes of dequantized weights in memory.

    Calibration statistics, which lie beside it, take at most a quarter of `disk` more, and hidden states that trials
    have in common at most a quarter of `memory`."""

    disk: Bytes = 20 * 10**9
    memory: Bytes | None = None


class StudySpec(_Section):
    """A whole study. Everything but `model` has a default.

    `report` names qualities that are measured in the report only: nothing is searched or selected by them. An
    objective of labelled examples is named with its task, `accuracy:sst2`; with a single task the name is enough.
    `recipes` are assignments made elsewhere (an export of AutoQ, a GGUF file, a recipe of another tool),
    by path; each is tried as a baseline of its name and starts the search.
    """

    model: ModelSpec
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "study"
    data: DataSpec = Field(default_factory=DataSpec)
    tasks: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,59}$")], TaskSpec] = Field(
        default_factory=dict
    )
    target: TargetSpec = Field(default_factory=TargetSpec)
    space: SpaceSpec = Field(default_factory=SpaceSpec)
    objectives: tuple[str, ...] = ("kl_nats_per_token", "size_bytes", "latency_decode_ms")
    constraints: dict[str, Bound] = Field(default_factory=dict)
    report: tuple[str, ...] = ()
    sampler: SamplerSpec = Field(default_factory=SamplerSpec)
    budget: BudgetSpec = Field(default_factory=BudgetSpec)
    workers: WorkersSpec = Field(default_factory=WorkersSpec)
    bank: BankSpec = Field(default_factory=BankSpec)
    recipes: tuple[Annotated[str, Field(min_length=1, max_length=4096)], ...] = ()

    @field_validator("objectives")
    @classmethod
    def _objectives(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("give at least one objective")
        for name in names:
            _objective(name)
        if len(set(names)) != len(names):
            raise ValueError("an objective is named twice")
        return names

    @field_validator("report")
    @classmethod
    def _report(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            _objective(name)
        return tuple(dict.fromkeys(names))

    @field_validator("constraints", mode="before")
    @classmethod
    def _constraints(cls, bounds: object) -> object:
        if not isinstance(bounds, Mapping):
            return bounds
        read: dict[str, object] = {}
        for name, bound in bounds.items():
            _objective(name)
            read[name] = _read_bound(name, bound) if isinstance(bound, Mapping) else bound
        return read

    @property
    def measured(self) -> tuple[str, ...]:
        """Every objective that is to be measured: the objectives, then what constraints add."""
        return (*self.objectives, *(name for name in self.constraints if name not in self.objectives))

    @property
    def reported(self) -> tuple[str, ...]:
        """What is measured in the report and nowhere else."""
        return tuple(name for name in self.report if name not in self.measured)


def load_spec(source: str | Path, overrides: Sequence[str] = ()) -> StudySpec:
    """The spec in a YAML file, or in a shipped one by name (`demo`), with `key.path=value` overrides.

    Raises `SpecError` with one line.
    """
    path, name = Path(source), str(source)
    shipped = shipped_specs()
    try:
        exists = path.exists() and not (name in shipped and path.is_dir())
    except (OSError, ValueError):  # a name that no file can have
        exists = False
    if exists:
        return parse_spec(strict_yaml.read(path, f"spec {name!r}"), overrides)
    if name in shipped:
        return parse_spec(shipped[name], overrides)
    near = difflib.get_close_matches(name[:80], shipped, n=1)
    hint = (f"; did you mean {near[0]!r}?" if near else ";") + f" shipped are {', '.join(sorted(shipped))}"
    raise SpecError(f"no spec file {name[:80]!r}, and no shipped spec of that name{hint}")


def shipped_specs() -> dict[str, str]:
    """Name -> YAML text of the specs that are installed with AutoQ."""
    from importlib import resources

    folder = resources.files("autoq.studies")
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }


def parse_spec(text: str, overrides: Sequence[str] = ()) -> StudySpec:
    """The spec in a YAML text. Raises `SpecError` with one line."""
    tree = strict_yaml.parse(text, "the spec")
    if not isinstance(tree, dict):
        raise SpecError("the spec must be a mapping with at least the key 'model'")
    for override in overrides:
        _apply(tree, override)
    return build_spec(tree)


def build_spec(tree: Mapping[str, Any]) -> StudySpec:
    """The spec from plain data (parsed YAML or JSON). Raises `SpecError` with one line."""
    try:
        return StudySpec.model_validate(tree)
    except ValidationError as problem:
        refused = SpecError(one_line(problem, StudySpec))
        refused.field = field_path(problem.errors(include_url=False)[0]["loc"])
        raise refused from None


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in place; the value is read as YAML."""
    path, sign, value = override.partition("=")
    keys = path.strip().split(".")
    shown = f"--set {override[:200]!r}"
    if not sign or not all(keys):
        raise SpecError(f"{shown} must look like sampler.seed=1")
    node = tree
    for key in keys[:-1]:
        node[key] = node = {} if node.get(key) is None else node[key]
        if not isinstance(node, dict):
            raise SpecError(f"{shown}: {key!r} is not a section, so nothing in it can be set")
    node[keys[-1]] = strict_yaml.parse(value, shown)
