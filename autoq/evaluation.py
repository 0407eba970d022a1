"""Evaluation: (assignment, model, objectives) -> measurements. The one place where things meet.

An `Evaluator` belongs to a worker. It loads the model once, keeps the unquantized model's answers on
the data, takes quantized layers from the bank, swaps them in by pointer and runs one forward pass. It
knows nothing of the database or of Optuna. Its public methods are what an executor's jobs call.

What the unquantized model answered is kept as probabilities in bfloat16 (tokens × vocabulary) where
they fit in a quarter of the free memory; else as final hidden states (tokens × width), from which the
original head gives the probabilities again, chunk by chunk; else as probabilities in a file.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import tempfile
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
from autoq.errors import AutoQError, BadInput, ModelRefused, NotFinite, SchemeRefused
from autoq.measurement import Measurement, Part
from autoq.methods import Method, QuantizedWeight, Statistics
from autoq.models import LoadedModel, load
from autoq.objectives import Objective, TokenChunk, TokenObjective
from autoq.scheme import Keep, Scheme, parse_scheme
from autoq.spec import StudySpec
from autoq.statistics import mean_and_stderr
from autoq.targets import CostTable, load_target

CHUNK_ELEMENTS = 1 << 20  # logits turned to float32 at a time: 4 MB, which stays in the caches
CURVATURE_TOKENS = 4096  # more of them changed nothing


@dataclass
class _Reference:
    """The unquantized model's answers on one part of the data.

    `kept` is (windows, tokens, v): probabilities, or inputs of the `head` (v = width) with its original
    `head_weight`, or an encoder's output. `mass` and `entropy` (windows, tokens) go with probabilities.
    """

    kept: Tensor
    mass: Tensor | None = None
    entropy: Tensor | None = None
    head: torch.nn.Module | None = None
    head_weight: Tensor | None = None

    def rows(self, window: int, rows: slice) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Reference (t, v), mass (t,) and entropy (t,) of some tokens of a window."""
        kept = self.kept[window, rows]
        if self.head_weight is not None:
            bias = getattr(self.head, "bias", None)
            probabilities = F.linear(kept, self.head_weight, bias).float().softmax(-1)
            return probabilities, probabilities.sum(-1), _negative_entropy(probabilities)
        if self.mass is None or self.entropy is None:
            return kept, None, None
        return kept, self.mass[window, rows], self.entropy[window, rows]


def _negative_entropy(probabilities: Tensor) -> Tensor:
    """Σ p log p (t,) of probabilities (t, v) that may hold zeros."""
    entropy: Tensor = torch.special.entr(probabilities).sum(-1)
    return -entropy


