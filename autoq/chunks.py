"""Outputs of a window, chunk by chunk, as token objectives see them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from autoq.errors import NotFinite
from autoq.models import LoadedModel
from autoq.objectives import TokenChunk, TokenObjective
from autoq.reference import Reference, row_blocks


def chunks(
    model: LoadedModel, window: Tensor, output: Tensor, reference: Reference, index: int
) -> Iterator[tuple[slice, TokenChunk]]:
    """Rows and chunk of `output` (tokens, v) under the window (tokens,), number `index` of the reference.

    Raises `NotFinite` where outputs are NaN or infinite.
    """
    next_tokens = model.next_tokens(window).to(output.device)
    for rows in row_blocks(output):
        values = output[rows].float()
        normalizer = None if model.info.task == "encoder" else values.logsumexp(-1)
        if not torch.isfinite(values if normalizer is None else normalizer).all():
            raise NotFinite("the model's outputs are NaN or infinite under this assignment")
        kept, mass, entropy = reference.rows(index, rows)
        top = None if reference.top is None else reference.top[index, rows]
        yield rows, TokenChunk(values, next_tokens[rows], kept, normalizer, mass, entropy, top)


def mean_loss(
    model: LoadedModel, objective: TokenObjective, reference: Reference, first: int, ids: Tensor, outputs: Tensor
) -> Tensor:
    """The mean of an objective over `ids` (windows, tokens), as a scalar through which gradients flow.

    They are the windows of the reference from number `first` on.
    """
    total = outputs.new_zeros((), dtype=torch.float32)
    for index, output in enumerate(outputs):
        for _, chunk in chunks(model, ids[index], output, reference, first + index):
            # The reference was made in inference mode, where autograd may not look.
            mass, entropy = (None if t is None else t.clone() for t in (chunk.reference_mass, chunk.reference_entropy))
            usable = replace(chunk, reference=chunk.reference.clone(), reference_mass=mass, reference_entropy=entropy)
            total = total + objective.per_token(usable).nansum()
    return total / (len(ids) * model.positions(model.length(ids)))
