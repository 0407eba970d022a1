"""Statistics for experts that no calibration token came to.

A router sends each token to a few experts of a block, and those of a short text may miss some. An expert's
statistics are of the tokens that it saw. One that saw none would be predicted to lose nothing under any scheme, and a
method that weighs inputs would have no weights. So it is taken to have seen one token, like the mean token of its
block's other experts: with n_e the tokens that expert e saw, of n = Σ n_e,

    A, E[g²]   Σ_e of what the others have, by n: one token's share of the loss
    H          the others' mean, each by its share of Σ_e tr E[G Gᵀ]
    E[x xᵀ]    Σ_e n_e E[x xᵀ]_e / n, and so its diagonal and the steps of 8-bit inputs; where inputs themselves are
               kept, all of them
    ranges     the widest, and histograms all of them together

which is the estimate with one observation more than there are, and never 0, NaN or infinite where the others are
not. A block in which no expert ran at all stays without statistics, and is predicted to lose nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from autoq.calibration.histogram import Histogram
from autoq.layer import ModelInfo

Found = dict[str, dict[str, Tensor]]


def fill(info: ModelInfo, found: Found, positions: Mapping[str, int]) -> None:
    """Give every expert's matrix in `found` (layer -> statistics) some, in place; `positions` are inputs seen."""
    stacks: dict[str, list[str]] = defaultdict(list)
    for layer in info.layers:
        if layer.stack is not None:
            stacks[layer.stack].append(layer.name)
    for names in stacks.values():
        seen = [name for name in names if positions[name] and "output_square" in found[name]]
        unseen = [name for name in names if not positions[name]]
        if seen and unseen:
            pooled = _pooled([found[name] for name in seen], [positions[name] for name in seen])
            for name in unseen:
                found[name] = dict(pooled)


def _pooled(others: Sequence[Mapping[str, Tensor]], positions: Sequence[int]) -> dict[str, Tensor]:
    """The statistics of one token like those of `others`, which saw `positions` of them."""
    total = sum(positions)
    ranges = torch.stack([own["input_range"] for own in others])
    traces = torch.stack([own["output_square"].sum() for own in others])
    shares = traces / traces.sum().clamp(min=torch.finfo(torch.float32).tiny)
    result = {
        "input_range": torch.stack([ranges[:, 0].min(), ranges[:, 1].max()]),
        "input_peak": torch.stack([own["input_peak"] for own in others]).amax(0),
        **_input_square(others, shares),
        **_histograms(others),
    }
    for name in ("output_square", "grad_square"):
        result[name] = torch.stack([own[name] for own in others]).sum(0) / total
    if all("input_rows" in own for own in others):
        result["input_rows"] = torch.cat([own["input_rows"] for own in others])
    for name in ("input_mean_square", "step_square", "token_step_square", "hessian"):
        if name not in others[0]:
            continue
        result[name] = sum(
            (own[name] * (seen / total) for own, seen in zip(others, positions, strict=True)),
            torch.zeros_like(others[0][name]),
        )
    return result


def _histograms(others: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The histograms of all inputs at once."""
    if not all("input_exponent" in own for own in others):
        return {}
    exponent = max(int(own["input_exponent"]) for own in others)
    result = {"input_exponent": torch.full_like(others[0]["input_exponent"], exponent)}
    for name in ("input_counts", "input_saliency"):
        whole = [Histogram(own[name], int(own["input_exponent"])) for own in others if name in own]
        for each in whole:
            each.widen(exponent)
        if whole:
            result[name] = torch.stack([each.sums for each in whole]).sum(0)
    return result


def _input_square(others: Sequence[Mapping[str, Tensor]], shares: Tensor) -> dict[str, Tensor]:
    """The mean of H by `shares`: as it is or, where that is smaller, as rows whose mean square it is."""
    if all("inputs" in own for own in others):
        rows = [own["inputs"] * (share / len(own["inputs"])).sqrt() for own, share in zip(others, shares, strict=True)]
        together = torch.cat(rows)
        if len(together) <= together.shape[1]:
            return {"inputs": together * len(together) ** 0.5}
        return {"input_square": together.t() @ together}
    return {
        "input_square": torch.stack([_square(own) * share for own, share in zip(others, shares, strict=True)]).sum(0)
    }


def _square(own: Mapping[str, Tensor]) -> Tensor:
    """H (in, in), however it is kept."""
    if "input_square" in own:
        return own["input_square"]
    return own["inputs"].t() @ own["inputs"] / len(own["inputs"])
