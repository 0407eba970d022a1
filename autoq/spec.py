"""The study spec: what a user writes, validated before anything heavy is imported or loaded.

Every field has its unit in its name or takes text with a unit (`120MB`, `30m`). Anything unknown is
refused in one line that names the field, the value and the choices.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from autoq import plugins
from autoq.errors import BadInput, SpecError, UnknownName
from autoq.scheme import MAX_BITS, MIN_BITS, Activation, ZeroPoint, parse_scheme

MAX_SPEC_BYTES = 1_000_000

_BYTE_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BYTE_UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_TIME_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_QUANTITY = re.compile(r"\s*(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?)\s*([A-Za-z]*)\s*")


def parse_bytes(value: object) -> int:
    """Bytes from a number or text such as `120MB`, `1.5GiB`. Raises `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a size such as 120MB")
    found = _QUANTITY.fullmatch(str(value))
    if not found or found[2].upper() not in _BYTE_UNITS:
        raise ValueError(f"must be a size such as 120MB, with one of the units {', '.join(filter(None, _BYTE_UNITS))}")
    return round(float(found[1]) * _BYTE_UNITS[found[2].upper()])


def parse_seconds(value: object) -> float:
    """Seconds from a number or text such as `90s`, `30m`, `1.5h`. Raises `ValueError`."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError("must be a time such as 30m")
    parts = re.findall(r"(\d+(?:\.\d*)?)([a-z]*)", str(value))
    if not parts or "".join(a + b for a, b in parts) != str(value).replace(" ", "") or any(
        unit not in _TIME_UNITS for _, unit in parts
    ):
        raise ValueError("must be a time such as 30m or 1h30m, with the units s, m, h, d")
    return sum(float(number) * _TIME_UNITS[unit] for number, unit in parts)


Bytes = Annotated[int, BeforeValidator(parse_bytes), Field(ge=0)]
Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Bits = Annotated[int, Field(ge=MIN_BITS, le=MAX_BITS)]


def _known(folder: plugins.Folder, name: str) -> str:
    if name not in plugins.names(folder):
        raise ValueError(str(UnknownName(folder.rsplit(".", 1)[-1].removesuffix("s"), name, plugins.names(folder))))
    return name


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelSpec(_Section):
    """`id`: hub id, folder, GGUF file, or `demo:NAME`. `revision` is for hub ids."""

    id: Annotated[str, Field(min_length=1, max_length=4096)]
    dtype: Literal["bfloat16", "float32", "float16"] = "bfloat16"
    revision: str | None = None


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
    window_tokens: Annotated[int, Field(ge=8)] = 512
    seed: int = 0


class TargetSpec(_Section):
    """The deployment runtime and the workload that latency is measured on."""

    name: str = "torch-cpu"
    batch_size: Count = 1
    prompt_tokens: Count = 512
    threads: Count | None = None

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        choices = [known.replace("_", "-") for known in plugins.names("targets")]
        if name not in choices:
            raise ValueError(str(UnknownName("target", name, choices)))
        return name

    @property
    def plugin(self) -> str:
        """The name of the target's file: `torch-cpu` lives in `torch_cpu.py`."""
        return self.name.replace("-", "_")


GroupSize = Annotated[int, Field(ge=2, le=65536)] | Literal["channel", "tensor"]
LAYER_KINDS = ("linear", "embedding", "head")


class _Choices(_Section):
    """Either `schemes`, spelled out, or a grid of methods × bits × group sizes × zero points."""

    schemes: tuple[str, ...] | None = None
    methods: tuple[str, ...] | None = None
    bits: tuple[Bits, ...] | None = None
    group_size: tuple[GroupSize, ...] | None = None
    zero_points: tuple[ZeroPoint, ...] | None = None
    activations: tuple[Activation | Literal["none"], ...] | None = None

    @field_validator("schemes")
    @classmethod
    def _schemes(cls, texts: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for text in texts or ():
            try:
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
        grid = [name for name in ("methods", "bits", "group_size", "zero_points", "activations") if getattr(self, name)]
        if self.schemes is not None and grid:
            raise ValueError(f"give either schemes or a grid, not both schemes and {grid[0]}")
        for name in ("schemes", "methods", "bits", "group_size", "zero_points", "activations"):
            if getattr(self, name) == ():
                raise ValueError(f"{name} must not be empty; leave it out for the default")
        return self


class OverrideSpec(_Choices):
    """Other choices for the layers whose names match a glob."""

    match: Annotated[str, Field(min_length=1)]


class SpaceSpec(_Choices):
    """Which layers are searched and what each may be.

    `kinds` are searched, all others keep their weights; `exclude` takes globs on layer names out.
    What is left open is filled in by the target: everything it runs.
    """

    kinds: tuple[Literal["linear", "embedding", "head"], ...] = ("linear",)
    exclude: tuple[str, ...] = ()
    overrides: tuple[OverrideSpec, ...] = ()


class Bound(_Section):
    """A limit on one objective, in its unit; sizes may be written `120MB`."""

    min: float | None = None
    max: float | None = None

    @field_validator("min", "max", mode="before")
    @classmethod
    def _number(cls, value: object) -> object:
        return parse_bytes(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _some(self) -> Bound:
        if self.min is None and self.max is None:
            raise ValueError("give min, max or both")
        return self


class SamplerSpec(_Section):
    """What proposes assignments after the baselines and `seeds` exact-budget proposals.

    `options` go to the sampler. `seeds: null` spends half of the trials that the baselines leave.
    """

    name: str = "nsga2"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    seeds: Annotated[int, Field(ge=0)] | None = None
    options: dict[str, int | float | bool | str | None] = Field(default_factory=dict)

    @field_validator("name")
    @classmethod
    def _name(cls, name: str) -> str:
        return _known("search.samplers", name)


class BudgetSpec(_Section):
    """When a study ends. `report_points` bounds how many frontier points are measured again on the
    report data and timed end to end (null: all of them)."""

    trials: Count = 96
    wall_time: Seconds | None = None
    trial_time: Seconds | None = None
    report_points: Count | None = None


class WorkersSpec(_Section):
    """Who evaluates: this process, or `count` Ray actors with `cpus` and `gpus` each."""

    executor: Literal["local", "ray"] = "local"
    count: Count = 1
    cpus: Annotated[int, Field(ge=1)] | None = None
    gpus: Annotated[float, Field(ge=0)] = 0
    address: str | None = None


class BankSpec(_Section):
    """The store of quantized layers: bytes on disk, and bytes of dequantized weights in memory."""

    disk: Bytes = 20 * 10**9
    memory: Bytes | None = None


class StudySpec(_Section):
    """A whole study. Everything but `model` has a default."""

    model: ModelSpec
    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")] = "study"
    data: DataSpec = Field(default_factory=DataSpec)
    target: TargetSpec = Field(default_factory=TargetSpec)
    space: SpaceSpec = Field(default_factory=SpaceSpec)
    objectives: tuple[str, ...] = ("kl_nats_per_token", "size_bytes", "latency_decode_ms")
    constraints: dict[str, Bound] = Field(default_factory=dict)
    sampler: SamplerSpec = Field(default_factory=SamplerSpec)
    budget: BudgetSpec = Field(default_factory=BudgetSpec)
    workers: WorkersSpec = Field(default_factory=WorkersSpec)
    bank: BankSpec = Field(default_factory=BankSpec)

    @field_validator("objectives")
    @classmethod
    def _objectives(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("give at least one objective")
        for name in names:
            _known("objectives", name)
        if len(set(names)) != len(names):
            raise ValueError("an objective is named twice")
        return names

    @field_validator("constraints")
    @classmethod
    def _constraints(cls, bounds: dict[str, Bound]) -> dict[str, Bound]:
        for name in bounds:
            _known("objectives", name)
        return bounds

    @property
    def measured(self) -> tuple[str, ...]:
        """Every objective that is to be measured: the objectives, then what constraints add."""
        return (*self.objectives, *(name for name in self.constraints if name not in self.objectives))


def load_spec(source: str | Path, overrides: Sequence[str] = ()) -> StudySpec:
    """The spec in a YAML file, or in a shipped one by name (`demo`), with `key.path=value` overrides.

    Raises `SpecError` with one line.
    """
    path = Path(source)
    if path.is_file():
        text = _read(path)
    elif path.suffix == "" and path.name == str(source) and str(source) in shipped_specs():
        text = shipped_specs()[str(source)]
    else:
        choices = ", ".join(sorted(shipped_specs()))
        raise SpecError(f"no spec file {str(source)!r}, and no shipped spec of that name; shipped: {choices}")
    return parse_spec(text, overrides)


def _read(path: Path) -> str:
    if path.stat().st_size > MAX_SPEC_BYTES:
        raise SpecError(f"spec {str(path)!r} is larger than {MAX_SPEC_BYTES} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise SpecError(f"spec {str(path)!r} cannot be read: {problem}") from None


def shipped_specs() -> dict[str, str]:
    """Name -> YAML text of the specs that are installed with AutoQ."""
    from importlib import resources

    folder = resources.files("autoq.studies")
    return {
        entry.name.removesuffix(".yaml"): entry.read_text(encoding="utf-8")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    }


class _StrictLoader(yaml.SafeLoader):
    """The safe loader, without anchors and aliases (no bombs) and without repeated keys."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:  # type: ignore[override]
        if self.check_event(yaml.events.AliasEvent):
            raise SpecError("the spec must not use YAML anchors and aliases")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key in keys:
            if keys.count(key) > 1:
                raise SpecError(f"the key {key!r} stands twice in the spec, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def _yaml(text: str, what: str) -> Any:
    try:
        return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader, made stricter
    except yaml.YAMLError as problem:
        line = " ".join(str(problem).split())
        raise SpecError(f"{what} is not valid YAML: {line}") from None
    except RecursionError:
        raise SpecError(f"{what} is nested too deeply") from None
    except (ValueError, TypeError) as problem:
        raise SpecError(f"{what} is not valid YAML: {problem}") from None


def parse_spec(text: str, overrides: Sequence[str] = ()) -> StudySpec:
    """The spec in a YAML text. Raises `SpecError` with one line."""
    if len(text.encode(errors="replace")) > MAX_SPEC_BYTES:
        raise SpecError(f"the spec is larger than {MAX_SPEC_BYTES} bytes")
    tree = _yaml(text, "the spec")
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
        raise SpecError(_one_line(problem)) from None
    except RecursionError:
        raise SpecError("the spec is nested too deeply") from None


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `a.b.c=value` in place; the value is read as YAML."""
    path, sign, value = override.partition("=")
    keys = path.strip().split(".")
    if not sign or not all(keys):
        raise SpecError(f"--set {override!r} must look like sampler.seed=1")
    node = tree
    for key in keys[:-1]:
        child = node.setdefault(key, {})
        if not isinstance(child, dict):
            raise SpecError(f"--set {override!r}: {key!r} is not a section")
        node = child
    node[keys[-1]] = _yaml(value, f"--set {override!r}")


def _section_fields(path: Iterable[int | str]) -> list[str]:
    """The field names of the section that `path` leads to, for the choices in a message."""
    model: type[BaseModel] | None = StudySpec
    for key in path:
        if isinstance(key, int) or model is None:
            continue
        field = model.model_fields.get(key)
        if field is None:
            return []
        nested = [field.annotation, *get_args(field.annotation)]
        model = next((n for n in nested if isinstance(n, type) and issubclass(n, BaseModel)), None)
    return list(model.model_fields) if model else []


def _one_line(problem: ValidationError) -> str:
    """The first mistake as `field: message (got value)`, and how many more there are."""
    errors = problem.errors(include_url=False)
    # A union reports each of its branches; the branch tags are noise in a path.
    first = errors[0]
    known_noise = {"int", "literal['channel','tensor']", "constrained-int", "float", "str", "bool"}
    path = [key for key in first["loc"] if str(key) not in known_noise and not str(key).startswith("function-")]
    where = ".".join(str(key) for key in path) or "spec"
    value = first.get("input")
    match first["type"]:
        case "extra_forbidden":
            choices = _section_fields(path[:-1])
            near = difflib.get_close_matches(str(path[-1]), choices, n=1)
            hint = f"; did you mean {near[0]!r}? choose" if near else "; choose"
            text = f"{where}: no such field{hint} from {', '.join(choices)}"
        case "missing":
            text = f"{where}: is required"
        case "literal_error":
            expected = str(first.get("ctx", {}).get("expected", ""))
            near = difflib.get_close_matches(str(value), re.findall(r"'([^']*)'", expected), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            text = f"{where}: {str(value)[:80]!r} is not one of {expected}{hint}"
        case "value_error":
            text = f"{where}: {first['msg'].removeprefix('Value error, ')}"
            if isinstance(value, str | int | float) and repr(value) not in text:
                text += f" (got {str(value)[:80]!r})"
        case _:
            shown = f" (got {str(value)[:80]!r})"
            text = f"{where}: {first['msg'][:1].lower()}{first['msg'][1:]}{shown}"
    more = len({error["loc"] for error in errors}) - 1
    text = " ".join(text.split())
    return text + (f" (and {more} more)" if more > 0 else "")

