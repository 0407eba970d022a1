"""The yardstick of `search.py`: one model, its quantized layers in memory, and a meter of what a search costs.

Cost is counted in forward passes over one window of tokens; a backward pass counts two. What is computed
once and used by several arms (predicted losses, the unquantized model's answers) is charged to each of them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autoq import plugins
from autoq.assignment import Assignment
from autoq.calibration import curvature, slopes
from autoq.chunks import mean_loss
from autoq.evaluation import Evaluator
from autoq.layer import Layer
from autoq.objectives import Objective, TokenChunk
from autoq.reference import Reference, make_reference, row_blocks
from autoq.scheme import Keep
from autoq.search.budget import frontier
from autoq.search.prior import Additive, Prior
from autoq.search.setup import pose
from autoq.spec import StudySpec

Choices = tuple[int, ...]
Table = list[NDArray[np.float64]]  # one entry per choice of every variable

REFERENCE_BYTES = 2 * 10**9


class Yardstick:
    """A study's space with everything in memory that measuring its assignments takes."""

    def __init__(self, spec: StudySpec) -> None:
        self.problem = pose(spec)
        self.space = self.problem.space
        self.evaluator = Evaluator(spec)
        self.model = self.evaluator.model
        self.variables = self.space.variables
        self.parameters = [(v.name, len(v.choices)) for v in self.variables]
        self.bytes: Table = self._table(lambda name, s: self.space.layers[name].nbytes(s))
        layers = [layer for v in self.variables for layer in v.members]
        self.weights = sum(layer.out_features * layer.in_features for layer in layers)
        self._dense: dict[tuple[str, str], Tensor] = {}
        for layer, schemes in self.space.choices.items():
            for scheme in schemes:
                if not isinstance(scheme, Keep):
                    weight = self.evaluator.quantized(layer, scheme).dequantize()
                    self._dense[layer, str(scheme)] = weight.to(self.model.device, self.model.weight(layer).dtype)
        self._kl: Any = plugins.load("objectives", "kl_nats_per_token", Objective)
        self._references: dict[tuple[str, int], Reference] = {}

    def total(self, choices: Sequence[int]) -> float:
        """Bytes of the searched layers."""
        return sum(float(part[i]) for part, i in zip(self.bytes, choices, strict=True))

    def levels(self) -> list[Choices]:
        """The same choice everywhere, for each choice that a variable has; a variable with fewer at its last."""
        counts = [n for _, n in self.parameters]
        return [tuple(min(level, n - 1) for n in counts) for level in range(max(counts))]

    def budget(self, bits: float) -> float:
        """Bytes of the searched layers at so many bits per weight, scales and zero points included."""
        return bits * self.weights / 8

    def prior(self, losses: Table | None, limit: float | None = None) -> Prior:
        """For the objectives (KL, size); with a `limit` of the size in bytes, for KL alone."""
        names = [name for name, _ in self.parameters]
        size = Additive(0.0, dict(zip(names, self.bytes, strict=True)), high=math.inf if limit is None else limit)
        predicted = {} if losses is None else dict(zip(names, losses, strict=True))
        return Prior(predicted, {1: size}) if limit is None else Prior(predicted, limits=[size])

    def solve(self, losses: Table, budgets: Sequence[float]) -> list[Choices]:
        """The assignments of least predicted loss within budgets in bytes; the smallest where none fits."""
        lightest = sum(float(part.min()) for part in self.bytes)
        found = frontier(losses, self.bytes, [max(budget, lightest) for budget in budgets])
        return [tuple(solution.choices) for solution in found if solution is not None]

    def kl(self, choices: Sequence[int], part: str, windows: Sequence[int]) -> float:
        """Mean KL in nats per token on some windows of a part; infinite where the outputs are not finite."""
        assignment = self.space.assignment(choices)
        references = [self._reference(part, index) for index in windows]
        data = getattr(self.evaluator.parts, part)
        with self._swapped(assignment), torch.inference_mode():
            found = [self._window(data[i], reference) for i, reference in zip(windows, references, strict=True)]
        mean = math.fsum(found) / len(found)
        return mean if math.isfinite(mean) else math.inf

    def held_out(self, choices: Sequence[int]) -> float:
        """KL on all of the report part, which no search sees."""
        return self.kl(choices, "report", range(len(self.evaluator.parts.report)))

    def slopes(self, choices: Sequence[int], windows: Sequence[int]) -> tuple[float, dict[str, list[float]]]:
        """KL on some windows of the search part, and variable -> slope of each of its choices there."""
        ids = self.evaluator.parts.search[list(windows)]
        references = [self._reference("search", index) for index in windows]

        def loss(outputs: Tensor) -> Tensor:
            each = zip(references, ids.split(1), outputs.split(1), strict=True)
            return sum(mean_loss(self.model, self._kl, reference, 0, *one) for reference, *one in each) / len(windows)  # type: ignore[return-value]

        def weights(layer: Layer) -> list[Tensor]:
            schemes = self.space.choices[layer.name]
            return [self._dense.get((layer.name, str(scheme)), self.model.weight(layer.name)) for scheme in schemes]

        layers = [layer for v in self.variables for layer in v.members]
        with self._swapped(self.space.assignment(choices)):
            value, table = slopes.gather(self.model, ids, loss, layers, weights)
        return value, {
            v.name: [math.fsum(own) for own in zip(*(table[layer.name] for layer in v.members), strict=True)]
            for v in self.variables
        }

    @functools.lru_cache(maxsize=8)  # noqa: B019 - one yardstick lives as long as the process
    def losses(self, windows: int, seed: int) -> Table:
        """Predicted losses by the curvature proxy, from so many calibration windows; the seed says which."""
        data = self.evaluator.parts.calibration.roll(-seed, 0)[:windows]
        statistics = curvature.gather(self.model, data, seed)

        def loss(layer: str, scheme: Any) -> float:
            if isinstance(scheme, Keep):
                return 0.0
            dequantized = self.evaluator.quantized(layer, scheme).dequantize()
            dynamic = getattr(scheme, "activation", None) is not None
            return curvature.proxy(statistics[layer], self.model.weight(layer).cpu(), dequantized, dynamic)

        return self._table(loss)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - one yardstick lives as long as the process
    def position_losses(self, windows: int, seed: int) -> Table:
        """Predicted losses as other tools have them: ½ E[Σ_i g_i² (ΔW x)_i²] over positions, for every choice."""
        data = self.evaluator.parts.calibration.roll(-seed, 0)[:windows]
        generator = torch.Generator().manual_seed(seed)
        sums = {name: [0.0] * len(schemes) for name, schemes in self.space.choices.items()}
        handles = []

        def watch(name: str, module: torch.nn.Module) -> None:
            def on_gradient(grad: Tensor, x: Tensor) -> None:
                for i, scheme in enumerate(self.space.choices[name]):
                    if (dense := self._dense.get((name, str(scheme)))) is not None:
                        moved = x @ (dense - self.model.weight(name)).t()
                        sums[name][i] += 0.5 * float((grad * moved).float().square().sum()) / data.numel()

            def on_forward(_: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
                if not output.requires_grad:
                    output.requires_grad_()
                output.register_hook(lambda grad: on_gradient(grad.detach(), inputs[0].detach()))

            handles.append(module.register_forward_hook(on_forward))

        for layer in self.model.info.layers:
            if layer.name in self.space.choices:
                for module in self.model.modules_of(layer):
                    watch(layer.name, module)
        try:
            with torch.enable_grad():
                for window in data:
                    output = self.model.outputs(window.unsqueeze(0).to(self.model.device)).float()[0]
                    labels = torch.multinomial(output.detach().softmax(-1).cpu(), 1, generator=generator).squeeze(-1)
                    torch.nn.functional.cross_entropy(output, labels.to(output.device), reduction="sum").backward()
        finally:
            for handle in handles:
                handle.remove()
        return [
            np.array([sum(own) for own in zip(*(sums[x.name] for x in v.members), strict=True)]) for v in self.variables
        ]

    def squared_errors(self) -> Table:
        """Squared error of the weights relative to their own squares: known without any data."""

        def error(layer: str, scheme: Any) -> float:
            weight = self.model.weight(layer).double()
            changed = self._dense.get((layer, str(scheme)), weight).double()
            return float((changed - weight).square().sum() / weight.square().sum())

        return self._table(error)

    def _table(self, of: Callable[[str, Any], float]) -> Table:
        sums = ([sum(of(layer.name, s) for layer in v.members) for s in v.choices] for v in self.variables)
        return [np.array(own, dtype=np.float64) for own in sums]

    def _swapped(self, assignment: Assignment) -> Any:
        activations, weights = {}, {}
        for layer, scheme in assignment.items():
            if not isinstance(scheme, Keep):
                weights[layer] = self._dense[layer, str(scheme)]
                if (function := self.evaluator.activation(layer, scheme)) is not None:
                    activations[layer] = function
        return _Swap(self.model, weights, activations)

    def _reference(self, part: str, index: int) -> Reference:
        if (part, index) not in self._references:
            data = getattr(self.evaluator.parts, part)[index : index + 1]
            with torch.inference_mode():
                self._references[part, index] = make_reference(self.model, data, REFERENCE_BYTES)
        return self._references[part, index]

    def _window(self, window: Tensor, reference: Reference) -> float:
        output = self.model.outputs(window.unsqueeze(0).to(self.model.device))[0]
        next_tokens = self.model.next_tokens(window).to(output.device)
        total = 0.0
        for rows in row_blocks(output):
            values = output[rows].float()
            kept, mass, entropy = reference.rows(0, rows)
            chunk = TokenChunk(values, next_tokens[rows], kept, values.logsumexp(-1), mass, entropy)
            total += float(self._kl.per_token(chunk).double().sum())
        return total / len(output)


class _Swap:
    def __init__(self, model: Any, weights: Mapping[str, Tensor], activations: Mapping[str, Any]) -> None:
        self._model, self._weights, self._activations = model, weights, activations

    def __enter__(self) -> None:
        self._model.swap(self._weights, self._activations)

    def __exit__(self, *_: object) -> None:
        self._model.restore()


class Meter:
    """What one arm may ask of the yardstick, and what it has cost: `cost` in forward passes over a window.

    The seed also says which windows a search sees, so that its spread is that of data too.
    """

    def __init__(self, yardstick: Yardstick, seed: int) -> None:
        self.yardstick, self.seed, self.cost = yardstick, seed, 0.0

    def _windows(self, count: int, skipped: int = 0) -> list[int]:
        there = len(self.yardstick.evaluator.parts.search)
        assert count <= there, f"{count} windows are asked for and the search part has {there}"
        return [(self.seed + skipped + i) % there for i in range(count)]

    def kl(self, choices: Sequence[int], windows: int) -> float:
        """KL on the search's first so many windows."""
        self.cost += windows
        return self.yardstick.kl(choices, "search", self._windows(windows))

    def slopes(self, choices: Sequence[int], windows: int, skipped: int = 0) -> tuple[float, dict[str, list[float]]]:
        """KL and slopes on the windows after the first `skipped`: a forward and a backward pass."""
        self.cost += 3 * windows
        return self.yardstick.slopes(choices, self._windows(windows, skipped))

    def losses(self, tokens: int, own: bool) -> Table:
        """Predicted losses from so many calibration tokens, by AutoQ's `own` proxy or the usual one: both take a
        forward and a backward pass."""
        there, window = self.yardstick.evaluator.parts.calibration.shape
        windows = min(max(1, tokens // window), there)
        self.cost += 3 * windows
        find = self.yardstick.losses if own else self.yardstick.position_losses
        return find(windows, self.seed)
