"""A query and its candidate documents, for text encoders; the answer is each document's similarity to the query.

The similarity is the cosine of mean-pooled final hidden states, as sentence encoders are used (Reimers & Gurevych
2019). `relevance` grades each document, 0 for none. Texts are cut at what the model reads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from autoq.layer import ModelInfo
from autoq.models import LoadedModel
from autoq.tasks import Row, Source, TaskKind
from autoq.tasks._embeddings import embedded, tokenized


class Ranking(TaskKind):
    """Retrieval among given documents."""

    columns = {  # noqa: RUF012 - ClassVar in the base
        "query": "what is looked for",
        "documents": "a list of texts",
        "relevance": "a list of grades, one per document",
    }
    models = frozenset({"encoder"})

    def check(self, row: Row, info: ModelInfo) -> Row:
        """Grades as numbers."""
        query, documents, relevance = row["query"], row["documents"], row["relevance"]
        if not isinstance(query, str) or not query.strip():
            raise ValueError(f"query must be text that is not empty (got {str(query)[:80]!r})")
        if not isinstance(documents, list) or len(documents) < 2 or not all(_is_text(each) for each in documents):
            raise ValueError(f"documents must be a list of two texts or more (got {str(documents)[:80]!r})")
        grades = relevance if isinstance(relevance, list) else []
        if len(grades) != len(documents) or not all(_is_grade(each) for each in grades) or not any(grades):
            raise ValueError(
                f"relevance must be a grade from 0 to 100 for each of {len(documents)} documents, and one of them "
                f"above 0 (got {str(relevance)[:80]!r})"
            )
        return {"query": query, "documents": documents, "relevance": [float(grade) for grade in grades]}

    def prepare(self, model: LoadedModel, rows: Sequence[Row], source: Source) -> tuple[list[list[int]], list[int]]:
        """Token ids of every query and its documents behind it, and how many texts each row has."""
        texts = [text for row in rows for text in (row["query"], *row["documents"])]
        return tokenized(model, texts), [1 + len(row["documents"]) for row in rows]

    def answers(self, model: LoadedModel, prepared: Any) -> list[Any]:
        """The cosines of each row's documents."""
        ids, counts = prepared
        vectors = embedded(model, ids)
        found, start = [], 0
        for count in counts:
            own = vectors[start : start + count]
            found.append((own[1:] @ own[0]).tolist())
            start += count
        return found


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_grade(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 100
