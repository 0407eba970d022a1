"""What an error of a block's output costs the model's answers, told from a few backward passes.

As the curvature proxy has it of layers (`autoq.calibration.curvature`), for labels drawn from the unquantized model:

    KL per token ≈ ½ E_t[(g_t · δ_t)²] ≈ ½ E_t[ε_tᵀ C ε_t]      ε_t = δ_t / |h_t|      C = E_t[|h_t|² g_t g_tᵀ]

    h  the block's output in the unquantized model, (width,) at token t     δ  its error
    g  the gradient of the sequence's loss with respect to h

BRECQ ("Pushing the Limit of Post-Training Quantization by Block Reconstruction", Li et al. 2021, equation 10) weighs
outputs by squared gradients, C's diagonal token by token. Where we differ, and why:

- C is whole: next to nothing reads most of what makes up a residual stream's energy, and what is read are directions.
- Errors are shares of a token's own size, which the next norm takes away. With that, errors and gradients are taken to
  be independent of each other.
- Sinks are by themselves: a sequence's first token and those larger than LARGE times its median one. All others
  attend to them, and they may be a thousand times as large ("Efficient Streaming Language Models with Attention
  Sinks", Xiao et al. 2023). Their own C is told by too few gradients to have directions, so it is C₀ = c₀ I, and of
  their error what turns them counts, ε = ŷ/|ŷ| - h/|h|: their size, which may be off by a quarter, does nothing, and
  would be most of the error of half of SmolLM2's blocks.
- RIDGE times the mean of C's diagonal is added to it: some thousand tokens do not show all directions that are read.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor, nn

from autoq.calibration.curvature import go_back
from autoq.models import LoadedModel

TOKENS = 2048  # that go backward, at least one window
RIDGE = 0.1
LARGE = 8.0
_LEAST = 1e-20


@dataclass(frozen=True)
class Cost:
    """Of one block: `root` (width, width) R with R Rᵀ = C, and the sinks' c₀; float32, nats per token."""

    root: Tensor
    sink: float

    def __call__(self, output: Tensor, target: Tensor) -> Tensor:
        """The mean over tokens, of states (1, tokens, width) that should be `target`."""
        found, wanted = output.float(), target.float()
        size = wanted.norm(dim=-1, keepdim=True).clamp_min(_LEAST)
        sink = _sinks(size)
        off = torch.where(sink, F.normalize(found, dim=-1), found / size) - wanted / size
        spread = (off @ self.root.to(off.device)).square().sum(-1, keepdim=True)
        total = torch.where(sink, self.sink * off.square().sum(-1, keepdim=True), spread)
        return total.mean() / 2


def _sinks(size: Tensor) -> Tensor:
    """Which tokens of (1, tokens, 1) are sinks."""
    found = size > LARGE * size.median()
    found[:, 0] = True
    return found


def costs(model: LoadedModel, blocks: Sequence[nn.Module], windows: Tensor, seed: int) -> list[Cost]:
    """The cost of each block's output on `windows` (n, tokens), by the model as it is now; deterministic for a seed.

    Of a block that no answer depends on, all directions and tokens count alike.
    """
    totals: dict[int, Tensor] = {}
    sinks = [[0.0, 0] for _ in blocks]  # what they add up to, and how many
    generator = torch.Generator().manual_seed(seed)

    def watch(k: int) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> None:
            if not output.requires_grad:
                output.requires_grad_()
            size = output.detach().float().norm(dim=-1, keepdim=True)
            totals.setdefault(k, torch.zeros(output.shape[-1], output.shape[-1]))

            def collect(grad: Tensor) -> None:
                scaled, sink = grad.float() * size, _sinks(size)
                sinks[k][0] += float((scaled * sink).square().sum())
                sinks[k][1] += int(sink.sum())
                rows = (scaled * ~sink).flatten(0, -2)
                totals[k] += (rows.t() @ rows).cpu()

            output.register_hook(collect)  # type: ignore[no-untyped-call]

        return hook

    length = model.length(windows)
    count = min(len(windows), max(1, TOKENS // length))
    with contextlib.ExitStack() as stack:
        for k, block in enumerate(blocks):
            stack.callback(block.register_forward_hook(watch(k)).remove)
        with torch.enable_grad():
            for ids in windows[:count]:
                go_back(model.outputs(ids.unsqueeze(0).to(model.device)), model.info.task, generator)
    positions = count * length
    found = []
    for k, (total, number) in enumerate(sinks):
        found.append(_cost(totals[k] / max(1, positions - number), total / max(1, number)))
    return found


def _cost(square: Tensor, sink: float) -> Cost:
    """From C (width, width) as it was added up, and the trace of C₀."""
    identity, mean = torch.eye(len(square)), square.diagonal().mean()
    if not 0 < mean < torch.inf:
        return Cost(identity, 1.0)
    unit = (square + square.t()).double() / (2 * mean)
    root = torch.linalg.cholesky(unit + RIDGE * identity) * mean.double().sqrt()
    return Cost(root.float(), sink / len(square))
