"""A source and the text that it should become, for models that generate; the answer is what they say.

Decoding is greedy: of every step's tokens the most likely one, until the model ends the text or after
`new_tokens`. So an answer depends on the weights alone. A causal model goes on from the source, which is its
prompt; a sequence-to-sequence model encodes it. What the model's own generation settings force (BART's first
token) stays, what they sample or search does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers

from autoq.errors import DataRefused
from autoq.layer import ModelInfo
from autoq.models import LoadedModel
from autoq.models.quiet import quiet
from autoq.tasks import Row, Source, TaskKind
from autoq.tasks._batches import batches

_KEPT = ("bos_token_id", "decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens")


class Text(TaskKind):
    """Text from text."""

    columns = {"source": "the text to start from", "target": "the text wanted"}  # noqa: RUF012 - ClassVar in the base
    models = frozenset({"causal", "seq2seq"})

    def check(self, row: Row, info: ModelInfo) -> Row:
        """Both as text."""
        for name in self.columns:
            if not isinstance(row[name], str) or not row[name].strip():
                raise ValueError(f"{name} must be text that is not empty (got {str(row[name])[:80]!r})")
        return row

    def prepare(self, model: LoadedModel, rows: Sequence[Row], source: Source) -> tuple[list[list[int]], Any]:
        """Token ids of each source, and the settings of generation."""
        ids: list[list[int]] = model.tokenizer([row["source"] for row in rows])["input_ids"]
        return checked(model, ids, source.spec.new_tokens, source.field), settings(model, source.spec.new_tokens)

    def answers(self, model: LoadedModel, prepared: Any) -> list[Any]:
        """What the model says to each source."""
        return generate(model, *prepared)


def checked(model: LoadedModel, ids: list[list[int]], new_tokens: int, field: str) -> list[list[int]]:
    """The token ids, if there is room for them and for what is generated. Raises `DataRefused`."""
    limit, longest = model.info.max_positions, max(map(len, ids))
    needed = longest + new_tokens if model.info.task == "causal" else max(longest, new_tokens)
    if limit is not None and needed > limit:
        raise DataRefused(
            f"{field}: sources of up to {longest} tokens and new_tokens {new_tokens} need {needed} positions, and the "
            f"model has {limit}"
        )
    return ids


def settings(model: LoadedModel, new_tokens: int) -> Any:
    """Greedy decoding of at most `new_tokens`, with the tokens that the model's own settings name."""
    own: Any = model.model.generation_config
    end = own.eos_token_id if own.eos_token_id is not None else model.tokenizer.eos_token_id
    pad = own.pad_token_id if own.pad_token_id is not None else model.tokenizer.pad_token_id
    if pad is None:  # what stands behind the end is cut off: any token will do
        pad = end[0] if isinstance(end, list) else end
    kept = {name: getattr(own, name, None) for name in _KEPT}
    return transformers.GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=new_tokens, eos_token_id=end, pad_token_id=pad, **kept
    )


def generate(model: LoadedModel, sources: Sequence[Sequence[int]], how: Any) -> list[str]:
    """The text that the model generates for each of `sources`, token ids, which sources of one length do together."""
    texts = [""] * len(sources)
    for places in batches([len(ids) for ids in sources]):
        ids = torch.tensor([list(sources[place]) for place in places], device=model.device)
        with quiet():
            module: Any = model.model
            found = module.generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=how)
        fresh = found[:, ids.shape[1] :] if model.info.task == "causal" else found
        for place, tokens in zip(places, fresh, strict=True):
            texts[place] = model.tokenizer.decode(tokens, skip_special_tokens=True).strip()
    return texts
