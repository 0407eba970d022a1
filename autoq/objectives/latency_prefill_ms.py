"""Milliseconds to read the prompt (or to encode the input), at the spec's batch and prompt length.

For a model of images: one pass over a batch of them, each as long as the model makes it.
"""

from __future__ import annotations

from autoq.objectives import LatencyObjective


class LatencyPrefill(LatencyObjective):
    """Time of one forward pass over the prompt."""
