"""Block by block: each block is trained to give back what the unquantized one does, before the next is looked at.

Li et al., "BRECQ: Pushing the Limit of Post-Training Quantization by Block Reconstruction" (2021), section 3.2: of a
network's blocks one after the other,

    min over the block's weights of  the cost of  f_k(x̂; Ŵ) - f_k(x; W)

    f_k  block k     x  its input in the unquantized model     x̂  its input after the quantized blocks before it
    W  weights     Ŵ  weights as they ship, by latent weights, scales and zero points
    cost  what the error loses of the model's answers, in nats per token, as far as gradients tell: `costs`

Where we differ. What is trained of a layer, and how gradients pass its rounding, is that of `autoq.recovery.latents`,
not the rectified sigmoid of AdaRound. BRECQ's cost is another one (see there); shares of a token's energy alone gained
nothing on SmolLM2. Rates are such that a latent weight may
just go half a step of its grid: 1/steps, falling, as AutoRound's (Cheng et al. 2024).

The first windows are not trained on: by them each block keeps the best moment of its training, its start included, and
the whole model's loss on them, before and after, decides whether something was gained.

Memory: what a block takes in and gives back, of both models and of all windows, and for its weights 12 bytes each; and
once, for the costs, the activations of one window. A training that is killed goes on from the blocks that were
finished, to the same end bit for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from autoq.assignment import Assignment
from autoq.cache import write_atomically
from autoq.errors import AutoQError, BadInput, NotFinite
from autoq.methods import QuantizedWeight
from autoq.methods._weights import expected_tensors, restore
from autoq.models.prefix import find_chain
from autoq.objectives import distance_of
from autoq.quantized_model import QuantizedModel
from autoq.recovery.costs import Cost, costs
from autoq.recovery.layers import LayersInTraining, trainable_names
from autoq.recovery.trainer import DECIDING, Note, Plan, Recovered, Tell, mean_over, passed_through, recovery_data
from autoq.reference import make_reference

LOOKS = 4  # how many times, evenly, a block's training is looked at
SCALE_SHARE = 0.4  # of the learning rate of weights
VERSION = 2  # of what checkpoints hold

# What a block found: its layers, and its error before, after and at which step.
_Found = tuple[dict[str, QuantizedWeight], tuple[float, float, int]]


def plan(steps: int, windows: int, rate: float, seed: int) -> Plan:
    """The plan for each block, at `rate` times the usual learning rates."""
    return Plan(steps, windows, rate / steps, SCALE_SHARE * rate / steps, seed)


class _Reached(Exception):
    """A pass has gone far enough: the first block was called."""


class BlockTrainer:
    """One training of the layers of `assignment` that can be trained, block after block.

    Raises `BadInput` where there is none, or where the model is no chain of blocks.
    """

    def __init__(self, model: QuantizedModel, assignment: Assignment, data: Tensor, plan: Plan) -> None:
        self.quantized_model, self.model, self.assignment, self.plan = model, model.model, assignment, plan
        names = set(trainable_names(assignment))
        deciding = max(1, min(DECIDING, len(data) // 8))
        # States of all windows are in memory, of four kinds: no more windows than are seen, and than fit.
        width = 4 * self.model.length(data) * 4 * getattr(self.model.model.config, "hidden_size", 4096)
        fit = max(2, model.share_bytes // width)
        self.deciding = deciding
        self.data = data[: max(deciding + 1, min(len(data), deciding + plan.steps * plan.windows, fit))]
        with torch.no_grad():
            chain = find_chain(self.model, self.model.shortened(data[:1], 16).to(self.model.device))
        if chain is None:
            raise BadInput("the model is no chain of blocks that could be trained one by one; train it as a whole")
        self.blocks = chain.blocks
        self.names = [[name for name in layers if name in names] for layers in chain.layers[1:]]
        if not any(self.names):
            raise BadInput("no block of the model has a layer that can be trained; train it as a whole")
        self.objective = distance_of(self.model.info.task)
        with torch.inference_mode():
            self.reference = make_reference(self.model, self.data[:deciding], model.share_bytes)
        weights, activations, self.caches = model.swappable(assignment)
        self.weights = dict(weights)
        self.activations = {name: passed_through(function) for name, function in activations.items()}
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.costs: list[Cost] = []

    def run(self, tell: Tell, checkpoints: Path, note: Note) -> Recovered:
        """Train to the end; goes on from the blocks in the folder `checkpoints`, and leaves there what it finished."""
        try:
            return self._run(tell, checkpoints, note)
        finally:
            self.model.restore()

    def _run(self, tell: Tell, checkpoints: Path, note: Note) -> Recovered:
        before = self._loss()
        self.model.restore()
        self.costs = costs(self.model, self.blocks, self.data[self.deciding :], self.plan.seed)
        targets = self._first_states()
        self._swap()
        inputs = self._first_states()
        self.calls = self._recorded()
        best: dict[str, QuantizedWeight] = {}
        errors: list[tuple[float, float, int]] = []
        total = sum(map(bool, self.names)) * self.plan.steps
        done, began, known = 0, time.monotonic(), 0
        for k, names in enumerate(self.names):
            self.model.restore()
            targets = self._through(k, targets)
            if names:
                starts = self.quantized_model.layers(self.assignment, names)
                found = _read(checkpoints / f"{k:05}.safetensors", starts) if known == done else None
                if found is None:
                    if known and known == done:
                        note(f"going on from block {k + 1} of {len(self.names)}")
                    count = _Count(tell, done, total, began, done - known)
                    found = self._train(k, inputs, targets, starts, count)
                    _write(checkpoints / f"{k:05}.safetensors", found)
                    first, last, _ = found[1]
                    note(f"block {k + 1} of {len(self.names)}: error {last:.3g}, was {first:.3g}")
                else:
                    known += self.plan.steps
                done += self.plan.steps
                best |= found[0]
                errors.append(found[1])
                for name, layer in found[0].items():
                    weight = self.model.weight(name)
                    self.weights[name] = layer.dequantize(weight.dtype).to(weight.device)
            self._swap()
            inputs = self._through(k, inputs)
        after = self._loss()
        facts = (
            {"how": "blocks"}
            | asdict(self.plan)
            | {
                "layers": sum(map(len, self.names)),
                "tokens": self.model.tokens(self.data[self.deciding :]),
                "epochs": self.plan.steps * self.plan.windows / (len(self.data) - self.deciding),
                "deciding_tokens": self.model.tokens(self.data[: self.deciding]),
                "losses": {"0": before, str(self.plan.steps): after},
                "errors": [list(error) for error in errors],
            }
        )
        return Recovered(best, facts)

    # -- one block --------------------------------------------------------------------------------

    def _train(
        self,
        k: int,
        inputs: Sequence[Tensor],
        targets: Sequence[Tensor],
        starts: Mapping[str, QuantizedWeight],
        count: _Count,
    ) -> _Found:
        """The layers of block `k` at their best moment."""
        layers = LayersInTraining(self.model, starts)
        self.weights |= layers.weights
        self._swap()
        held, best = self.deciding, dict(starts)
        looks = {round(i * self.plan.steps / LOOKS) for i in range(1, LOOKS + 1)}
        with layers.asking():
            first = least = self._error(k, inputs[:held], targets[:held])
            kept = 0
            for step in range(self.plan.steps):
                gradients: dict[str, Tensor] = {}
                chosen = self.plan.chosen(step, len(inputs) - held)
                loss = 0.0
                for window in chosen:
                    with torch.enable_grad():
                        output = self._call(k, inputs[held + window])
                        error = self.costs[k](output, targets[held + window]) / len(chosen)
                    error.backward()  # type: ignore[no-untyped-call]
                    loss += float(error.detach())
                    gradients = layers.collected(gradients, last=len(chosen) == 1)
                if not math.isfinite(loss):
                    raise NotFinite(f"the loss is {loss} at step {step + 1} of block {k + 1}: try a lower rate")
                layers.learn(gradients, step + 1, self.plan.rates(step))
                if step + 1 in looks:
                    error_now = self._error(k, inputs[:held], targets[:held])
                    if error_now < least:
                        least, kept, best = error_now, step + 1, layers.quantized()
                count.tell(step + 1, loss)
        return best, (first, least, kept)

    def _error(self, k: int, inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> float:
        """The mean error of block `k` as it is now."""
        with torch.no_grad():
            errors = [float(self.costs[k](self._call(k, x), y)) for x, y in zip(inputs, targets, strict=True)]
        return sum(errors) / len(errors)

    # -- states -----------------------------------------------------------------------------------

    def _swap(self) -> None:
        self.model.swap(self.weights, self.activations, self.caches)

    def _call(self, k: int, states: Tensor) -> Tensor:
        """What block `k` as it is now gives back for states (1, tokens, width)."""
        arguments, named = self.calls[k]
        found: Tensor = self.blocks[k](states, *arguments, **named)
        return found

    def _through(self, k: int, states: Sequence[Tensor]) -> list[Tensor]:
        with torch.no_grad():
            return [self._call(k, each) for each in states]

    def _first_states(self) -> list[Tensor]:
        """What the first block takes in, of each window, by the model as it is now."""
        found: list[Tensor] = []

        def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
            found.append(arguments[0].clone())
            raise _Reached

        with _hooked(self.blocks[0].register_forward_pre_hook(hook)), torch.no_grad():
            for ids in self.data:
                with contextlib.suppress(_Reached):
                    self.model.outputs(ids.unsqueeze(0).to(self.model.device))
        return found

    def _recorded(self) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
        """What each block is called with beside states: masks and positions, the same for all windows.

        Raises `BadInput` where a block by itself does not give back what it does in the model.
        """
        calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        seen: list[tuple[Tensor, Tensor]] = []

        def before(_: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls.append((arguments[1:], named))

        def after(_: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
            seen.append((arguments[0].clone(), output.clone()))

        with torch.no_grad():
            with contextlib.ExitStack() as stack:
                for block in self.blocks:
                    stack.enter_context(_hooked(block.register_forward_pre_hook(before, with_kwargs=True)))
                self.model.outputs(self.data[:1].to(self.model.device))
            with contextlib.ExitStack() as stack:
                for block in self.blocks:
                    stack.enter_context(_hooked(block.register_forward_hook(after)))
                self.model.outputs(self.data[-1:].to(self.model.device))
            self.calls = calls
            for k, (states, output) in enumerate(seen):
                if not torch.equal(self._call(k, states), output):
                    raise BadInput(f"block {k + 1} of the model does not run by itself; train the model as a whole")
        return calls

    def _loss(self) -> float:
        """The whole model's loss on the windows that are not trained on, with what was found so far."""
        self._swap()
        return mean_over(self.model, self.objective, self.reference, self.data[: self.deciding])


