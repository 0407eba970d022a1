"""The reference of quality: what the unquantized model answers on the data, kept as cheaply as it fits.

Kept as probabilities in bfloat16 (tokens × vocabulary) where they fit in the memory that is given; else
as final hidden states (tokens × width), from which the original head gives the probabilities again,
chunk by chunk; else as probabilities in a file. An encoder's final hidden states are kept as they are.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor

from autoq.layer import Task
from autoq.models import LoadedModel

CHUNK_ELEMENTS = 1 << 20  # logits turned to float32 at a time: 4 MB, which stays in the caches


def row_blocks(output: Tensor) -> Iterator[slice]:
    """Slices that cover the rows of `output` (t, v), of about `CHUNK_ELEMENTS` elements each."""
    step = max(1, CHUNK_ELEMENTS // output.shape[-1])
    return (slice(start, min(start + step, output.shape[0])) for start in range(0, output.shape[0], step))


def distance(expected: Tensor, found: Tensor, task: Task) -> float:
    """Mean over tokens of the KL of `found` (t, v) from `expected` in nats; of an encoder without a head, of
    the cosine distance."""
    total = 0.0
    for rows in row_blocks(expected):
        one, two = expected[rows].float(), found[rows].float()
        if task == "encoder":
            total += float((1 - F.cosine_similarity(one.double(), two.double(), dim=-1)).sum())
        else:
            total += float(F.kl_div(two.log_softmax(-1), one.log_softmax(-1), log_target=True, reduction="sum"))
    return total / len(expected)


@dataclass
class Reference:
    """The unquantized model's answers on one part of the data.

    `kept` is (windows, tokens, v): probabilities, or inputs of the `head` (v = width) with its original
    `head_weight`, or an encoder's output. `mass` and `entropy` (windows, tokens) go with probabilities, `top`
    (windows, tokens) int64 with either: the most likely token, which rounding would make one of several.
    """

    kept: Tensor
    mass: Tensor | None = None
    entropy: Tensor | None = None
    head: torch.nn.Module | None = None
    head_weight: Tensor | None = None
    top: Tensor | None = None

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


def make_reference(model: LoadedModel, data: Tensor, share_bytes: int) -> Reference:
    """The unquantized `model`'s answers on `data` (windows, tokens), in at most about `share_bytes` of memory."""
    if model.info.task == "encoder":
        states = [model.outputs(window.unsqueeze(0).to(model.device)) for window in data]
        return Reference(torch.cat(states))
    outputs = len(data), model.positions(model.length(data))
    width = model.info.answers
    needed = math.prod(outputs) * width * 2
    if needed > share_bytes and (kept := _hidden_states(model, data)) is not None:
        return kept
    shape = (*outputs, width)
    if needed > share_bytes and model.device.type == "cpu":
        probabilities = _mapped(shape)
    else:
        probabilities = torch.empty(shape, dtype=torch.bfloat16, device=model.device)
    mass, entropy = torch.empty(2, *outputs, device=model.device)
    top = torch.empty(outputs, dtype=torch.int64, device=model.device)
    for index, window in enumerate(data):
        output = model.outputs(window.unsqueeze(0).to(model.device))[0]
        top[index] = output.argmax(-1)
        for rows in row_blocks(output):
            rounded = output[rows].float().softmax(-1).to(torch.bfloat16)
            probabilities[index, rows] = rounded
            exact = rounded.float()
            mass[index, rows] = exact.sum(-1)
            entropy[index, rows] = _negative_entropy(exact / mass[index, rows].unsqueeze(-1))
    return Reference(probabilities, mass, entropy, top=top)


def _hidden_states(model: LoadedModel, data: Tensor) -> Reference | None:
    """The reference as inputs of the head, or None where logits are more than the head's product
    (a soft cap, a scale), which is tried out on the first window."""
    head = model.model.get_output_embeddings()  # type: ignore[operator]
    if not isinstance(head, torch.nn.Module):
        return None
    states: list[Tensor] = []
    top: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, inputs: states.append(inputs[0][0]))
    weight = head.weight.data
    assert isinstance(weight, Tensor)
    try:
        for index, window in enumerate(data):
            logits = model.outputs(window.unsqueeze(0).to(model.device))[0]
            top.append(logits.argmax(-1))
            if index == 0:
                again = F.linear(states[0], weight, getattr(head, "bias", None))
                if again.shape != logits.shape or not torch.allclose(again, logits, rtol=1e-2, atol=1e-2):
                    return None
    finally:
        handle.remove()
    return Reference(torch.stack(states), head=head, head_weight=weight, top=torch.stack(top))
