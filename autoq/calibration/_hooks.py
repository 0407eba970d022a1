"""Hooks that add up what the curvature proxy is made of while a model runs forward and backward.

Layers that read one tensor (q, k and v; gate and up) share all that is made of it: ranges, second moments, histograms
and projections are formed once for each input, not for each layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from autoq.calibration._gradients import Signs, add_rows, factors, plus, product, squares
from autoq.calibration.histogram import Histogram, sums_by_row
from autoq.errors import NotFinite
from autoq.layer import MOST_HESSIAN_INPUTS
from autoq.models.loaded import LoadedModel

_PANEL = 512  # rows of a second moment that are made at once, at least


@dataclass(eq=False)
class Moments:
    """Running second moments of the inputs that some layers read together, all of them always."""

    upper: Tensor  # (in, in) sum over positions of x xᵀ; with a lower part that nobody has made


@dataclass(eq=False)
class Sums:
    """Running sums of one module over passes; G (out, in) is the gradient of a pass with respect to the weight."""

    output_square: Tensor | None = None  # (out,) diagonal of G Gᵀ; of an embedding (columns,) that of Gᵀ G
    inputs: list[Tensor] = field(default_factory=list)  # rows (k, in) whose sum of squares is Gᵀ G
    input_square: Tensor | None = None  # (in, in) the same of further rows
    row_square: Tensor | None = None  # (rows,) diagonal of an embedding's G Gᵀ
    grad_square: Tensor | None = None  # (out,) squared gradients of the output, summed over positions
    step_square: Tensor | None = None  # () squared 8-bit step of the input, times the sum of a pass's squared gradients
    token_step_square: Tensor | None = None  # () the same with the step of each position's own largest magnitude
    plain_square: Tensor | None = None  # (in,) sum over positions of the squared input, where no moments tell
    positions: int = 0  # inputs seen
    low: Tensor | None = None  # (in,) the least input, at most 0
    high: Tensor | None = None
    moments: list[Moments] = field(default_factory=list)
    read: tuple[Tensor, ...] = ()  # or the inputs themselves, (positions, in) of each pass
    counts: Histogram = field(default_factory=Histogram)  # of the inputs
    saliency: Histogram = field(default_factory=Histogram)  # the same, each weighted by its position's Σ g²


@dataclass(eq=False)
class _Read:
    """An input as it was read, and by whom."""

    input: Tensor
    rows: Tensor  # (positions, in), detached
    values: Tensor  # the same in float32
    low: Tensor  # (in,)
    high: Tensor
    peaks: Tensor  # (positions,) largest magnitudes
    largest: float
    step_square: float
    readers: list[Sums] = field(default_factory=list)
    weights: list[tuple[Sums, Tensor]] = field(default_factory=list)  # (positions,) squared gradients by reader
    mixed: Tensor | None = None  # (positions, k) its random projections


class LookUps:
    """Remembers the rows that an embedding looked up last: one of positions makes them of what it is given.

    Functions are watched while a watched embedding runs, and no longer: that costs a few microseconds for each.
    """

    ids: Tensor

    def watch(self, module: nn.Module) -> Iterator[RemovableHandle]:
        """Hooks on an embedding, to be removed. Whoever wants to read `ids` after its forward pass hooks on later."""
        mode = _Watch(self)

        def begin(*_: Any) -> None:
            mode.__enter__()  # type: ignore[no-untyped-call]

        def end(*_: Any) -> None:
            mode.__exit__(None, None, None)  # type: ignore[no-untyped-call]

        yield module.register_forward_pre_hook(begin)
        yield module.register_forward_hook(end, always_call=True)


class _Watch(TorchFunctionMode):
    def __init__(self, found: LookUps) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.embedding:
            self._found.ids = args[0]
        return func(*args, **(kwargs or {}))


def linear_output(outputs: Any) -> Tensor:
    """The product with the weight among a module's outputs: a router gives what it makes of it as well."""
    found: Tensor = outputs[0] if isinstance(outputs, tuple) else outputs
    return found