class _Count:
    """Counts a block's steps among all."""

    def __init__(self, tell: Tell, before: int, total: int, began: float, here: int) -> None:
        self._tell, self._before, self._total, self._began, self._here = tell, before, total, began, here

    def tell(self, step: int, loss: float) -> None:
        """Step number `step` of the block, from 1, is done."""
        now = self._before + step
        pace = (time.monotonic() - self._began) / (self._here + step)
        self._tell(now, self._total, loss, pace * (self._total - now))


@contextlib.contextmanager
def _hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


# -- checkpoints ----------------------------------------------------------------------------------


def _write(path: Path, found: _Found) -> None:
    """Store a finished block. Raises `AutoQError` where the disk refuses."""
    layers, error = found
    tensors = {f"{name}/{key}": tensor for name, layer in layers.items() for key, tensor in layer.tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, save(tensors, {"error": json.dumps(error)}))
    except (OSError, SafetensorError) as problem:
        raise AutoQError(f"the checkpoint {str(path)!r} cannot be written: {problem}") from problem


def _read(path: Path, starts: Mapping[str, QuantizedWeight]) -> _Found | None:
    """A finished block whose layers began at `starts`; None where there is none that can be read."""
    layers: dict[str, QuantizedWeight] = {}
    try:
        with safe_open(path, framework="pt") as file:
            before, after, step = json.loads(file.metadata()["error"])
            for name, start in starts.items():
                wanted = expected_tensors(start.scheme, start.shape, torch.float32)
                tensors = {key: file.get_tensor(f"{name}/{key}") for key in wanted}
                layers[name] = restore(start.scheme, start.shape, tensors)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, AutoQError):
        return None
    return layers, (float(before), float(after), int(step))


