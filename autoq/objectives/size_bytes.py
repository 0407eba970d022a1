"""Bytes of the checkpoint's tensors: codes, scales, zero points, codebooks, and all that is kept.

Embeddings, head, norms, biases and stored buffers are included; a tied weight counts once.
"""

from __future__ import annotations

from autoq.assignment import Assignment
from autoq.layer import ModelInfo
from autoq.objectives import TableObjective
from autoq.scheme import Keep
from autoq.spec import TargetSpec


class SizeBytes(TableObjective):
    """Every byte that ships."""

    unit = "bytes"

    def compute(self, info: ModelInfo, assignment: Assignment, workload: TargetSpec) -> float:
        """Bytes under `assignment`."""
        kept = Keep()
        return float(info.other_bytes + sum(layer.nbytes(assignment.get(layer.name, kept)) for layer in info.layers))
