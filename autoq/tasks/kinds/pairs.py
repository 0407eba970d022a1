"""Two texts and how alike they are by human judgement, for text encoders; the answer is the cosine of the two.

The cosine is that of mean-pooled final hidden states, as in the STS tasks (Cer et al. 2017) with sentence encoders
(Reimers & Gurevych 2019). Texts are cut at what the model reads.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from autoq.layer import ModelInfo
from autoq.models import LoadedModel
from autoq.tasks import Row, Source, TaskKind
from autoq.tasks._embeddings import embedded, tokenized


class Pairs(TaskKind):
    """Similarity of pairs of texts."""

    columns = {  # noqa: RUF012 - ClassVar in the base
        "first": "a text",
        "second": "another text",
        "score": "how alike they are, a number, more for more alike",
    }
    models = frozenset({"encoder"})

    def check(self, row: Row, info: ModelInfo) -> Row:
        """Texts that are not empty, and the score as a number."""
        for name in ("first", "second"):
            if not isinstance(row[name], str) or not row[name].strip():
                raise ValueError(f"{name} must be text that is not empty (got {str(row[name])[:80]!r})")
        return {"first": row["first"], "second": row["second"], "score": _number(row["score"])}

    def prepare(self, model: LoadedModel, rows: Sequence[Row], source: Source) -> list[list[int]]:
        """Token ids of the first and second text of each row, in turn."""
        return tokenized(model, [row[name] for row in rows for name in ("first", "second")])

    def answers(self, model: LoadedModel, prepared: Any) -> list[Any]:
        """The cosine of each pair."""
        vectors = embedded(model, prepared)
        cosines: list[float] = (vectors[0::2] * vectors[1::2]).sum(1).tolist()
        return cosines


def _number(value: object) -> float:
    try:
        number = float(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else math.nan
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"score must be a number (got {str(value)[:80]!r})")
    return number
