"""Quantization in sequence: layer after layer, each by what it reads in the model as it is quantized so far.

A search quantizes every layer alone, by statistics of the unquantized model: then what comes of a layer does not depend
on the others, is made once and added up. But in the quantized model a layer reads what quantized layers before it make.
GPTQ's own code (Frantar et al. 2023, section 4) and all that follow it take the inputs from there: blocks in order, and
within a block in the order of use (q, k, v; o; gate, up; down), what comes later makes up for errors that were made
before, as far as its inputs show them. That is done here, once, to the assignment that was chosen:

    for each block, for each stage of layers that read one input, in order of use:
        run the block on its inputs over the calibration text, the layers before quantized, up to this stage
        E[x̂ x̂ᵀ], E[x̂²], max|x̂|, W*  →  the layers' own methods  →  in their place
    run the block once more: what it gives is what the next one reads

That W x̂ is met is not what is wanted, but that W x is, with x what the layer reads in the unquantized model. As Arai &
Ichikawa ("Quantization Error Propagation: Revisiting Layer-Wise Post-Training Quantization", 2025, equation 9) and Li
et al. ("GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", 2025, equation 4) have it, a layer's
method is given the weight that does so best, part of the way:

    W* = W + α W D        D = E[(x - x̂) x̂ᵀ] (E[x̂ x̂ᵀ] + λ I)⁻¹        λ  DAMPING times the mean of E[x̂²]

Where we differ: both papers have one α for the model (0.5, and 1). A few thousand tokens tell D with errors of its own,
which are as large as all of it where inputs are many and changed little. So each half of the tokens says how far to go
along the step that the other half tells, by least squares of W (x - x̂), for each layer.

GPTAQ adds the term column by column; of one layer it is the same least squares, and so any method can have it, also
one that asks for no statistics. Where experts read what routers give them, or a layer runs twice, x and x̂ are not of
the same tokens; scales that are folded are found for several layers together; and of very many inputs second moments
are not kept (`autoq.layer`): there W is taken.

Schemes and bytes stay what they are. All quantized layers that read something are made anew. Not so those that were
trained, and a head that is tied to an embedding, which is read first and last; and calibrated ranges of 8-bit inputs
belong to the scheme's kernel and not to the weight. An expert that no token of the text came to stays, too.

Memory: one stage's statistics and inputs, one block's dequantized weights, and hidden states of the calibration text at
one block, of both models.
Where a model is no chain of blocks (`autoq.models.prefix`), each stage runs it from its start, with all that is
quantized so far. The text is that of the statistics that a search uses, so what reads nothing quantized comes out as it
was. Deterministic.
"""

from __future__ import annotations

import collections
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autoq import plugins
from autoq.assignment import Assignment
from autoq.bank import digest
from autoq.calibration import curvature
from autoq.calibration._gradients import product
from autoq.errors import BadInput
from autoq.folding import is_folded
from autoq.layer import MOST_HESSIAN_INPUTS
from autoq.methods import Method, QuantizedWeight, Statistics
from autoq.models.prefix import Chain, cut, run
from autoq.quantized_model import CURVATURE_TOKENS, QuantizedModel, naming
from autoq.scheme import Keep

DAMPING = 0.1
_TRIED_TOKENS = 16
Tell = Callable[[int, int], None]  # so many blocks are done, of so many


class _Enough(Exception):
    """A pass over the model has shown what it was for."""


@dataclass(frozen=True)
class _Stage:
    """Layers that read one input; `whole` where a pass must go on to the block's end to have shown all of it."""

    names: list[str] = field(default_factory=list)
    whole: bool = False


@dataclass(frozen=True)
class _Part:
    """A block, or several: its number, all layers in it, and the stages of those that are made anew."""

    start: int
    layers: list[str]
    stages: list[_Stage]


@dataclass(frozen=True)
class Sequenced:
    """What came of it: the layers that are others than before, and what is worth remembering."""

    layers: Mapping[str, QuantizedWeight]
    facts: Mapping[str, Any]


