"""A text and its class, for sequence classifiers; the answer is the number of the class that the model finds.

A label is the class's name in the model's configuration or its number. Texts are cut at what the model reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autoq.errors import NotFinite
from autoq.layer import ModelInfo
from autoq.models import LoadedModel
from autoq.tasks import Row, Source, TaskKind
from autoq.tasks._batches import batches


class Labels(TaskKind):
    """Classification of texts."""

    columns = {"text": "the text", "label": "its class"}  # noqa: RUF012 - ClassVar in the base
    models = frozenset({"classification"})

    def check(self, row: Row, info: ModelInfo) -> Row:
        """The label as the number of a class."""
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise ValueError(f"text must be text that is not empty (got {str(row['text'])[:80]!r})")
        return {"text": row["text"], "label": _class(row["label"], info.labels)}

    def prepare(self, model: LoadedModel, rows: Sequence[Row], source: Source) -> list[list[int]]:
        """Token ids of each text."""
        limit = model.info.max_positions
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        ids: list[list[int]] = model.tokenizer([row["text"] for row in rows], **cut)["input_ids"]
        return ids

    def answers(self, model: LoadedModel, prepared: Any) -> list[Any]:
        """The number of the most likely class of each text."""
        found = [0] * len(prepared)
        for places in batches([len(ids) for ids in prepared]):
            ids = torch.tensor([prepared[place] for place in places], device=model.device)
            logits = model.outputs(ids)[:, 0].float()
            if not torch.isfinite(logits).all():
                raise NotFinite("the model's outputs are NaN or infinite under this assignment")
            for place, best in zip(places, logits.argmax(-1).tolist(), strict=True):
                found[place] = best
        return found


def _class(label: object, names: Sequence[str]) -> int:
    if isinstance(label, str) and label in names:
        return names.index(label)
    number = int(label) if isinstance(label, str) and label.strip().isdecimal() else label
    if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < len(names):
        return number
    raise ValueError(
        f"label {str(label)[:80]!r} is no class of the model; choose from {', '.join(names)} or 0 to {len(names) - 1}"
    )
