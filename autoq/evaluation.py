"""Evaluation: (assignment, model, objectives) -> measurements. The one place where things meet.

An `Evaluator` belongs to a worker. It holds a model whose layers can be swapped (`autoq.quantized_model`), keeps the
unquantized model's answers on the data, swaps quantized layers in by pointer and runs one forward pass. It knows
nothing of the database or of Optuna. Its public methods are what an executor's jobs call.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoq.assignment import Assignment
from autoq.bank import digest, pack
from autoq.calibration import caches, curvature, slopes
from autoq.chunks import chunks, mean_loss
from autoq.device import fingerprint
from autoq.energy.meters import opened
from autoq.errors import ModelRefused, NotFinite
from autoq.folded_model import folded, without_scales
from autoq.kv_cache import KeyValue, parse_choice
from autoq.layer import Layer
from autoq.measurement import Comparison, Measurement, Part, Probe
from autoq.methods import QuantizedWeight
from autoq.models.caches import Read, read
from autoq.models.prefix import PrefixStates
from autoq.objectives import TokenObjective, distance_of
from autoq.objectives import load as load_objective
from autoq.quantized_model import CURVATURE_TOKENS, QuantizedModel
from autoq.reference import Reference, distance, make_reference
from autoq.scheme import Float, Integer, Keep, Scheme, parse_scheme
from autoq.spec import StudySpec
from autoq.statistics import Rival, mean_and_stderr, shards
from autoq.targets import CostTable, Exported
from autoq.tasks.runner import TaskRunner

SLOPE_TOKENS = 1024  # one backward pass over all of them at once, so memory grows with them
_STATES_SHARE = 4  # hidden states get this part of the memory that a worker may fill


class _Tally:
    """Objective -> one value per token of some windows (n, tokens), filled in as they are evaluated."""

    def __init__(self, objectives: Mapping[str, TokenObjective], shape: tuple[int, int]) -> None:
        self.objectives = objectives
        self.values = {name: torch.full(shape, torch.nan, dtype=torch.float64) for name in objectives}


class Evaluator(QuantizedModel):
    """Evaluates assignments of one study. Raises what a `QuantizedModel` raises."""

    def __init__(self, spec: StudySpec) -> None:
        super().__init__(spec)
        self.fingerprint = fingerprint()
        if self.device == "cuda":
            self.fingerprint = f"{torch.cuda.get_device_name()}, {self.fingerprint}"
        self._reference: tuple[str, int, Reference] | None = None
        self._kept_states: PrefixStates | None = None
        self._found_losses: dict[tuple[str, ...], dict[str, dict[str, float]]] = {}
        self._objectives: dict[str, TokenObjective] = {}
        for name in (*spec.measured, *spec.reported):
            objective = load_objective(name)
            if isinstance(objective, TokenObjective):
                self._objectives[name] = objective
        self._tasks = TaskRunner(spec, self.model)

    # -- jobs -------------------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """What this worker is and holds, for the start of a study.

        Raises `ModelRefused` where the unquantized model itself gives NaN or infinity, `DataRefused` for
        labelled examples that cannot be used.
        """
        self._refuse_not_finite()
        self._tasks.ready()
        return {
            "device": self.fingerprint,
            "threads": torch.get_num_threads(),
            "search_tokens": self.model.tokens(self.parts.search),
            "report_tokens": self.model.tokens(self.parts.report),
            "calibration_tokens": self.model.tokens(self.parts.calibration),
            "window_tokens": self.model.length(self.parts.search),
        }

    def _refuse_not_finite(self) -> None:
        if not self._objectives and not self._tasks.names(self.spec.measured + self.spec.reported):
            return
        with torch.inference_mode():
            outputs = self.model.outputs(self.parts.search[:1].to(self.model.device)).float()
        if not torch.isfinite(outputs if self.info.task == "encoder" else outputs.logsumexp(-1)).all():
            raise ModelRefused(
                f"model {self.spec.model.id!r} gives NaN or infinity before anything is quantized: its weights are "
                f"damaged, or its activations overflow in {self.spec.model.dtype}"
            )

    def measure(self, assignment: Assignment, part: Part, rival: Rival | None = None) -> list[Measurement]:
        """Quality of `assignment` on one part of the data, one measurement per objective that needs the model.

        Those of `report` are measured there only. It goes shard by shard of the text, or of labelled examples where
        `rival` has values of these, and ends as soon as `rival` is known to be better. Then details tell its number
        as `rival`, how many tokens or examples there are as `of`, and as `estimate` what all of them would most likely
        give. `forward_passes` over the whole part is what it took.
        Raises `NotFinite` where the model's outputs or an objective are NaN or infinite.
        """
        wanted = (*self.spec.measured, *(self.spec.reported if part == "report" else ()))
        names = self._tasks.names(wanted)
        on_tasks = rival is not None and set(rival.values) <= set(names)
        found = self._measure_tokens(assignment, part, None if on_tasks else rival, wanted)
        if names:
            with self.swapped(assignment):
                own = rival if on_tasks else None
                found += self._tasks.measure(names, part, self.fingerprint, self.spec.model.dtype, own)
        return found

    def _measure_tokens(
        self, assignment: Assignment, part: Part, rival: Rival | None, wanted: Sequence[str]
    ) -> list[Measurement]:
        objectives = {name: self._objectives[name] for name in wanted if name in self._objectives}
        if not objectives:
            return []
        data = self._part(part)
        reference = self._reference_for(part, data)
        tally = _Tally(objectives, self._shape(data))
        steps, passes, stopped = shards(*self._shape(data)), 0.0, False
        with self.swapped(assignment), torch.inference_mode():
            for shard in steps:
                for index in shard:
                    output, share = self._continued(assignment, data[index], part, index)
                    self._judge(tally, data[index], output, reference, index)
                    passes += share / len(data)
                stopped = shard.stop < len(data) and self._worse(tally, rival, len(steps) - 1)
                if stopped:
                    break
        detail: dict[str, Any] = {"forward_passes": passes}
        if rival is not None and stopped:
            detail |= {"of": math.prod(self._shape(data)), "rival": rival.number}
            self._states.give_up(self._texts(assignment))
        return [
            self._measurement(name, values.numpy(), part, detail, rival if stopped else None)
            for name, values in tally.values.items()
        ]

    def measure_with_slopes(
        self, assignment: Assignment, part: Part, choices: Mapping[str, Sequence[str]], turn: int = 0
    ) -> tuple[list[Measurement], dict[str, Any]]:
        """`measure`, and what one backward pass tells of every choice (see `autoq.calibration.slopes`).

        The second, of the `SLOPE_TOKENS` of its `turn`, is `{"loss": …, "table": layer -> slopes of its choices}`.
        """
        measurements, data = self.measure(assignment, part), self._part(part)
        count = min(max(1, SLOPE_TOKENS // self.model.length(data)), len(data))
        first = turn % (len(data) // count) * count
        ids = data[first : first + count]
        reference = self._reference_for(part, data)

        def weights(layer: Layer) -> list[Tensor]:
            return [self.dequantized(layer.name, parse_scheme(text)) for text in choices[layer.name]]

        own = {cache.name for cache in self.info.caches}
        weights_in, _, reads = self.swappable(assignment)
        watched = {name: caches.slopes(self._reads(choices[name]), reads.get(name)) for name in choices if name in own}
        self.model.swap(weights_in, caches={**reads, **watched})
        try:
            loss = functools.partial(mean_loss, self.model, distance_of(self.info.task), reference, first, ids)
            layers = [self.info.layer(name) for name in choices if name not in own]
            value, found = slopes.gather(self.model, ids, loss, layers, weights)
        finally:
            self.model.restore()
        table = {**found, **{name: cache.sums for name, cache in watched.items()}}
        whole = np.isfinite([value, *itertools.chain.from_iterable(table.values())]).all()
        return measurements, {"loss": value, "table": dict(table)} if whole else {}

    def _worse(self, tally: _Tally, rival: Rival | None, looks: int) -> bool:
        """Whether `rival` is known to be better in all that it is compared in."""
        if rival is None or any(v.shape != tally.values[name].shape for name, v in rival.values.items()):
            return False  # a study that was resumed on another text has no tokens in common
        signs = {name: 1.0 if self.direction(name) == "minimize" else -1.0 for name in rival.values}
        return all(rival.beats(name, tally.values[name].numpy(), sign, looks) for name, sign in signs.items())

    def _continued(
        self, assignment: Assignment, window: Tensor, part: str, index: int, keep: bool = True
    ) -> tuple[Tensor, float]:
        """Outputs (tokens, v) under the assignment, which is swapped in, from where hidden states are known.

        And the share of a forward pass that this took. Only the search comes back to the same tokens.
        """
        if part == "report":
            return self.model.outputs(window.unsqueeze(0).to(self.model.device))[0], 1.0
        ids = window.unsqueeze(0).to(self.model.device)
        output, share = self._states.outputs(ids, (part, index), self._texts(assignment), keep)
        return output[0], share

    @property
    def _states(self) -> PrefixStates:
        if self._kept_states is None:
            data = self.parts.search
            free = self.share_bytes if self.device == "cpu" else torch.cuda.mem_get_info()[0]
            sample = data[:1].to(self.model.device)
            self._kept_states = PrefixStates(self.model, sample, len(data), free // _STATES_SHARE)
        return self._kept_states

    @staticmethod
    def _texts(assignment: Assignment) -> dict[str, str]:
        layers = {name: assignment.text(name) for name, scheme in assignment.items() if not isinstance(scheme, Keep)}
        return layers | {name: str(scheme) for name, scheme in assignment.caches.items()}

    def probe(self, perturbed: Sequence[tuple[str, str]], tokens: int) -> list[Probe]:
        """The loss of each (layer, scheme) alone, on at most `tokens` tokens of the calibration part.

        The blocks before the layer's are not run again: their output is the unquantized model's.
        """
        data = self.parts.calibration
        data = data[: max(1, tokens // self.model.length(data))]
        reference = self._reference_for("calibration", data)
        objective = distance_of(self.info.task)
        values = torch.full((len(perturbed), *self._shape(data)), torch.nan, dtype=torch.float64)
        passes = [0.0] * len(perturbed)
        alone = [Assignment.from_dict({name: text}) for name, text in perturbed]
        with torch.inference_mode():
            for index, window in enumerate(data):
                if perturbed and not self._states.has(("calibration", index), {}):
                    passes[0] += self._continued(Assignment({}), window, "calibration", index)[1] / len(data)
                for i, assignment in enumerate(alone):
                    with self.swapped(assignment):
                        output, share = self._continued(assignment, window, "calibration", index, keep=False)
                    for rows, chunk in chunks(self.model, window, output, reference, index):
                        values[i, index, rows] = objective.per_token(chunk).double().cpu()
                    passes[i] += share / len(data)
        found = [mean_and_stderr(each.numpy()) for each in values]
        return [Probe(*each, forward_passes=spent) for each, spent in zip(found, passes, strict=True)]

    def compare(
        self, assignment: Assignment, outputs: Callable[[Tensor], Tensor], tokens: int | None = None
    ) -> Comparison:
        """Hold a runtime's `outputs`, window (tokens,) -> (tokens, v), against `assignment` in this process.

        Both see the same windows of the report part, `tokens` of them in all (default: every one).
        Raises `NotFinite` where either gives NaN or infinity.
        """
        data = self.parts.report
        if tokens is not None:
            data = data[: max(1, -(-tokens // self.model.length(data)))]
        with torch.inference_mode():
            reference = make_reference(self.model, data, self.share_bytes)
        here, there = (_Tally(self._objectives, self._shape(data)) for _ in range(2))
        moves = distance_of(self.info.task)
        apart, moved = 0.0, 0.0
        with self.swapped(assignment), torch.inference_mode():
            for index, window in enumerate(data):
                expected = self.model.outputs(window.unsqueeze(0).to(self.model.device))[0]
                found = outputs(window).to(expected.device)
                self._judge(here, window, expected, reference, index)
                self._judge(there, window, found, reference, index)
                apart += distance(expected, found, self.info.task)
                for _, chunk in chunks(self.model, window, expected, reference, index):
                    moved += float(moves.per_token(chunk).double().sum()) / len(expected)
        return Comparison(
            self._measurements(here, "report"),
            self._measurements(there, "report"),
            max(apart / len(data), 0.0),
            max(moved / len(data), 0.0),
            {name: self._paired(name, here, there) for name in here.values},
            self.model.tokens(data),
        )

    def _paired(self, name: str, here: _Tally, there: _Tally) -> float:
        mean, _, _ = mean_and_stderr(here.values[name].numpy())
        _, stderr, _ = mean_and_stderr((there.values[name] - here.values[name]).numpy())
        return self._objectives[name].transform(mean, stderr or 0.0)[1]

    def direction(self, objective: str) -> str:
        """Whether an objective of this study is to `minimize` or to `maximize`."""
        return self._objectives[objective].direction

    def _judge(self, tally: _Tally, window: Tensor, output: Tensor, reference: Reference, index: int) -> None:
        for rows, chunk in chunks(self.model, window, output, reference, index):
            for name, objective in tally.objectives.items():
                tally.values[name][index, rows] = objective.per_token(chunk).double().cpu()

    def _measurements(self, tally: _Tally, part: Part) -> list[Measurement]:
        return [self._measurement(name, values.numpy(), part, {}) for name, values in tally.values.items()]

    def sensitivities(self, choices: Mapping[str, Sequence[str]]) -> dict[str, dict[str, float]]:
        """Layer or KV cache -> scheme -> predicted KL in nats per token, by the curvature proxy.

        Quantizes each layer under each of its choices, which also fills the bank.
        """
        path = Path(self.calibrate())
        found: dict[str, dict[str, float]] = {}
        own = {cache.name for cache in self.info.caches}
        for name, texts in choices.items():
            if name in own:
                found[name] = self._cache_losses(tuple(texts))[name]
                continue
            statistics = curvature.load(path, name)
            weight = self.model.weight(name).cpu()
            found[name] = {}
            for text in texts:
                scheme = parse_scheme(text)
                if isinstance(scheme, Keep):
                    found[name][text] = 0.0
                    continue
                dequantized = self.quantized(name, scheme).dequantize()
                cost = curvature.proxy(statistics, weight, dequantized, self._input_noise(name, scheme, statistics))
                if not np.isfinite(cost):
                    raise NotFinite(f"layer {name} as {text}: its predicted loss is {cost}; exclude it from the space")
                found[name][text] = cost
        return found

    def _cache_losses(self, texts: tuple[str, ...]) -> dict[str, dict[str, float]]:
        """KV cache -> each of `texts` -> predicted KL in nats per token, of all caches from one pass."""
        if texts not in self._found_losses:
            data = self.parts.calibration
            data = data[: max(1, CURVATURE_TOKENS // self.model.length(data))]
            every = {cache.name: self._reads(texts) for cache in self.info.caches}
            found = caches.losses(self.model, data, self.spec.data.seed, every)
            if bad := next((name for name, losses in found.items() if not np.isfinite(losses).all()), None):
                raise NotFinite(f"KV cache {bad}: its predicted losses are {found[bad]}; exclude it from the space")
            self._found_losses[texts] = {name: dict(zip(texts, own, strict=True)) for name, own in found.items()}
        return self._found_losses[texts]

    @staticmethod
    def _reads(texts: Sequence[str]) -> list[Read | None]:
        schemes = map(parse_choice, texts)
        return [read(scheme.bits) if isinstance(scheme, KeyValue) else None for scheme in schemes]

    def _input_noise(self, name: str, scheme: Scheme, statistics: curvature.Statistics) -> float:
        """What `curvature.proxy` takes for what the scheme does to the layer's input."""
        if not isinstance(scheme, Integer | Float) or scheme.activation is None:
            return 0.0
        if scheme.activation == "a8dyn":
            return curvature.dynamic_noise(statistics, scheme, self.target.rounds_per_token)
        rounded = self.activation(name, scheme)
        assert rounded is not None, scheme
        return curvature.static_noise(statistics, rounded)

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
                # Kernels are timed by what ships: scales that are folded are no part of it.
                weights[name] = [without_scales(self.quantized(name, parse_scheme(text))) for text in texts]
            else:
                weights[name] = weights[first]
        return self.target.cost_table(self.model, weights, self.spec.target)

    def time(self, assignment: Assignment) -> list[Measurement]:
        """Latency of the assembled model, end to end on the target."""
        wanted = set(self.spec.measured)
        with folded(self.model, self.layers(assignment)) as weights:
            return [m for m in self.target.time(self.model, weights, self.spec.target) if m.objective in wanted]

    def meter(self, assignment: Assignment) -> list[Measurement]:
        """Energy of the assembled model by this machine's meters; empty where there are none."""
        assert self.target.runs_on is not None
        with opened(self.target.runs_on) as meters:
            if not meters:
                return []
            with folded(self.model, self.layers(assignment)) as weights:
                return self.target.meter(self.model, weights, self.spec.target, meters)

    def export(self, weights: Mapping[str, QuantizedWeight], folder: Path) -> Exported:
        """Write the checkpoint of `weights` for the target, all scales that must be folded in their places."""
        with folded(self.model, weights) as shipped:
            return self.target.export(self.model, shipped, folder, self.statistics)

    def recover(
        self,
        assignment: Assignment,
        steps: int,
        tokens: int | None,
        windows: int,
        rate: float,
        seed: int,
        how: str,
        tell: Callable[[int, int, float, float], None],
        note: Callable[[str], None],
        checkpoints: str,
    ) -> tuple[dict[str, tuple[str, bytes]], dict[str, Any]]:
        """Train what can be trained of `assignment`: layer -> digest and content, and the facts of the training.

        All layers together (`how` is "model") or block by block ("blocks"). `tell` hears of every step, `note` of what
        is worth knowing. Raises `AutoQError` where nothing was gained.
        """
        from autoq.recovery import blocks, trainer

        which = blocks if how == "blocks" else trainer
        plan = which.plan(steps, windows, rate, seed)
        found = which.recover(self, assignment, plan, tokens, Path(checkpoints), tell, note)
        return {name: (digest(layer), pack(layer)) for name, layer in found.layers.items()}, dict(found.facts)

    def sequence(
        self, assignment: Assignment, tell: Callable[[int, int], None]
    ) -> tuple[dict[str, tuple[str, bytes]], dict[str, Any]]:
        """Quantize the layers of `assignment` anew by what they read in the quantized model, block after block: layer
        -> digest and content, and facts. `tell` hears how many blocks are done, of how many."""
        from autoq.sequential import sequenced

        found = sequenced(self, assignment, tell)
        return {name: (digest(layer), pack(layer)) for name, layer in found.layers.items()}, dict(found.facts)

    # -- the reference ----------------------------------------------------------------------------

    def _shape(self, data: Tensor) -> tuple[int, int]:
        """How many windows there are, and how many outputs each has."""
        return len(data), self.model.positions(self.model.length(data))

    def _part(self, part: Part) -> Tensor:
        return self.parts.search if part == "search" else self.parts.report

    def _reference_for(self, part: str, data: Tensor) -> Reference:
        """The reference of a part's first windows `data`; only one is in memory at a time."""
        if self._reference is None or self._reference[:2] != (part, len(data)):
            self._reference = None
            with torch.inference_mode():
                self._reference = (part, len(data), make_reference(self.model, data, self.share_bytes))
        return self._reference[2]

    def _measurement(
        self, name: str, values: NDArray[np.float64], part: Part, detail: Mapping[str, Any], rival: Rival | None = None
    ) -> Measurement:
        """The measurement of values (windows, tokens), with an estimate if `rival` ended it early."""
        objective = self._objectives[name]
        mean, stderr, n = mean_and_stderr(values)
        value, error = objective.transform(mean, stderr if stderr is not None else 0.0)
        if rival is not None:
            expected = rival.expected(name, values) if name in rival.values else mean
            detail = {**detail, "estimate": objective.transform(expected, 0.0)[0]}
        if not np.isfinite([value, detail.get("estimate", value)]).all():
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
            detail={"threads": torch.get_num_threads(), "dtype": self.spec.model.dtype, **detail},
            per_token=values.astype(np.float32),
        )