def sequenced(model: QuantizedModel, assignment: Assignment, tell: Tell = lambda *_: None) -> Sequenced:
    """The layers of `assignment`, quantized in sequence.

    Raises `BadInput` where no layer can be, or none reads anything quantized.
    """
    began = time.monotonic()
    names = [
        layer.name
        for layer in model.info.layers
        if layer.kind != "embedding"
        and not layer.tied
        and layer.name not in assignment.trained
        and not isinstance(assignment.get(layer.name, Keep()), Keep)
    ]
    if not names:
        raise BadInput("no layer of the assignment is quantized, embeddings, trained ones and a tied head aside")
    with torch.inference_mode():
        sequence = _Sequence(model, assignment, names)
        try:
            sequence.run(tell)
        finally:
            model.model.restore()
    before = (
        name for name in sequence.made if digest(model.quantized(name, assignment[name])) != digest(sequence.made[name])
    )
    layers = {name: sequence.made[name] for name in before}
    if not layers:
        raise BadInput("all layers that are quantized read what they read in the unquantized model")
    facts = {
        "layers": len(layers),
        "tokens": model.model.tokens(sequence.data),
        "seconds": round(time.monotonic() - began, 1),
    }
    return Sequenced(layers, facts)


class _Sequence:
    """One pass over the model's blocks. `made` are the layers that are done."""

    def __init__(self, model: QuantizedModel, assignment: Assignment, names: Sequence[str]) -> None:
        self.quantized_model, self.model, self.assignment = model, model.model, assignment
        self.made: dict[str, QuantizedWeight] = {}
        self.weights: dict[str, Tensor] = {}
        self.activations: dict[str, Any] = {}
        self.caches: Mapping[str, Any] = {}  # what is read of KV caches that are quantized
        data = model.parts.calibration
        self.data = data[: max(1, CURVATURE_TOKENS // self.model.length(data))].to(self.model.device)
        found = cut(self.model, self.data[:1])
        self.chain: Chain | None = None if found is None else found[0]
        self.states: list[Tensor | None] = [None] * len(self.data)  # what the current part reads
        self.originals = self.states  # the same in the unquantized model
        self.parts = self._parts(self._stages(names))

    def run(self, tell: Tell) -> None:
        """Make all layers anew."""
        for done, part in enumerate(self.parts):
            tell(done, len(self.parts))
            again = {name for stage in part.stages for name in stage.names}
            self._take(part, [name for name in part.layers if name not in again])
            for stage in part.stages:
                self._make(part, stage)
            if done + 1 < len(self.parts):
                self.states = self._after(part, self.states)
                self.model.restore()
                self.originals = self._after(part, self.originals)
        tell(len(self.parts), len(self.parts))

    def _take(self, part: _Part, names: Sequence[str]) -> None:
        """Put a part's layers in the place of those before, as the assignment has them."""
        own = {name: self.assignment[name] for name in names if name in self.assignment}
        trained = {name: content for name, content in self.assignment.trained.items() if name in own}
        found = self.quantized_model.swappable(Assignment(own, trained, self.assignment.caches))
        self.weights, self.activations, self.caches = found
        self.model.swap(self.weights, self.activations, self.caches)

    def _make(self, part: _Part, stage: _Stage) -> None:
        """Quantize a stage's layers by what they read now, and put them in their place."""

        def passes() -> None:
            for index in range(len(self.data)):
                with self._until(part, stage):
                    self._pass(part, index, self.states)

        wanted, read = list[Tensor](), list[Tensor]()
        with ExitStack() as stack:
            if apart := self._apart(stage):
                self.model.restore()
                with self._kept(stage, wanted):
                    for index in range(len(self.data)):
                        with self._until(part, stage):
                            self._pass(part, index, self.originals)
                self.model.swap(self.weights, self.activations, self.caches)
                stack.enter_context(self._kept(stage, read))
            found = curvature.of_inputs(self.model, stage.names, self.model.tokens(self.data), passes)
        aim = _aim(wanted, read) if apart else None
        for name in stage.names:
            scheme, original = self.assignment[name], self.model.weight(name)
            if name in found:
                method = plugins.load("methods", scheme.method, Method)
                told: Statistics = found[name]
                if is_folded(scheme):  # what shares its scales reads the same
                    told = self.quantized_model.together(name, told)
                weight = original.cpu() if aim is None else aim.weight(original.cpu().float())
                with naming(name, scheme):
                    made = method.quantize(weight, scheme, told)
                self.made[name] = made
            else:
                made = self.quantized_model.quantized(name, scheme)
            self.weights[name] = made.dequantize(original.dtype).to(original.device)
            if (function := self.quantized_model.activation(name, scheme, made)) is not None:
                self.activations[name] = function
        self.model.swap(self.weights, self.activations, self.caches)

    def _apart(self, stage: _Stage) -> bool:
        """Whether the stage's layers can be given other weights, one by one, by what they read in both models."""
        few = self.model.info.layer(stage.names[0]).in_features <= MOST_HESSIAN_INPUTS
        return few and not stage.whole and not any(is_folded(self.assignment[name]) for name in stage.names)

    @contextmanager
    def _kept(self, stage: _Stage, into: list[Tensor]) -> Iterator[None]:
        """What the stage's layers read, (tokens, in) of each pass."""
        module = self.model.modules_of(self.model.info.layer(stage.names[0]))[0]
        handle = module.register_forward_pre_hook(
            lambda _, inputs: into.append(inputs[0].flatten(0, -2).cpu()), prepend=True
        )
        try:
            yield
        finally:
            handle.remove()

    def _pass(self, part: _Part, index: int, states: Sequence[Tensor | None]) -> None:
        """Run a window from the part's start on."""
        ids = self.data[index : index + 1]
        if self.chain is None:
            self.model.outputs(ids)
        else:
            run(self.model, self.chain, ids, part.start, states[index])

    def _after(self, part: _Part, states: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The hidden states (1, tokens, width) of each window that the block after the part reads."""
        assert self.chain is not None
        found: list[Tensor | None] = []

        def enough(_: Any, inputs: tuple[Any, ...]) -> None:
            found.append(inputs[0])
            raise _Enough

        for index in range(len(self.data)):
            with _hooked([self.chain.blocks[part.start + 1]], enough):
                self._pass(part, index, states)
        return found

    @contextmanager
    def _until(self, part: _Part, stage: _Stage) -> Iterator[None]:
        """A pass ends when all of the stage's layers were reached, or with the block where that is not known."""
        missing = set(stage.names)

        def reached(name: str) -> Callable[..., None]:
            def hook(*_: Any) -> None:
                missing.discard(name)
                if not missing and not stage.whole:
                    raise _Enough

            return hook

        with ExitStack() as stack:
            if not stage.whole:
                for name in stage.names:
                    stack.enter_context(_hooked(self.model.modules_of(self.model.info.layer(name)), reached(name)))
            elif self.chain is not None and part is not self.parts[-1]:
                stack.enter_context(_hooked([self.chain.blocks[part.start + 1]], _stop))
            yield

    def _stages(self, names: Sequence[str]) -> list[_Stage]:
        """The layers in the order in which they run; those that read the same tensor, or are a matrix of a block's
        experts, together. What a few tokens do not reach is left out, but for experts."""
        layers = {name: self.model.info.layer(name) for name in names}
        calls: list[tuple[str, Tensor]] = []  # inputs are kept: another one must not get an identity again

        def saw(name: str) -> Callable[..., None]:
            return lambda _, inputs: calls.append((name, inputs[0]))

        with ExitStack() as stack:
            for name, layer in layers.items():
                stack.enter_context(_hooked(self.model.modules_of(layer), saw(name), first=True))
            self.model.outputs(self.model.shortened(self.data[:1], _TRIED_TOKENS))
        count = collections.Counter(name for name, _ in calls)
        stages: dict[Any, _Stage] = {}
        for name, read in calls:
            stack_name = layers[name].stack
            if any(name in stage.names for stage in stages.values()):
                continue
            whole = stack_name is not None or count[name] > 1
            key = stack_name if stack_name is not None else (id(read), whole)
            stages.setdefault(key, _Stage(whole=whole)).names.append(name)
        for name, layer in layers.items():
            if layer.stack in stages and name not in stages[layer.stack].names:
                stages[layer.stack].names.append(name)
        return list(stages.values())

    def _parts(self, stages: Sequence[_Stage]) -> list[_Part]:
        """One part for each block; what comes before the first and after the last goes with these."""
        every = [layer.name for layer in self.model.info.layers]
        if self.chain is None:
            return [_Part(0, every, list(stages))]
        before, *blocks = (list(names) for names in self.chain.layers)
        blocks[0] = [*before, *blocks[0]]
        inside = {name for names in blocks for name in names}
        blocks[-1] += [name for name in every if name not in inside]
        return [
            _Part(k, own, [stage for stage in stages if stage.names[0] in set(own)]) for k, own in enumerate(blocks)
        ]


@dataclass(frozen=True)
class _Aim:
    """The step D (in, in) that all tokens tell; by halves of them, the step, and E[(x - x̂) x̂ᵀ] and E[x̂ x̂ᵀ] of the
    other half."""

    step: Tensor
    tried: list[tuple[Tensor, Tensor, Tensor]]

    def weight(self, weight: Tensor) -> Tensor:
        """W* of a layer's weight (out, in), float32."""
        gained = spent = 0.0
        for step, across, square in self.tried:
            moved = weight @ step
            gained += float(((weight @ across) * moved).sum())
            spent += float(((moved @ square) * moved).sum())
        share = gained / spent if spent > 0 else 0.0
        return weight + min(max(share, 0.0), 1.0) * (weight @ self.step)


def _aim(wanted: Sequence[Tensor], read: Sequence[Tensor]) -> _Aim | None:
    """From x `wanted` and x̂ `read`, (tokens, in) of each window; None where they are the same."""
    if all(map(torch.equal, wanted, read)):
        return None
    x, seen = torch.cat(list(wanted)), torch.cat(list(read))
    middle = len(x) // 2
    halves = [_moments(x[part], seen[part]) for part in (slice(middle), slice(middle, None))]
    whole = tuple(first + second for first, second in zip(*halves, strict=True))
    steps = [_step(*moments) for moments in (whole, *halves)]
    if (step := steps[0]) is None:
        return None
    other = zip(steps[1:], reversed(halves), strict=True)
    return _Aim(step, [(told, *moments) for told, moments in other if told is not None])


def _moments(x: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of (x - x̂) x̂ᵀ and of x̂ x̂ᵀ, (in, in) float32. Products of bfloat16 numbers are quick; of differences not."""
    square = product(seen.float(), seen.float(), seen.dtype)
    return product(x.float(), seen.float(), seen.dtype).sub_(square), square


def _step(across: Tensor, square: Tensor) -> Tensor | None:
    """D (in, in) by moments; None where nothing was read."""
    mean = square.diagonal().mean()
    damped = square.double()
    damped.diagonal().add_(DAMPING * mean)
    lower, failed = torch.linalg.cholesky_ex(damped)
    if failed or not mean > 0:
        return None
    return torch.cholesky_solve(across.double().t(), lower).t().float()


def _stop(*_: Any) -> None:
    raise _Enough


@contextmanager
def _hooked(modules: Sequence[Any], hook: Callable[..., Any], first: bool = False) -> Iterator[None]:
    """`hook` before each of the modules; a pass that it ends is over, and nothing is wrong with it."""
    handles = [module.register_forward_pre_hook(hook, prepend=first) for module in modules]
    try:
        yield
    except _Enough:
        pass
    finally:
        for handle in handles:
            handle.remove()
