"""Milliseconds for one more token, with the prompt in the cache, at the spec's batch size."""

from __future__ import annotations

from autoq.objectives import LatencyObjective


class LatencyDecode(LatencyObjective):
    """Time of one decode step."""

    tasks = frozenset({"causal", "seq2seq"})