class Gatherer:
    """The sums of every layer's modules, over passes of `tokens` tokens in all."""

    def __init__(self, model: LoadedModel, tokens: int) -> None:
        self.model = model
        self.tokens = tokens
        self.by_module: dict[nn.Module, Sums] = {}
        self._signs = Signs()
        self._moments: dict[tuple[int, ...], Moments] = {}
        self._look_ups = LookUps()
        self._backward = True
        self._last: _Read | None = None
        self._unbinned: list[_Read] = []

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on every layer while passes run."""
        handles: list[RemovableHandle] = []
        for layer in self.model.info.layers:
            for module in self.model.modules_of(layer):
                self.by_module.setdefault(module, Sums())
                if isinstance(module, nn.Embedding):
                    handles += self._look_ups.watch(module)
                handles.append(module.register_forward_hook(self._on_forward(module, layer.name)))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._last = None
            self._unbinned.clear()

    @contextlib.contextmanager
    def passing(self, backward: bool) -> Iterator[None]:
        """One pass: forward and, where `backward`, then backward."""
        self._backward = backward
        self._signs.draw()
        with torch.enable_grad() if backward else torch.no_grad():
            yield
        self._settle()
        for read in self._unbinned:  # whose readers the loss does not all depend on
            _bin(read)
        self._unbinned.clear()

    @contextlib.contextmanager
    def reading(self, names: Iterable[str]) -> Iterator[None]:
        """Add up what the layers `names` read, before their kernels round it; no gradients are waited for."""
        handles = []
        for name in names:
            for module in self.model.modules_of(self.model.info.layer(name)):
                self.by_module.setdefault(module, Sums())
                handles.append(module.register_forward_pre_hook(self._on_read(module, name), prepend=True))
        self._backward = False
        try:
            yield
            self._settle()
        finally:
            for handle in handles:
                handle.remove()
            self._last = None
            self._unbinned.clear()

    def _on_read(self, module: nn.Module, name: str) -> Callable[..., Any]:
        def hook(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            try:
                self._inputs_seen(self.by_module[module], inputs[0])
            except NotFinite as problem:
                raise NotFinite(f"layer {name}: {problem}") from problem

        return hook

    def _on_forward(self, module: nn.Module, name: str) -> Callable[..., Any]:
        own = self.by_module[module]

        def hook(_: nn.Module, inputs: tuple[Any, ...], outputs: Any) -> None:
            output = linear_output(outputs)
            if self._backward and not output.requires_grad:
                output.requires_grad_()
            if isinstance(module, nn.Embedding):
                on_gradient = self._rows_seen(own, self._look_ups.ids, module.num_embeddings)
            else:
                try:
                    on_gradient = self._inputs_seen(own, inputs[0])
                except NotFinite as problem:
                    raise NotFinite(f"layer {name}: {problem}") from problem
            if self._backward:
                output.register_hook(lambda grad: on_gradient(grad.detach().reshape(-1, grad.shape[-1])))  # type: ignore[no-untyped-call]

        return hook

    def _rows_seen(self, own: Sums, ids: Tensor, rows: int) -> Callable[[Tensor], None]:
        """What to do with the output's gradient (positions, out) once it is known; so for `_inputs_seen`."""

        def on_gradient(grad: Tensor) -> None:
            # Not on a GPU, where the order of the additions is another one each time.
            read, place = torch.unique(ids.reshape(-1).cpu(), return_inverse=True)
            whole = torch.zeros(len(read), grad.shape[1]).index_add_(0, place, grad.float().cpu())
            square = whole.square()
            own.output_square = plus(own.output_square, square.sum(0))
            if own.row_square is None:
                own.row_square = torch.zeros(rows)
            own.row_square[read] += square.sum(1)

        return on_gradient

    def _inputs_seen(self, own: Sums, x: Tensor) -> Callable[[Tensor], None]:
        if self._last is None or self._last.input is not x or own in self._last.readers:
            self._settle()
            self._last = _read(x)
            self._unbinned.append(self._last)
        last = self._last
        last.readers.append(own)
        own.low = last.low if own.low is None else torch.minimum(own.low, last.low)
        own.high = last.high if own.high is None else torch.maximum(own.high, last.high)
        own.positions += len(last.rows)

        def on_gradient(grad: Tensor) -> None:
            by_position, by_output = squares(grad)
            own.token_step_square = plus(own.token_step_square, (last.peaks / 127).square() @ by_position)
            own.step_square = plus(own.step_square, last.step_square * by_output.sum())
            own.grad_square = plus(own.grad_square, by_output)
            last.weights.append((own, by_position))
            if len(last.weights) == len(last.readers):
                _bin(last)
                self._unbinned.remove(last)
            output_square, rows, last.mixed = factors(grad, last.rows, self._signs, last.mixed)
            own.output_square = plus(own.output_square, output_square)
            own.input_square = add_rows(own.inputs, own.input_square, rows)

        return on_gradient

    def _settle(self) -> None:
        """Add what was read last to its readers' second moments: now it is known who all of them are."""
        if self._last is None:
            return
        last, self._last = self._last, None
        inputs = last.rows.shape[1]
        if inputs <= MOST_HESSIAN_INPUTS and self.tokens >= inputs:
            key = tuple(sorted(map(id, last.readers)))
            if key not in self._moments:
                self._moments[key] = Moments(last.values.new_zeros(inputs, inputs))
                for own in last.readers:
                    own.moments.append(self._moments[key])
            _add_upper(self._moments[key].upper, last)
        else:
            square = last.values.square().sum(0)
            # Fewer numbers than the matrix has.
            kept = () if inputs > MOST_HESSIAN_INPUTS else (last.rows.clone(),)
            for own in last.readers:
                own.plain_square = square if own.plain_square is None else own.plain_square + square
                own.read += kept
        last.values = last.rows
        if not self._backward:
            _bin(last)
            self._unbinned.remove(last)


