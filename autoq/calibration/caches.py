"""What quantized KV caches lose, from the calibration pass; and slopes of their choices at a quantized model.

For labels drawn from the model itself (see `autoq.calibration.curvature`), what is read of a cache moves by δ, and

    KL per token ≈ ½ E[(Σ g δ)²] / T

with g the gradient of the sequence's summed loss with respect to the numbers that queries read as codes, and T its
tokens. δ is known exactly here: the keys and values of the calibration text are at hand, and so is what each scheme
makes of them. Its signs are as good as random and independent from number to number, so

    E[(Σ g δ)²] ≈ E[Σ g² δ²]

which needs far fewer sequences for the same error. Keys that a query reads before their group is whole are not in the
sum: they are not rounded for it.

Slopes are to first order, at the assignment that is swapped in (see `autoq.calibration.slopes`): P[c] = <g, x_c − x>
with x the keys or values and x_c what the choice c makes of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from autoq.calibration.curvature import go_back
from autoq.models.caches import Read
from autoq.models.loaded import LoadedModel


class Watched:
    """A cache that is read as `current` says (None: as it is), and adds something up for each of `choices`.

    It is installed like what is read from a cache, for forward passes that a backward pass follows.
    """

    def __init__(
        self,
        choices: Sequence[Read | None],
        share: Callable[[Tensor, Tensor], Tensor],
        current: Read | None = None,
    ) -> None:
        self.sums = [0.0] * len(choices)
        self._choices, self._share, self._current = choices, share, current

    def __call__(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        read = (keys, values) if self._current is None else self._current(keys, values)
        return self._watch(read[0], keys, values, 0), self._watch(read[1], keys, values, 1)

    def _watch(self, read: Tensor, keys: Tensor, values: Tensor, which: int) -> Tensor:
        # One of its own: who reads the same numbers uncoded has another gradient.
        own = read.clone() if read.requires_grad else read.clone().requires_grad_()
        keys, values = keys.detach(), values.detach()

        def add(grad: Tensor) -> None:
            for i, choice in enumerate(self._choices):
                if choice is not None:
                    moved = choice(keys, values)[which].float() - (keys, values)[which].float()
                    self.sums[i] += float(self._share(grad.float(), moved))

        own.register_hook(add)  # type: ignore[no-untyped-call]
        return own


def slopes(choices: Sequence[Read | None], current: Read | None) -> Watched:
    """A cache that finds P of each choice while it is read as `current`."""
    return Watched(choices, lambda grad, moved: grad.mul(moved).sum(), current)


def losses(
    model: LoadedModel, windows: Tensor, seed: int, choices: Mapping[str, Sequence[Read | None]]
) -> dict[str, list[float]]:
    """Cache name -> the predicted KL in nats per token of each of its `choices`, that cache alone.

    One forward and one backward pass over `windows` (n, tokens), each a sequence of its own. Deterministic for a seed.
    Whatever is swapped in is taken out.
    """
    generator = torch.Generator().manual_seed(seed)
    watched = {name: Watched(own, lambda g, d: g.mul(d).square().sum()) for name, own in choices.items()}
    model.swap({}, caches=watched)
    try:
        with torch.enable_grad():
            for window in windows:
                output = model.outputs(window.unsqueeze(0).to(model.device))
                go_back(output, model.info.task, generator)
    finally:
        model.restore()
    outputs = len(windows) * model.positions(model.length(windows))
    return {name: [0.5 * found / outputs for found in own.sums] for name, own in watched.items()}
