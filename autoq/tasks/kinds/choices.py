"""A prompt and its possible continuations, for causal models; the answer is each one's log-likelihood.

A choice follows the prompt as it is written: write the space before a word into the choice. `answer` is the
number of the right one, from 0, or its text. The log-likelihood (nats) is that of all of its tokens given the
prompt, as zero-shot evaluations have it (Brown et al. 2020, section 2.4, without normalization). Prompts too
long for the model lose their beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from autoq.errors import DataRefused, NotFinite
from autoq.layer import ModelInfo
from autoq.models import LoadedModel
from autoq.tasks import Row, Source, TaskKind
from autoq.tasks._batches import batches


class Choices(TaskKind):
    """Multiple choice by log-likelihood."""

    columns = {  # noqa: RUF012 - ClassVar in the base
        "prompt": "what comes before",
        "choices": "a list of texts",
        "answer": "the right one or its number",
    }
    models = frozenset({"causal"})

    def check(self, row: Row, info: ModelInfo) -> Row:
        """The answer as a number."""
        prompt, choices, answer = row["prompt"], row["choices"], row["answer"]
        if not isinstance(prompt, str):
            raise ValueError(f"prompt must be text (got {str(prompt)[:80]!r})")
        whole = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
        if not whole or len(set(choices)) < 2 or len(set(choices)) != len(choices):
            raise ValueError(f"choices must be a list of two different texts or more (got {str(choices)[:80]!r})")
        if isinstance(answer, str) and answer in choices:
            answer = choices.index(answer)
        if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(choices):
            raise ValueError(f"answer must be 0 to {len(choices) - 1} or one of the choices (got {str(answer)[:80]!r})")
        return {"prompt": prompt, "choices": choices, "answer": answer}

    def prepare(self, model: LoadedModel, rows: Sequence[Row], source: Source) -> list[list[tuple[list[int], int]]]:
        """Of each row's choices the token ids with the prompt before them, and how many of them are the choice's."""
        limit = model.info.max_positions
        made = []
        for row in rows:
            own = []
            for choice in row["choices"]:
                ids, count = continuation(model, row["prompt"], choice)
                if count < 1 or (limit is not None and count >= limit):
                    raise DataRefused(
                        f"{source.field}: choice {choice[:80]!r} is {count} tokens of its own; there must be one or "
                        f"more, and fewer than the model reads ({limit})"
                    )
                own.append((ids[-(limit or 0) :], count))
            made.append(own)
        return made

    def answers(self, model: LoadedModel, prepared: Any) -> list[Any]:
        """The log-likelihoods of each row's choices."""
        flat = [(place, *each) for place, own in enumerate(prepared) for each in own]
        found = log_likelihoods(model, [(ids, count) for _, ids, count in flat])
        answers: list[list[float]] = [[] for _ in prepared]
        for (place, _, _), (value, _) in zip(flat, found, strict=True):
            answers[place].append(value)
        return answers


def continuation(model: LoadedModel, prompt: str, text: str) -> tuple[list[int], int]:
    """Token ids of a prompt with `text` behind it, and how many of them are the text's.

    Both are tokenized together, as a word's tokens depend on what stands before it.
    """
    if not prompt:
        ids: list[int] = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [first_token(model), *ids], len(ids)
    before: list[int] = model.tokenizer(prompt)["input_ids"]
    whole: list[int] = model.tokenizer(prompt + text)["input_ids"]
    return whole, len(whole) - len(before)


def first_token(model: LoadedModel) -> int:
    """What stands before a text that has nothing before it."""
    tokenizer = model.tokenizer
    return int(next((t for t in (tokenizer.bos_token_id, tokenizer.eos_token_id) if t is not None), 0))


def log_likelihoods(model: LoadedModel, sequences: Sequence[tuple[list[int], int]]) -> list[tuple[float, bool]]:
    """Of each sequence's last so many tokens: their log-likelihood in nats, and whether all are greedy choices."""
    found = [(0.0, False)] * len(sequences)
    for places in batches([len(ids) for ids, _ in sequences]):
        ids = torch.tensor([sequences[place][0] for place in places], device=model.device)
        logits = model.outputs(ids)
        for row, place in enumerate(places):
            count = sequences[place][1]
            target = ids[row, len(ids[row]) - count :]
            logs = logits[row, -count - 1 : -1].float().log_softmax(-1)
            if not torch.isfinite(logs).all():
                raise NotFinite("the model's outputs are NaN or infinite under this assignment")
            total = float(logs.gather(-1, target.unsqueeze(-1)).double().sum())
            found[place] = total, bool((logs.argmax(-1) == target).all())
    return found
