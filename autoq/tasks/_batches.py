"""Sequences of equal length in batches: nothing is padded, so no answer depends on what it was batched with."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Sequence

BATCH = 32


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The places of sequences, those of one length together, at most `BATCH` at a time."""
    places: dict[int, list[int]] = collections.defaultdict(list)
    for place, length in enumerate(lengths):
        places[length].append(place)
    for _, together in sorted(places.items()):
        yield from (together[start : start + BATCH] for start in range(0, len(together), BATCH))
