"""Tokens of the study's own text that are hidden from a masked language model; the answer is whether it finds them.

Of each window `SHARE` of the tokens that are no special ones, rounded to a whole number and at least one, are
replaced by the tokenizer's mask token, all at once, as Devlin et al. 2019 (BERT) train; none are replaced by other
tokens or left as they are, which is for training only. Which ones is drawn with the window's number as seed, beside
`data.seed`: the same for every assignment. A window is one example, so errors are those of independent windows and
not of tokens, which share a context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoq.errors import DataRefused, NotFinite, SpecError
from autoq.layer import ModelInfo
from autoq.models import LoadedModel
from autoq.spec import DataSpec, StudySpec, TaskSpec
from autoq.tasks import Examples, Row, Source, TaskKind

SHARE = 0.15


@dataclass(frozen=True)
class _Text(Source):
    """The study's own text as a task."""

    data: DataSpec

    @property
    def field(self) -> str:
        """Where it stands in the study's spec."""
        return "data"


class HiddenTokens(TaskKind):
    """Masked tokens of the study's own text."""

    columns = {}  # noqa: RUF012 - ClassVar in the base; the text needs no columns
    models = frozenset({"masked"})

    def source(self, task: str | None, spec: StudySpec) -> Source:
        """The text of the study, which is no task of its `tasks`."""
        if task is not None:
            raise SpecError("it is measured on the study's text (data.source): leave out the task behind the colon")
        return _Text("text", TaskSpec(source=spec.data.source), spec.data.seed, spec.data)

    def read(self, source: Source, info: ModelInfo) -> Examples:
        """A row for each window that the text is cut into."""
        assert isinstance(source, _Text)
        data = source.data
        window = data.window_tokens if info.max_positions is None else min(data.window_tokens, info.max_positions)
        counts = {part: max(1, getattr(data, f"{part}_tokens") // window) for part in ("search", "report")}
        rows = {part: [{"part": part, "window": i} for i in range(count)] for part, count in counts.items()}
        return Examples(rows["search"], rows["report"])

    def check(self, row: Row, info: ModelInfo) -> Row:
        """Rows are made here and are right."""
        return row

    def prepare(self, model: LoadedModel, rows: Sequence[Row], source: Source) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Of each window its ids with tokens hidden (tokens,), their places (n,), and what was there (n,)."""
        from autoq.calibration.text import windows

        assert isinstance(source, _Text)
        hidden = model.tokenizer.mask_token_id
        if hidden is None:
            raise DataRefused(
                f"{source.field}: the model's tokenizer has no mask token, so no token can be hidden from it"
            )
        parts = windows(source.data, model.tokenizer, model.info.max_positions)
        special = torch.tensor(sorted(set(model.tokenizer.all_special_ids)))
        prepared = []
        for row in rows:
            ids = getattr(parts, row["part"])[row["window"]]
            free = (~torch.isin(ids, special)).nonzero()[:, 0]
            if not len(free):
                raise DataRefused(f"{source.field}: a window of {len(ids)} tokens has none that is no special token")
            seed = (source.seed, ("search", "report").index(row["part"]), row["window"])
            count = max(1, round(SHARE * len(free)))
            drawn = np.random.default_rng(seed).choice(len(free), count, replace=False)
            places = free[torch.from_numpy(np.sort(drawn))]
            prepared.append((ids.index_fill(0, places, hidden), places, ids[places]))
        return prepared

    def answers(self, model: LoadedModel, prepared: Any) -> list[Any]:
        """The share of a window's hidden tokens that the model ranks first."""
        found = []
        for ids, places, true in prepared:
            logits = model.outputs(ids.unsqueeze(0).to(model.device))[0, places.to(model.device)].float()
            if not torch.isfinite(logits).all():
                raise NotFinite("the model's outputs are NaN or infinite under this assignment")
            found.append(float((logits.argmax(-1).cpu() == true).double().mean()))
        return found
