"""Targets: the deployment runtimes, one file each.

A target says which schemes it runs on which layers, so that the search space holds only what can
run; it times layers and whole assembled models with the kernels that will run; it writes the
checkpoint that its runtime loads, and loads it again to be compared with what was promised. To add
one, write `autoq/targets/NAME.py` with one subclass of `Target`. Target files import torch inside
functions only: `refuses` and `grid` are asked before any model is loaded.
"""

from __future__ import annotations

import abc
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from autoq import plugins
from autoq.assignment import Assignment
from autoq.energy.estimate import HOST, Estimate, per_token
from autoq.energy.meters import Meter, Part
from autoq.errors import AutoQError, SpecError
from autoq.kv_cache import Cache, KeyValue
from autoq.layer import Layer, ModelInfo
from autoq.measurement import Measurement
from autoq.scheme import Scheme
from autoq.spec import ModelSpec, TargetSpec

if TYPE_CHECKING:
    from torch import Tensor

    from autoq.methods import Grid, QuantizedWeight, Statistics
    from autoq.models import LoadedModel

# The detail of an end-to-end latency: the unquantized model's, timed in turns with it.
UNQUANTIZED = "unquantized_ms"


@dataclass(frozen=True)
class CostTable:
    """Additive latency predictions: per phase, a base and one cost per layer shape and scheme.

    `base_ms[phase]` is what the unquantized model costs beside its layers, measured end to end minus
    the table's own entries. `layer_ms[phase][layer][scheme text]` was timed on the target's kernel
    for that shape. Phases are objective names: `latency_decode_ms`, `latency_prefill_ms`.
    `detail["unquantized_ms"][phase]` is the unquantized model's own latency while the table was timed, and
    `detail["drift"][phase]` how far the machine's speed moved meanwhile, as a share.
    """

    device: str
    base_ms: Mapping[str, float]
    layer_ms: Mapping[str, Mapping[str, Mapping[str, float]]]
    detail: Mapping[str, Any] = field(default_factory=dict)

    def predict(self, phase: str, assignment: Assignment) -> float:
        """Predicted milliseconds of the whole model in `phase` under `assignment`."""
        table = self.layer_ms[phase]
        return self.base_ms[phase] + sum(
            table[name][str(scheme)] for name, scheme in assignment.items() if name in table
        )

    @property
    def restlessness(self) -> float:
        """How far the machine's own speed moved while the table was timed, as a share; 0 where that is not known."""
        return max(self.detail.get("drift", {}).values(), default=0.0)

    def covers(self, choices: Mapping[str, Sequence[str]], phases: Sequence[str]) -> bool:
        """Whether there is an entry for every layer, each of its choices and each phase."""
        return all(
            phase in self.layer_ms
            and all(
                name in self.layer_ms[phase] and set(texts) <= set(self.layer_ms[phase][name])
                for name, texts in choices.items()
            )
            for phase in phases
        )


@dataclass(frozen=True)
class Exported:
    """What an export wrote.

    `format` names the format in words. `weights` are the files, relative to the folder, whose bytes
    are the checkpoint's size. `run` holds the lines to paste to run it, `{folder}` standing for where
    it lies.
    """

    format: str
    weights: tuple[str, ...]
    run: str


