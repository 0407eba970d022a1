"""Evaluation: (assignment, model, objectives) -> measurements. The one place where things meet.

An `Evaluator` belongs to a worker. It loads the model once, keeps the unquantized model's answers on
the data, takes quantized layers from the bank, swaps them in by pointer and runs one forward pass. It
knows nothing of the database or of Optuna. Its public methods are what an executor's jobs call.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor

from autoq import plugins
from autoq.assignment import Assignment
from autoq.bank import Bank
from autoq.cache import cache_dir
from autoq.calibration import curvature
from autoq.calibration.text import windows
from autoq.device import fingerprint, threads
from autoq.energy.meters import opened
from autoq.errors import AutoQError, BadInput, ModelRefused, NotFinite, SchemeRefused
from autoq.measurement import Measurement, Part
from autoq.methods import Method, QuantizedWeight, Statistics
from autoq.models import LoadedModel, load
from autoq.objectives import Objective, TokenChunk, TokenObjective
from autoq.reference import Reference, make_reference, row_blocks
from autoq.scheme import Keep, Scheme, parse_scheme
from autoq.spec import StudySpec
from autoq.statistics import mean_and_stderr
from autoq.targets import CostTable, load_target

_DISTANCE = {"encoder": "cosine_distance"}  # how far outputs are from the unquantized model's, by task
CURVATURE_TOKENS = 4096  # more of them changed nothing


class _Tally:
    """Objective -> one value per token of some windows (n, tokens), filled in as they are evaluated."""

    def __init__(self, objectives: Mapping[str, TokenObjective], data: Tensor) -> None:
        self.values = {name: torch.full(data.shape, torch.nan, dtype=torch.float64) for name in objectives}


@dataclass(frozen=True)
class Comparison:
    """A runtime against the search, on the same `tokens` of the report part.

    `here` is the quality as the search evaluates it, `there` what the runtime's outputs come to.
    `apart` is the mean KL, in nats per token, of the runtime's distribution from the search's, and `moved`
    that of the search's from the unquantized model's; for an encoder without a head mean cosine distances.
    `paired` is per objective the standard error of the difference of `there` and `here`, token by token.
    """

    here: list[Measurement]
    there: list[Measurement]
    apart: float
    moved: float
    paired: dict[str, float]
    tokens: int


@contextlib.contextmanager
def _naming(layer: str, scheme: Scheme) -> Iterator[None]:
    """Name the layer and the scheme in what a method raises: it knows neither."""
    try:
        yield
    except (NotFinite, SchemeRefused) as problem:
        raise type(problem)(f"layer {layer} as {scheme}: {problem}") from problem
    except AutoQError:  # of the bank: not this layer's fault
        raise
    except Exception as problem:
        raise AutoQError(f"layer {layer} as {scheme}: {type(problem).__name__}: {problem}") from problem


class Evaluator:
    """Evaluates assignments of one study: model, data, bank and target, loaded once.

    Raises `AutoQError` where the model, the data or the target cannot be used.
    """

    def __init__(self, spec: StudySpec) -> None:
        self.spec = spec
        torch.set_num_threads(spec.workers.cpus or max(1, threads() // spec.workers.count))
        if spec.workers.gpus > 0 and not torch.cuda.is_available():
            raise BadInput(f"workers.gpus is {spec.workers.gpus:g} but this machine has no CUDA device; set it to 0")
        self.device = "cuda" if spec.workers.gpus > 0 else "cpu"
        self.model: LoadedModel = load(spec.model, self.device)
        self.info = self.model.info
        self.parts = windows(spec.data, self.model.tokenizer, self.info.max_positions)
        self.target = load_target(spec.target)
        share = psutil.virtual_memory().available // (4 * spec.workers.count)
        self._share_bytes = share if spec.bank.memory is None else spec.bank.memory
        self.bank = Bank(cache_dir() / "bank", spec.bank.disk, self._share_bytes)
        self.fingerprint = fingerprint()
        self._hashes: dict[str, str] = {}
        self._path: Path | None = None
        self._calibrated: dict[tuple[str, Scheme], Callable[[Tensor], Tensor] | None] = {}
        self._reference: tuple[Part, Reference] | None = None
        self._objectives: dict[str, TokenObjective] = {}
        for name in spec.measured:
            objective = plugins.load("objectives", name, Objective)
            if isinstance(objective, TokenObjective):
                self._objectives[name] = objective

    # -- jobs -------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What this worker is and holds, for the start of a study.

        Raises `ModelRefused` where the unquantized model itself gives NaN or infinity.
        """
        self._refuse_not_finite()
        return {
            "device": self.fingerprint,
            "threads": torch.get_num_threads(),
            "search_tokens": self.parts.search.numel(),
            "report_tokens": self.parts.report.numel(),
            "calibration_tokens": self.parts.calibration.numel(),
            "window_tokens": self.parts.search.shape[1],
        }

    def _refuse_not_finite(self) -> None:
        if not self._objectives:
            return
        with torch.inference_mode():
            outputs = self.model.outputs(self.parts.search[:1].to(self.model.device)).float()
        if not torch.isfinite(outputs if self.info.task == "encoder" else outputs.logsumexp(-1)).all():
            raise ModelRefused(
                f"model {self.spec.model.id!r} gives NaN or infinity before anything is quantized: its weights are "
                f"damaged, or its activations overflow in {self.spec.model.dtype}"
            )

    def measure(self, assignment: Assignment, part: Part) -> list[Measurement]:
        """Quality of `assignment` on one part of the data, one measurement per token objective.

        Raises `NotFinite` where the model's outputs or an objective are NaN or infinite.
        """
        if not self._objectives:
            return []
        reference = self._reference_for(part)
        data = self._part(part)
        tally = _Tally(self._objectives, data)
        with self._swapped(assignment), torch.inference_mode():
            for index, window in enumerate(data):
                self._judge(tally, window, self._outputs(window), reference, index)
        return self._measurements(tally, part)

    def compare(
        self, assignment: Assignment, outputs: Callable[[Tensor], Tensor], tokens: int | None = None
    ) -> Comparison:
        """Hold a runtime's `outputs`, window (tokens,) -> (tokens, v), against `assignment` in this process.

        Both see the same windows of the report part, `tokens` of them in all (default: every one).
        Raises `NotFinite` where either gives NaN or infinity.
        """
        data = self.parts.report
        if tokens is not None:
            data = data[: max(1, -(-tokens // data.shape[1]))]
        with torch.inference_mode():
            reference = make_reference(self.model, data, self._share_bytes)
        here, there = _Tally(self._objectives, data), _Tally(self._objectives, data)
        distance = plugins.load("objectives", _DISTANCE.get(self.info.task, "kl_nats_per_token"), Objective)
        assert isinstance(distance, TokenObjective)
        apart, moved = 0.0, 0.0
        with self._swapped(assignment), torch.inference_mode():
            for index, window in enumerate(data):
                expected = self._outputs(window)
                found = outputs(window).to(expected.device)
                self._judge(here, window, expected, reference, index)
                self._judge(there, window, found, reference, index)
                apart += self._apart(expected, found)
                for _, chunk in self._chunks(window, expected, reference, index):
                    moved += float(distance.per_token(chunk).double().sum()) / len(expected)
        return Comparison(
            self._measurements(here, "report"),
            self._measurements(there, "report"),
            max(apart / len(data), 0.0),
            max(moved / len(data), 0.0),
            {name: self._paired(name, here, there) for name in here.values},
            data.numel(),
        )

    def _paired(self, name: str, here: _Tally, there: _Tally) -> float:
        mean, _, _ = mean_and_stderr(here.values[name].numpy())
        _, stderr, _ = mean_and_stderr((there.values[name] - here.values[name]).numpy())
        return self._objectives[name].transform(mean, stderr or 0.0)[1]

    def _apart(self, expected: Tensor, found: Tensor) -> float:
        """Mean over tokens of the KL of `found` from `expected` in nats; of an encoder without a head, of
        the cosine distance."""
        total = 0.0
        for rows in row_blocks(expected):
            one, two = expected[rows].float(), found[rows].float()
            if self.info.task == "encoder":
                total += float((1 - F.cosine_similarity(one.double(), two.double(), dim=-1)).sum())
            else:
                total += float(F.kl_div(two.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="sum"))
        return total / len(expected)

    @contextlib.contextmanager
    def _swapped(self, assignment: Assignment) -> Iterator[None]:
        """The model under `assignment`, then as it was."""
        self.model.swap(*self._swappable(assignment))
        try:
            yield
        finally:
            self.model.restore()

    def _outputs(self, window: Tensor) -> Tensor:
        return self.model.outputs(window.unsqueeze(0).to(self.model.device))[0]

    def _judge(self, tally: _Tally, window: Tensor, output: Tensor, reference: Reference, index: int) -> None:
        for rows, chunk in self._chunks(window, output, reference, index):
            for name, objective in self._objectives.items():
                tally.values[name][index, rows] = objective.per_token(chunk).double().cpu()

    def _measurements(self, tally: _Tally, part: Part) -> list[Measurement]:
        return [self._measurement(name, values.numpy(), part) for name, values in tally.values.items()]

    def calibrate(self) -> str:
        """Gather the statistics of the curvature proxy into this node's cache; returns the file.

        One forward and one backward pass over the calibration part. A file that is already there for
        the same model and data is used as it is.
        """
        path = self._statistics_path()
        if not curvature.is_whole(path):
            data = self.parts.calibration
            data = data[: max(1, CURVATURE_TOKENS // data.shape[1])]
            curvature.save(curvature.gather(self.model, data, self.spec.data.seed), path)
            curvature.bound(path.parent, self.spec.bank.disk // 4)
        else:
            with contextlib.suppress(OSError):  # a cache that can only be read
                path.touch()
        return str(path)

    def sensitivities(self, choices: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
        """Layer -> scheme -> predicted KL in nats per token, by the curvature proxy.

        Quantizes each layer under each of its choices, which also fills the bank.
        """
        path = Path(self.calibrate())
        found: dict[str, dict[str, float]] = {}
        for name, texts in choices.items():
            statistics = curvature.load(path, name)
            weight = self.model.weight(name).cpu()
            found[name] = {}
            for text in texts:
                scheme = parse_scheme(text)
                if isinstance(scheme, Keep):
                    found[name][text] = 0.0
                    continue
                dequantized = self.quantized(name, scheme).dequantize()
                dynamic = getattr(scheme, "activation", None) is not None
                cost = curvature.proxy(statistics, weight, dequantized, dynamic)
                if not np.isfinite(cost):
                    raise NotFinite(f"layer {name} as {text}: its predicted loss is {cost}; exclude it from the space")
                found[name][text] = cost
        return found

    def cost_table(self, choices: Mapping[str, Sequence[str]]) -> CostTable:
        """Time every layer of `choices` under its schemes, with the target's kernels."""
        representative: dict[tuple[Any, ...], str] = {}
        weights = {}
        for name, texts in choices.items():
            # Layers of equal shape are timed once, so only the first of each is worth unpacking.
            layer = self.info.layer(name)
            same = (layer.kind, layer.out_features, layer.in_features, layer.has_bias, tuple(texts))
            first = representative.setdefault(same, name)
            if first == name:
                weights[name] = [self.quantized(name, parse_scheme(text)) for text in texts]
            else:
                weights[name] = weights[first]
        return self.target.cost_table(self.model, weights, self.spec.target)

    def time(self, assignment: Assignment) -> list[Measurement]:
        """Latency of the assembled model, end to end on the target."""
        weights = {
            name: self.quantized(name, scheme) for name, scheme in assignment.items() if not isinstance(scheme, Keep)
        }
        wanted = set(self.spec.measured)
        return [m for m in self.target.time(self.model, weights, self.spec.target) if m.objective in wanted]

    def meter(self, assignment: Assignment) -> list[Measurement]:
        """Energy of the assembled model by this machine's meters; empty where there are none."""
        assert self.target.runs_on is not None
        with opened(self.target.runs_on) as meters:
            if not meters:
                return []
            weights = {
                name: self.quantized(name, scheme)
                for name, scheme in assignment.items()
                if not isinstance(scheme, Keep)
            }
            return self.target.meter(self.model, weights, self.spec.target, meters)

    # -- the bank ---------------------------------------------------------------------------------

    def _hash(self, name: str) -> str:
        if name not in self._hashes:
            self._hashes[name] = self.bank.weight_hash(self.model.weight(name))
        return self._hashes[name]

    def quantized(self, name: str, scheme: Scheme) -> QuantizedWeight:
        """A layer under `scheme`, from the bank or made now."""
        statistics, calibration = self._statistics_for(name, scheme)
        with _naming(name, scheme):
            return self.bank.quantized(self.model.weight(name).cpu(), self._hash(name), scheme, statistics, calibration)

    def statistics(self, name: str) -> Statistics:
        """The layer's calibration statistics, gathered where they are not yet."""
        return curvature.load(Path(self.calibrate()), name)

    def _statistics_for(self, name: str, scheme: Scheme) -> tuple[Callable[[], Statistics] | None, str]:
        """How to get a layer's statistics and what they are known by, for a scheme that is made from them."""
        if not plugins.load("methods", scheme.method, Method).uses_statistics(scheme):
            return None, ""
        return functools.partial(self.statistics, name), self._statistics_path().stem

    def activation(self, name: str, scheme: Scheme) -> Callable[[Tensor], Tensor] | None:
        """What the target's kernel does to the layer's input."""
        if getattr(scheme, "activation", None) != "a8static":
            return self.target.activation(scheme)
        if (name, scheme) not in self._calibrated:
            self._calibrated[name, scheme] = self.target.activation(scheme, self.statistics(name))
        return self._calibrated[name, scheme]

    def _swappable(self, assignment: Assignment) -> tuple[dict[str, Tensor], dict[str, Any]]:
        weights, activations = {}, {}
        for name, scheme in assignment.items():
            if isinstance(scheme, Keep):
                continue
            original = self.model.weight(name)
            statistics, calibration = self._statistics_for(name, scheme)
            with _naming(name, scheme):
                dequantized = self.bank.dequantized(
                    original.cpu(), self._hash(name), scheme, original.dtype, statistics, calibration
                )
            weights[name] = dequantized.to(original.device)
            if (function := self.activation(name, scheme)) is not None:
                activations[name] = function
        return weights, activations

    def _statistics_path(self) -> Path:
        if self._path is None:
            self._path = self._find_statistics_path()
        return self._path

    def _find_statistics_path(self) -> Path:
        digest = hashlib.sha256()
        for layer in self.info.layers:
            digest.update(f"{layer.name} {self._hash(layer.name)}\n".encode())
        # Gradients depend on all that the model computes: norms, biases, and what its config says.
        own = {name for layer in self.info.layers for name in (layer.name, *layer.tied)}
        for name, tensor in self.model.model.state_dict().items():
            if name.removesuffix(".weight") not in own:
                digest.update(f"{name} {self.bank.weight_hash(tensor)}\n".encode())
        config: Any = self.model.model.config
        told = {key: value for key, value in config.to_dict().items() if key != "_name_or_path"}
        digest.update(json.dumps(told, sort_keys=True, default=str).encode())
        digest.update(self.parts.calibration.numpy().tobytes())
        digest.update(f"{self.spec.data.seed} {self.info.task} {CURVATURE_TOKENS} 4".encode())
        return cache_dir() / "statistics" / f"{digest.hexdigest()[:32]}.safetensors"

    # -- the reference ----------------------------------------------------------------------------

    def _part(self, part: Part) -> Tensor:
        return self.parts.search if part == "search" else self.parts.report

    def _reference_for(self, part: Part) -> Reference:
        """The reference of a part; only one part's is in memory at a time."""
        if self._reference is None or self._reference[0] != part:
            self._reference = None
            with torch.inference_mode():
                self._reference = (part, make_reference(self.model, self._part(part), self._share_bytes))
        return self._reference[1]

    # -- tokens -----------------------------------------------------------------------------------

    def _next_tokens(self, window: Tensor) -> Tensor:
        """What each position is to predict; a sequence-to-sequence decoder's input is already shifted."""
        if self.info.task == "seq2seq":
            return window
        nothing = torch.full_like(window[:1], -1)
        if self.info.task == "causal":
            return torch.cat([window[1:], nothing])
        return nothing.expand_as(window)

    def _chunks(
        self, window: Tensor, output: Tensor, reference: Reference, index: int
    ) -> Iterator[tuple[slice, TokenChunk]]:
        next_tokens = self._next_tokens(window).to(output.device)
        for rows in row_blocks(output):
            values = output[rows].float()
            normalizer = None if self.info.task == "encoder" else values.logsumexp(-1)
            if not torch.isfinite(values if normalizer is None else normalizer).all():
                raise NotFinite("the model's outputs are NaN or infinite under this assignment")
            kept, mass, entropy = reference.rows(index, rows)
            yield rows, TokenChunk(values, next_tokens[rows], kept, normalizer, mass, entropy)

    def _measurement(self, name: str, values: np.ndarray[Any, np.dtype[np.float64]], part: Part) -> Measurement:
        objective = self._objectives[name]
        mean, stderr, n = mean_and_stderr(values)
        value, error = objective.transform(mean, stderr if stderr is not None else 0.0)
        if not np.isfinite(value):
            raise NotFinite(f"{name} is {value} under this assignment")
        return Measurement(
            name,
            value,
            objective.unit,
            "measured",
            part,
            stderr=None if stderr is None else error,
            n=n,
            device=self.fingerprint,
            detail={"threads": torch.get_num_threads(), "dtype": self.spec.model.dtype},
        )
