"""A text or an image and its class, for classifiers; the answer is the number of the class that the model finds.

A label is the class's name in the model's configuration or its number. Texts are cut at what the model reads; images
are what `autoq.calibration.images` makes of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autoq.errors import DataRefused, NotFinite
from autoq.layer import ModelInfo
from autoq.models import LoadedModel
from autoq.tasks import Examples, Row, Source, TaskKind
from autoq.tasks._batches import batches

_IMAGE_COLUMNS: Mapping[str, str] = {"image": "the image", "label": "its class"}


class Labels(TaskKind):
    """Classification of texts, or of images where the model reads these."""

    columns = {"text": "the text", "label": "its class"}  # noqa: RUF012 - ClassVar in the base
    models = frozenset({"classification"})

    def read(self, source: Source, info: ModelInfo) -> Examples:
        """See `TaskKind.read`."""
        if info.images is None:
            return super().read(source, info)
        from autoq.tasks.data import read_images

        return read_images(source, _IMAGE_COLUMNS, info, self.check)

    def check(self, row: Row, info: ModelInfo) -> Row:
        """The label as the number of a class."""
        label = _class(row["label"], info.labels)
        if info.images is not None:
            return {**row, "label": label}
        if not isinstance(row["text"], str) or not row["text"].strip():
            raise ValueError(f"text must be text that is not empty (got {str(row['text'])[:80]!r})")
        return {"text": row["text"], "label": label}

    def prepare(self, model: LoadedModel, rows: Sequence[Row], source: Source) -> list[Tensor]:
        """Token ids (tokens,) of each text, or pixel values (channels, height, width) of each image."""
        if model.info.images is not None:
            from autoq.calibration import images

            found = []
            for row in rows:
                try:
                    found.append(images.pixels(model.tokenizer, row["image"], model.info.images))
                except ValueError as problem:
                    raise DataRefused(f"{source.field}: {source.spec.source!r}, {row['place']}: {problem}") from None
            return found
        limit = model.info.max_positions
        cut = {} if limit is None else {"truncation": True, "max_length": limit}
        ids: list[list[int]] = model.tokenizer([row["text"] for row in rows], **cut)["input_ids"]
        return [torch.tensor(each) for each in ids]

    def answers(self, model: LoadedModel, prepared: Any) -> list[Any]:
        """The number of the most likely class of each text or image."""
        found = [0] * len(prepared)
        for places in batches([len(each) for each in prepared]):
            inputs = torch.stack([prepared[place] for place in places]).to(model.device)
            logits = model.outputs(inputs)[:, 0].float()
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