def _read(x: Tensor) -> _Read:
    """An input and its ranges. Raises `NotFinite`."""
    rows = x.detach().reshape(-1, x.shape[-1])
    values = rows.float()
    if not len(values):
        nothing = values.new_zeros(values.shape[1])
        return _Read(x, rows, values, nothing, nothing, values.new_zeros(0), 0.0, 0.0)
    low, high = values.amin(0).clamp_(max=0), values.amax(0).clamp_(min=0)
    least, most = float(low.min()), float(high.max())
    if not most - least < torch.inf:
        raise NotFinite("its inputs are NaN or infinite on the calibration data")
    if rows.dtype is torch.bfloat16:  # by their bits without the sign, which take one walk less
        peaks = (rows.view(torch.int16) & 0x7FFF).amax(1).view(torch.bfloat16).float()
    else:
        peaks = rows.abs().amax(1).float()
    return _Read(x, rows, values, low, high, peaks, max(-least, most), ((most - least) / 255) ** 2)


def _panels(inputs: int) -> Iterator[tuple[int, int]]:
    width = -(-inputs // max(1, inputs // _PANEL))
    for start in range(0, inputs, width):
        yield start, min(start + width, inputs)


def _add_upper(total: Tensor, read: _Read) -> None:
    """Add the sum over positions of x xᵀ, panel by panel of its rows, from each panel's first column on."""
    for start, end in _panels(len(total)):
        product(read.values[:, start:end], read.values[:, start:], read.rows.dtype, total[start:end, start:])


def mean_moments(own: Sums) -> Tensor:
    """E[x xᵀ] (in, in) of all inputs that a module read, exactly symmetric."""
    first, *others = (each.upper for each in own.moments)
    result = first / own.positions
    for other in others:
        result += other / own.positions
    for start, end in _panels(len(result)):
        # Of a product that is not computed as one of its own transpose, halves may round differently.
        corner = result[start:end, start:end]
        corner.copy_((corner + corner.t()) / 2)
        result[end:, start:end] = result[start:end, end:].t()
    return result


def _bin(read: _Read) -> None:
    """Add an input to its readers' histograms."""
    weights = [torch.ones(len(read.rows)), *(weights.cpu() for _, weights in read.weights)]
    (counts, *saliencies), exponent = sums_by_row(read.rows, torch.stack(weights, 1), read.largest)
    counts = counts.long()
    for own in read.readers:
        own.counts.add_sums(counts, exponent)
    for (own, _), saliency in zip(read.weights, saliencies, strict=True):
        own.saliency.add_sums(saliency, exponent)
    read.weights.clear()
