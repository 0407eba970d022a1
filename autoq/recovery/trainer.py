"""The trainer: all trainable layers of an assignment together, towards the unquantized model's answers.

End-to-end distillation: the loss is the mean over tokens of KL(p ‖ q), p the unquantized and q the quantized model's
distribution of the next token (of an encoder, the cosine distance of final hidden states). Each step sees some windows
of the recovery part, forward and backward in the model's own dtype and through the very weights that ship; gradients of
windows add up in float32, and what is trained (`autoq.recovery.latents`) is float32. Adam, a warm-up of a tenth of the
steps and a cosine to zero. Gradients are not clipped: Adam's steps are bounded.

The first windows are not trained on: they decide which moment of the training is kept, its start included. So what
comes out is never worse than the trial that it began with, by these tokens.

Memory: for each trained weight 12 bytes (latent weight and two moments), the weight and its gradient in the model's
dtype, 4 bytes where gradients of several windows add up; and the activations of one window. Everything is a function of
the seed and the number of steps, and a training that was interrupted goes on from its checkpoint to the same end, bit
for bit.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from autoq.assignment import Assignment
from autoq.calibration.data import recovery_windows
from autoq.chunks import mean_loss
from autoq.errors import AutoQError, BadInput, DataRefused, NotFinite
from autoq.methods import QuantizedWeight
from autoq.methods._weights import expected_tensors
from autoq.methods._weights import restore as quantized_weight
from autoq.models import LoadedModel
from autoq.objectives import TokenObjective, distance_of
from autoq.quantized_model import QuantizedModel
from autoq.recovery.layers import LayersInTraining, trainable_names
from autoq.reference import Reference, make_reference, row_blocks

LOOKS = 8  # how many times, evenly, the tokens that decide are looked at
DECIDING = 4  # at most so many windows decide, and at most one in eight
CHECKPOINT_SECONDS = 60.0
WARM_UP = 0.1  # of all steps

WEIGHT_RATE, SCALE_RATE = 5e-3, 2e-3
VERSION = 1  # of what checkpoints hold

Tell = Callable[[int, int, float, float], None]  # step, of how many, loss, seconds left
Note = Callable[[str], None]


@dataclass(frozen=True)
class Plan:
    """How to train. Learning rates are those of the step after the warm-up: of latent weights, zero points and
    centroids in steps of their grid, of scales as a share of them. `windows` are seen in each step."""

    steps: int
    windows: int = 1
    weight_rate: float = WEIGHT_RATE
    scale_rate: float = SCALE_RATE
    seed: int = 0

    def rates(self, step: int) -> dict[str, float]:
        """The learning rates of step number `step`, from 0."""
        warm = max(1, round(WARM_UP * self.steps))
        if step < warm:
            share = (step + 1) / warm
        else:
            share = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))
        return {"weights": self.weight_rate * share, "scales": self.scale_rate * share}

    def chosen(self, step: int, count: int) -> list[int]:
        """The windows of step number `step`, from 0, of `count` that there are: each epoch in an order of its own."""
        found = []
        for place in range(step * self.windows, (step + 1) * self.windows):
            epoch, index = divmod(place, count)
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            found.append(int(torch.randperm(count, generator=generator)[index]))
        return found


def plan(steps: int, windows: int, rate: float, seed: int) -> Plan:
    """The plan at `rate` times the usual learning rates."""
    return Plan(steps, windows, WEIGHT_RATE * rate, SCALE_RATE * rate, seed)


@dataclass(frozen=True)
class Recovered:
    """What came of a training: the layers that ship, and what is worth remembering of it."""

    layers: Mapping[str, QuantizedWeight]
    facts: Mapping[str, Any]


class Trainer:
    """One training of the layers of `assignment` that can be trained, from where they are.

    Raises `BadInput` where there is none, or where they do not fit in memory.
    """

    def __init__(self, model: QuantizedModel, assignment: Assignment, data: Tensor, plan: Plan) -> None:
        self.quantized_model, self.model = model, model.model
        self.assignment, self.plan = assignment, plan
        self.names = trainable_names(assignment)
        count = sum(self.model.weight(name).numel() for name in self.names)
        own = self.model.weight(self.names[0]).element_size()
        needed = count * (12 + 2 * own + (4 if plan.windows > 1 else 0))
        if needed > (free := psutil.virtual_memory().available):
            raise BadInput(
                f"training {count / 1e6:.0f} million weights takes {needed / 1e9:.1f} GB of memory; "
                f"{free / 1e9:.1f} GB are free"
            )
        deciding = max(1, min(DECIDING, len(data) // 8))
        self.objective = distance_of(self.model.info.task)
        self.deciding, self.data = data[:deciding], data[deciding:]
        with torch.inference_mode():
            self.reference = make_reference(self.model, self.deciding, model.share_bytes)
        weights, activations, self.caches = model.swappable(assignment)
        self.activations = {name: passed_through(function) for name, function in activations.items()}
        starts = model.layers(assignment, self.names)
        self.layers = LayersInTraining(self.model, starts)
        self.weights = {**weights, **self.layers.weights}
        self.steps, self.losses = 0, {0: math.nan}
        self.best: Mapping[str, QuantizedWeight] = starts
        self.whole = True  # whether all layers have taken the same number of steps

    def run(self, tell: Tell = lambda *_: None, checkpoint: Path | None = None) -> Recovered:
        """Train to the end; goes on from `checkpoint` where that is one, and leaves one there when interrupted."""
        began, before, saved = time.monotonic(), self.steps, time.monotonic()
        try:
            with self._swapped():
                if self.steps == 0:
                    self.losses[0] = self._decide()
                while self.steps < self.plan.steps:
                    loss = self._step()
                    if self.steps in self._looks():
                        self._look()
                    seconds = time.monotonic() - began
                    left = seconds / (self.steps - before) * (self.plan.steps - self.steps)
                    tell(self.steps, self.plan.steps, loss, left)
                    if checkpoint is not None and time.monotonic() - saved > CHECKPOINT_SECONDS:
                        self.save(checkpoint)
                        saved = time.monotonic()
        except BaseException:
            if checkpoint is not None and self.whole and self.steps > before:
                self.save(checkpoint)
            raise
        kept = min(self.losses, key=lambda step: self.losses[step])
        facts = (
            {"how": "model"}
            | asdict(self.plan)
            | {
                "layers": len(self.names),
                "tokens": self.model.tokens(self.data),
                "epochs": self.plan.steps * self.plan.windows / len(self.data),
                "deciding_tokens": self.model.tokens(self.deciding),
                "losses": {str(step): loss for step, loss in self.losses.items()},
                "kept_step": kept,
            }
        )
        return Recovered(self.best, facts)

    # -- steps ------------------------------------------------------------------------------------

    def _looks(self) -> set[int]:
        return {round(i * self.plan.steps / LOOKS) for i in range(1, LOOKS + 1)}

    def _step(self) -> float:
        """One update of all layers; the mean loss before it. Raises `NotFinite`."""
        loss, gradients = 0.0, dict[str, Tensor]()
        chosen = self.plan.chosen(self.steps, len(self.data))
        for window in chosen:
            loss += self._backward(window, 1 / len(chosen)) / len(chosen)
            gradients = self.layers.collected(gradients, last=len(chosen) == 1)
        if not math.isfinite(loss):
            raise NotFinite(f"the loss is {loss} at step {self.steps + 1}: try lower learning rates")
        rates = self.plan.rates(self.steps)
        with _undisturbed():  # all layers or none: there is nothing to go on from in between
            self.whole = False
            self.layers.learn(gradients, self.steps + 1, rates)
            self.steps += 1
            self.whole = True
        return loss

    def _backward(self, window: int, share: float) -> float:
        """The loss on one window; `share` of its gradients is added to the parameters'."""
        ids = self.data[window].unsqueeze(0).to(self.model.device)
        self.model.restore()
        with torch.no_grad():
            expected = self.model.outputs(ids)[0]
        self.model.swap(self.weights, self.activations, self.caches)
        with torch.enable_grad():
            output = self.model.outputs(ids)[0]
        loss, gradient = _loss(expected, output.detach(), self.model.info.task == "encoder")
        output.backward(gradient.mul_(share))  # type: ignore[no-untyped-call]
        return loss

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        """The model as it is trained, its weights asking for gradients; then as it was."""
        self.model.swap(self.weights, self.activations, self.caches)
        try:
            with self.layers.asking():
                yield
        finally:
            self.model.restore()

    # -- which moment is kept ---------------------------------------------------------------------

    def _decide(self) -> float:
        """The mean loss on the windows that are not trained on."""
        return mean_over(self.model, self.objective, self.reference, self.deciding)

    def _look(self) -> None:
        loss = self._decide()
        if loss < min(self.losses.values()):
            self.best = self.layers.quantized()
        self.losses[self.steps] = loss

    # -- checkpoints ------------------------------------------------------------------------------

    def save(self, path: Path) -> None:
        """Write all that training goes on from. Raises `AutoQError` where the disk refuses."""
        tensors = {f"{name}/{key}": t for name, each in self.layers.latents.items() for key, t in each.state()}
        if min(self.losses, key=lambda step: self.losses[step]) > 0:
            tensors |= {f"{name}/best.{key}": t for name, best in self.best.items() for key, t in best.tensors.items()}
        told = {"steps": str(self.steps), "losses": json.dumps(self.losses)}
        partial = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, partial, told)
            partial.replace(path)
        except (OSError, SafetensorError) as problem:
            partial.unlink(missing_ok=True)
            raise AutoQError(f"the checkpoint {str(path)!r} cannot be written: {problem}") from problem

    def restore(self, path: Path) -> bool:
        """Go on from a checkpoint; False where there is none that can be read, and then nothing has changed."""
        try:
            with safe_open(path, framework="pt") as file:
                told, keys = file.metadata(), set(file.keys())
                losses = {int(step): loss for step, loss in json.loads(told["losses"]).items()}
                for name, each in self.layers.latents.items():
                    for key, tensor in each.state():
                        if file.get_slice(f"{name}/{key}").get_shape() != list(tensor.shape):
                            return False
                best = dict(self.best)
                for name, start in self.best.items() if any("/best." in key for key in keys) else ():
                    wanted = expected_tensors(start.scheme, start.shape, torch.float32)
                    tensors = {key: file.get_tensor(f"{name}/best.{key}") for key in wanted}
                    best[name] = quantized_weight(start.scheme, start.shape, tensors)
                for name, each in self.layers.latents.items():
                    for key, tensor in each.state():
                        tensor.copy_(file.get_tensor(f"{name}/{key}"))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, AutoQError):
            return False
        self.best, self.losses, self.steps = best, losses, int(told["steps"])
        self.layers.write()
        return True


