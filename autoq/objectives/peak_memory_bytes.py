"""Bytes of weights and of the KV cache that serving the target's workload holds at once; computed, not measured.

Counted are every byte that ships (as `size_bytes` does: codes, scales, zero points, embeddings, norms, stored buffers),
once, and the KV caches of `target.batch_size` sequences of `target.prompt_tokens` tokens each, as the assignment keeps
them: codes, scales and zeros, and keys whose group is not whole. With a sliding window only what is still seen counts.

Not counted: activations (hidden states, scores, logits), which depend on how a runtime splits its work; tokens that are
generated after the prompt; pages and padding of an allocator, what a runtime unpacks or copies for its kernels, and
the runtime itself. So it ranks assignments exactly and is a lower bound of what a process holds.
"""

from __future__ import annotations

from autoq.assignment import Assignment
from autoq.layer import ModelInfo
from autoq.objectives import TableObjective
from autoq.scheme import Keep
from autoq.spec import TargetSpec


class PeakMemoryBytes(TableObjective):
    """Weights as they ship, and the caches of a full prompt."""

    unit = "bytes"

    def refuses(self, info: ModelInfo) -> str | None:
        """A model whose caches are not known, or None."""
        return None if info.caches else f"it counts KV caches, and of {info.architecture} none are known"

    def compute(self, info: ModelInfo, assignment: Assignment, workload: TargetSpec) -> float:
        """Bytes under `assignment`."""
        kept, tokens = Keep(), workload.prompt_tokens
        weights = info.other_bytes + sum(layer.nbytes(assignment.get(layer.name, kept)) for layer in info.layers)
        caches = sum(cache.nbytes(assignment.caches.get(cache.name, kept), tokens) for cache in info.caches)
        return float(weights + workload.batch_size * caches)