def _mapped(shape: tuple[int, ...]) -> Tensor:
    """An empty bfloat16 tensor whose memory is a file without a name, so the system may page it out."""
    handle, path = tempfile.mkstemp(prefix="autoq-reference-")
    os.close(handle)
    try:
        storage = torch.UntypedStorage.from_file(path, True, math.prod(shape) * 2)
    finally:
        Path(path).unlink()
    return torch.empty(0, dtype=torch.bfloat16).set_(storage, 0, shape)  # type: ignore[call-overload, no-any-return]


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
        self._reference: tuple[Part, _Reference] | None = None
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
        weights, activations = self._swappable(assignment)
        reference = self._reference_for(part)
        data = self._part(part)
        values = {name: torch.full(data.shape, torch.nan, dtype=torch.float64) for name in self._objectives}
        self.model.swap(weights, activations)
        try:
            with torch.inference_mode():
                for index, window in enumerate(data):
                    output = self.model.outputs(window.unsqueeze(0).to(self.model.device))[0]
                    for rows, chunk in self._chunks(window, output, reference, index):
                        for name, objective in self._objectives.items():
                            values[name][index, rows] = objective.per_token(chunk).double().cpu()
        finally:
            self.model.restore()
        return [self._measurement(name, values[name].numpy(), part) for name in self._objectives]

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
                dequantized = self._quantized(name, scheme).dequantize()
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
                weights[name] = [self._quantized(name, parse_scheme(text)) for text in texts]
            else:
                weights[name] = weights[first]
        return self.target.cost_table(self.model, weights, self.spec.target)

    def time(self, assignment: Assignment) -> list[Measurement]:
        """Latency of the assembled model, end to end on the target."""
        weights = {
            name: self._quantized(name, scheme) for name, scheme in assignment.items() if not isinstance(scheme, Keep)
        }
        wanted = set(self.spec.measured)
        return [m for m in self.target.time(self.model, weights, self.spec.target) if m.objective in wanted]

    # -- the bank ---------------------------------------------------------------------------------

    def _hash(self, name: str) -> str:
        if name not in self._hashes:
            self._hashes[name] = self.bank.weight_hash(self.model.weight(name))
        return self._hashes[name]

    def _quantized(self, name: str, scheme: Scheme) -> QuantizedWeight:
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

    def _activation(self, name: str, scheme: Scheme) -> Callable[[Tensor], Tensor] | None:
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
            if (function := self._activation(name, scheme)) is not None:
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
        digest.update(f"{self.spec.data.seed} {self.info.task} {CURVATURE_TOKENS} 3".encode())
        return cache_dir() / "statistics" / f"{digest.hexdigest()[:32]}.safetensors"

    # -- the reference ----------------------------------------------------------------------------

    def _part(self, part: Part) -> Tensor:
        return self.parts.search if part == "search" else self.parts.report

    def _reference_for(self, part: Part) -> _Reference:
        """The reference of a part; only one part's is in memory at a time."""
        if self._reference is None or self._reference[0] != part:
            self._reference = None
            with torch.inference_mode():
                self._reference = (part, self._make_reference(self._part(part)))
        return self._reference[1]

    def _make_reference(self, data: Tensor) -> _Reference:
        if self.info.task == "encoder":
            states = [self.model.outputs(window.unsqueeze(0).to(self.model.device)) for window in data]
            return _Reference(torch.cat(states))
        needed = data.numel() * self.info.vocab_size * 2
        if needed > self._share_bytes and (kept := self._hidden_states(data)) is not None:
            return kept
        shape = (*data.shape, self.info.vocab_size)
        if needed > self._share_bytes and self.device == "cpu":
            probabilities = _mapped(shape)
        else:
            probabilities = torch.empty(shape, dtype=torch.bfloat16, device=self.model.device)
        mass, entropy = torch.empty(2, *data.shape, device=self.model.device)
        for index, window in enumerate(data):
            output = self.model.outputs(window.unsqueeze(0).to(self.model.device))[0]
            for rows in self._row_blocks(output):
                rounded = output[rows].float().softmax(-1).to(torch.bfloat16)
                probabilities[index, rows] = rounded
                exact = rounded.float()
                mass[index, rows] = exact.sum(-1)
                entropy[index, rows] = _negative_entropy(exact / mass[index, rows].unsqueeze(-1))
        return _Reference(probabilities, mass, entropy)

    def _hidden_states(self, data: Tensor) -> _Reference | None:
        """The reference as inputs of the head, or None where logits are more than the head's product
        (a soft cap, a scale), which is tried out on the first window."""
        head = self.model.model.get_output_embeddings()  # type: ignore[operator]
        if not isinstance(head, torch.nn.Module):
            return None
        states: list[Tensor] = []
        handle = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0]))
        weight = head.weight.data
        assert isinstance(weight, Tensor)
        try:
            for index, window in enumerate(data):
                logits = self.model.outputs(window.unsqueeze(0).to(self.model.device))[0]
                if index == 0:
                    again = F.linear(states[0], weight, getattr(head, "bias", None))
                    if again.shape != logits.shape or not torch.allclose(again, logits, rtol=1e-2, atol=1e-2):
                        return None
        finally:
            handle.remove()
        return _Reference(torch.stack(states), head=head, head_weight=weight)

    # -- tokens -----------------------------------------------------------------------------------

    @staticmethod
    def _row_blocks(output: Tensor) -> Iterator[slice]:
        step = max(1, CHUNK_ELEMENTS // output.shape[-1])
        for start in range(0, output.shape[0], step):
            yield slice(start, min(start + step, output.shape[0]))

    def _next_tokens(self, window: Tensor) -> Tensor:
        """What each position is to predict; a sequence-to-sequence decoder's input is already shifted."""
        if self.info.task == "seq2seq":
            return window
        nothing = torch.full_like(window[:1], -1)
        if self.info.task == "causal":
            return torch.cat([window[1:], nothing])
        return nothing.expand_as(window)

    def _chunks(
        self, window: Tensor, output: Tensor, reference: _Reference, index: int
    ) -> Iterator[tuple[slice, TokenChunk]]:
        next_tokens = self._next_tokens(window).to(output.device)
        for rows in self._row_blocks(output):
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