def recover(
    model: QuantizedModel,
    assignment: Assignment,
    plan: Plan,
    tokens: int | None,
    checkpoints: Path,
    tell: Tell = lambda *_: None,
    note: Note = lambda _: None,
) -> Recovered:
    """Train what can be trained of `assignment`, as a `Trainer` does, on text that is in no part of the study.

    A checkpoint in the folder `checkpoints` of the same training is gone on from, and removed at the end. `note` hears
    of that and of the text. Raises as `Trainer` does, `DataRefused` where there is no text to train on, and
    `AutoQError` where no moment of the training is better than its start.
    """
    data = recovery_data(model, tokens, note)
    training = Trainer(model, assignment, data, plan)
    told = f"{model.identity()} {assignment.hash} {plan} {VERSION}".encode()
    name = hashlib.sha256(told + data.numpy().tobytes()).hexdigest()[:32]
    path = checkpoints / f"{name}.safetensors"
    if training.restore(path):
        note(f"going on from step {training.steps} of {plan.steps}")
    found = training.run(tell, path)
    path.unlink(missing_ok=True)
    held = found.facts["deciding_tokens"]
    if found.facts["kept_step"] == 0:
        raise AutoQError(
            f"nothing was gained: in {plan.steps} steps the loss on {held} tokens that were not "
            f"trained on was never below the {training.losses[0]:.4g} of the start; try another rate or more steps"
        )
    before, after = training.losses[0], training.losses[found.facts["kept_step"]]
    note(
        f"step {found.facts['kept_step']} is kept: {after:.4g} nats/token instead of {before:.4g} on "
        f"{held} tokens that were not trained on"
    )
    return found


