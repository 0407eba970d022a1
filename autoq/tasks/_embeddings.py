"""Texts as vectors: mean-pooled final hidden states of unit length (Reimers & Gurevych 2019)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 - the field's own abbreviation
from torch import Tensor

from autoq.errors import NotFinite
from autoq.models import LoadedModel
from autoq.tasks._batches import batches


def tokenized(model: LoadedModel, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, cut at what the model reads."""
    limit = model.info.max_positions
    cut = {} if limit is None else {"truncation": True, "max_length": limit}
    ids: list[list[int]] = model.tokenizer(list(texts), **cut)["input_ids"]
    return ids


def embedded(model: LoadedModel, ids: Sequence[Sequence[int]]) -> Tensor:
    """Unit vectors (texts, width) float32. Raises `NotFinite`."""
    vectors = [torch.empty(0)] * len(ids)
    for places in batches([len(each) for each in ids]):
        states = model.outputs(torch.tensor([list(ids[place]) for place in places], device=model.device)).float()
        if not torch.isfinite(states).all():
            raise NotFinite("the model's outputs are NaN or infinite under this assignment")
        for place, vector in zip(places, F.normalize(states.mean(1), dim=-1), strict=True):
            vectors[place] = vector
    return torch.stack(vectors)