class Runtime(abc.ABC):
    """A checkpoint loaded by the real runtime. Use as a context manager."""

    @abc.abstractmethod
    def differences(self, assignment: Assignment) -> list[str]:
        """What the files say otherwise than `assignment`, one line a layer, naming both; empty if all is as it
        should be. Read from the files' own headers and configuration, never from AutoQ's notes."""

    @abc.abstractmethod
    def outputs(self, tokens: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) float32 of one window of token ids (tokens,), or (1, classes) of one window or
        image (channels, height, width); final hidden states for an encoder without a head."""

    def time(self, workload: TargetSpec) -> list[Measurement]:
        """End-to-end latency, one measurement (part `report`, kind `measured`) per phase; empty where the
        target times nothing."""
        return []

    def close(self) -> None:  # noqa: B027 - most runtimes hold nothing that must be freed
        """Free what the runtime holds. Can be called again."""

    def __enter__(self) -> Runtime:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Target(abc.ABC):
    """One deployment runtime.

    `fuses` says whether it merges fusion groups, whose layers then must share a scheme.
    `latencies` are the latency objectives that it can time (or predict, if `predicts_only`).
    `logits_tolerance` is the largest KL, in nats per token, between the searched model and the reloaded
    export that can be rounding: what the runtime computes otherwise than the evaluation did. Where inputs
    are quantized too, rounding decides codes and is not small: there the export may be as far from the
    searched model as that is from the original.
    `rounds_per_token` says that a range of inputs that is found while running (`a8dyn`) is each token's own, and not
    that of all tokens that are multiplied together.
    `reads_images` says that it runs models of images; `cannot_run` refuses them for all others.
    `runs_on` is the part of this machine whose meters tell the target's energy, if `meter` asks them.
    """

    fuses: ClassVar[bool] = False
    rounds_per_token: ClassVar[bool] = False
    latencies: ClassVar[frozenset[str]] = frozenset()
    predicts_only: ClassVar[bool] = False
    logits_tolerance: ClassVar[float] = 1e-4
    reads_images: ClassVar[bool] = False
    runs_on: ClassVar[Part | None] = None

    def configured(self, workload: TargetSpec) -> Target:
        """This target as the spec's `target` section asks for it. Raises `SpecError` for what it cannot be."""
        if workload.device is not None:
            raise SpecError(f"target.device: {workload.name} is a runtime of its own; a description is for described")
        return self

    @abc.abstractmethod
    def grid(self) -> Grid:
        """The axes of everything this target runs: the default search space."""

    @abc.abstractmethod
    def refuses(self, layer: Layer, scheme: Scheme) -> str | None:
        """Why this target cannot run `scheme` on `layer` (one clause, naming the rule), or None."""

    def refuses_cache(self, cache: Cache, scheme: KeyValue) -> str | None:
        """Why this target cannot keep a KV cache under `scheme` (one clause), or None. Every target keeps it as it is.

        Its times, energies and exports must be those of such a cache.
        """
        return "it keeps keys and values in the model's dtype"

    def refuses_model(self, info: ModelInfo) -> str | None:
        """Why this target cannot run such a model at all (one clause), or None."""
        return None

    def baselines(self) -> Mapping[str, Sequence[Scheme]]:
        """Uniform baselines: name -> schemes in order of preference; each layer takes the first that
        its choices hold, else keeps its weights. Always includes the unquantized model."""
        return {}

    def presets(self, info: ModelInfo) -> Mapping[str, Mapping[str, Scheme]]:
        """The runtime's own mixes for such a model, tried as baselines: name -> layer -> scheme, each of
        them one that `refuses` lets through."""
        return {}

    def other_bytes(self, info: ModelInfo, model: ModelSpec) -> int:
        """Bytes that ship beside the layers' weights: norms, biases, and what the format adds.

        Asked before any weight is loaded; may read the model's config and tokenizer.
        """
        return info.other_bytes

    def unavailable(self) -> str | None:
        """What is missing on this machine for this target to measure, or None. Imports nothing heavy."""
        return None

    def runtime(self) -> str:
        """The runtime and its version, as it stands beside what it measured: `torch 2.13.0`."""
        return ""

    def cost_table(
        self, model: LoadedModel, choices: Mapping[str, Sequence[QuantizedWeight]], workload: TargetSpec
    ) -> CostTable:
        """Time every layer under each of its choices. Layers of equal shape are timed once."""
        raise AutoQError("this target times nothing")

    def predicted_costs(self, info: ModelInfo, choices: Mapping[str, Sequence[str]], workload: TargetSpec) -> CostTable:
        """The table of a target that `predicts_only`, from the model's skeleton: layer -> scheme texts."""
        raise AutoQError("this target predicts nothing")

    def estimated_energy(self, info: ModelInfo, assignment: Assignment, workload: TargetSpec) -> Estimate:
        """Joules per token from the work of `assignment` and published constants of what this target runs on."""
        return per_token(HOST, info, assignment, workload)

    def meter(
        self,
        model: LoadedModel,
        weights: Mapping[str, QuantizedWeight],
        workload: TargetSpec,
        meters: Sequence[Meter],
    ) -> list[Measurement]:
        """Energy of the assembled model: one measurement (part `report`, kind `measured`) of
        `energy_joule_per_token` by those of `meters` that meter what it ran on; empty where none does.

        Called only where `runs_on` names a part of this machine and it has meters.
        """
        return []

    def time(
        self, model: LoadedModel, weights: Mapping[str, QuantizedWeight], workload: TargetSpec
    ) -> list[Measurement]:
        """Assemble the model from packed-kernel modules, check that they compute what the dequantized
        weights compute (`KernelMismatch` if not), then time it end to end, one measurement (part
        `report`, kind `measured`) per latency objective.

        The unquantized model is timed in turns with it: a machine's speed drifts by more than a run
        varies, and it drifts for both. `detail["unquantized_ms"]` is its latency.
        """
        raise AutoQError("this target times nothing")

    def activation(self, scheme: Scheme, statistics: Statistics | None = None) -> Callable[[Tensor], Tensor] | None:
        """A function Tensor -> Tensor that does to a layer's input what the kernel does to it under
        `scheme` (activation quantization), or None. `statistics` are the layer's, given where the
        scheme is calibrated (`OBSERVERS` of `autoq.scheme`)."""
        return None

    def exports(self) -> str | None:
        """What `export` writes, in a few words, or None where this target exports nothing."""
        return None

    def export(
        self,
        model: LoadedModel,
        weights: Mapping[str, QuantizedWeight],
        folder: Path,
        statistics: Callable[[str], Statistics],
    ) -> Exported:
        """Write into `folder`, which exists and is empty, the checkpoint that the runtime loads.

        `weights` holds every layer, kept ones too, each of a scheme that `refuses` lets through;
        `statistics` gives a layer's calibration statistics, for schemes that ship a calibrated range.
        Raises `AutoQError` for a model that the format cannot hold.
        """
        raise AutoQError("this target exports nothing")

    def reload(self, folder: Path, threads: int | None = None) -> Runtime:
        """Load what `export` wrote with the real runtime. Raises `AutoQError` for files that it refuses."""
        raise AutoQError("this target exports nothing")


def load_target(workload: TargetSpec) -> Target:
    """The target that a spec's `target` section names and configures. Raises `SpecError`."""
    return plugins.load("targets", workload.plugin, Target).configured(workload)


def cannot_run(target: Target, info: ModelInfo) -> str | None:
    """Why a target cannot run a model at all (one clause), or None: by what it reads, or by its `refuses_model`."""
    if info.images is not None and not target.reads_images:
        able = [name for name in plugins.names("targets") if plugins.load("targets", name, Target).reads_images]
        choices = ", ".join(name.replace("_", "-") for name in able)
        return f"it reads token ids, and {info.architecture} reads images; choose from {choices}"
    return target.refuses_model(info)


def missing_packages(packages: Sequence[str], extra: str) -> str | None:
    """What `unavailable` says where some of `packages`, which `extra` installs, are not there; else None."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    verb = "is" if len(missing) == 1 else "are"
    return f"{', '.join(missing)} {verb} not installed: pip install 'autoq[{extra}]'"