def recovery_data(model: QuantizedModel, tokens: int | None, note: Note) -> Tensor:
    """Windows (n, window) to train on: those that are in no part of the study, at most `tokens` of them; where there
    are fewer than two, the calibration part. Raises `DataRefused` where that, too, has fewer."""
    data = recovery_windows(model.spec.data, model.model)
    if len(data) < 2:
        note("all data are in the study's parts; training on the calibration part")
        data = model.parts.calibration
    if len(data) < 2:
        raise DataRefused(
            f"data source {model.spec.data.source!r} has nothing left to train on and the calibration part has "
            "one window; give more, or more data.calibration_tokens"
        )
    return data if tokens is None else data[: max(2, -(-tokens // model.model.length(data)))]


def mean_over(model: LoadedModel, objective: TokenObjective, reference: Reference, data: Tensor) -> float:
    """The mean of an objective over windows `data` (n, window), those of the reference, of the model as it is now."""
    total = 0.0
    with torch.no_grad():
        for index, ids in enumerate(data):
            output = model.outputs(ids.unsqueeze(0).to(model.device))
            total += float(mean_loss(model, objective, reference, index, ids[None], output))
    return total / len(data)


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Let interrupts wait until the body is over. Without effect off the main thread, where none arrive."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    waiting: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    former = {each: signal.signal(each, lambda number, _: waiting.append(number)) for each in signals}
    try:
        yield
    finally:
        for each, handler in former.items():
            signal.signal(each, handler)
        for number in waiting[:1]:
            signal.raise_signal(number)


def passed_through(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The quantization of inputs with the gradient of the identity."""
    return lambda inputs: inputs + (function(inputs.detach()) - inputs).detach()


def _loss(expected: Tensor, found: Tensor, encoder: bool) -> tuple[float, Tensor]:
    """The mean loss of outputs `found` (tokens, v), and its gradient by them, in their dtype.

    Worked out in blocks of rows in float32: of KL(p ‖ softmax(z)) the gradient by z is softmax(z) − p.
    """
    gradient, total = torch.empty_like(found), 0.0
    for rows in row_blocks(found):
        z = found[rows].float()
        if encoder:
            with torch.enable_grad():
                distance = (1 - F.cosine_similarity(z.requires_grad_(), expected[rows].float(), dim=-1)).sum()
                (slope,) = torch.autograd.grad(distance, z)
            total += float(distance.detach())
        else:
            log_p, log_q = expected[rows].float().log_softmax(-1), z.log_softmax(-1)
            p = log_p.exp()
            total += float(torch.linalg.vecdot(p, log_p.sub_(log_q)).sum())
            slope = log_q.exp_().sub_(p)
        gradient[rows] = slope.div_(len(found)).to(gradient.dtype)
    return total / len(found), gradient