def recover(
    model: QuantizedModel,
    assignment: Assignment,
    plan: Plan,
    tokens: int | None,
    checkpoints: Path,
    tell: Tell = lambda *_: None,
    note: Note = lambda _: None,
) -> Recovered:
    """Train what can be trained of the blocks of `assignment`, on text that is in no part of the study.

    Finished blocks of the same training, in a folder of `checkpoints`, are taken over; it is removed at the end. Raises
    as `BlockTrainer` does, `DataRefused` where there is no text to train on, and `AutoQError` where the whole model
    is no better than it was.
    """
    data = recovery_data(model, tokens, note)
    training = BlockTrainer(model, assignment, data, plan)
    told = f"blocks {model.identity()} {assignment.hash} {plan} {VERSION}".encode()
    path = checkpoints / hashlib.sha256(told + training.data.numpy().tobytes()).hexdigest()[:32]
    found = training.run(tell, path, note)
    shutil.rmtree(path, ignore_errors=True)
    before, after = found.facts["losses"].values()
    held = f"{found.facts['deciding_tokens']} tokens that were not trained on"
    if not after < before:
        raise AutoQError(
            f"nothing was gained: after {plan.steps} steps of each block the loss on {held} is {after:.4g}, and it was "
            f"{before:.4g}; try another rate or more steps"
        )
    note(f"{after:.4g} instead of {before:.4g} on {held}")
    return found
