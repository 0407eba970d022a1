"""Average bits per weight of the layers that are quantized or could be: scales and zero points included.

Layers that the assignment keeps count with their own width. Embeddings count only where the
assignment quantizes them, as is the field's custom for this figure; `size_bytes` hides nothing.
"""

from __future__ import annotations

from autoq.assignment import Assignment
from autoq.layer import ModelInfo
from autoq.objectives import TableObjective
from autoq.scheme import Keep
from autoq.spec import TargetSpec


class BitsPerWeight(TableObjective):
    """True bits per weight, everything that ships for the layer included."""

    unit = "bits/weight"

    def compute(self, info: ModelInfo, assignment: Assignment, workload: TargetSpec) -> float:
        """Bits under `assignment`; 0 for a model without layers."""
        kept = Keep()
        layers = [
            layer
            for layer in info.layers
            if layer.kind in ("linear", "conv1d") or assignment.get(layer.name, kept) != kept
        ]
        weights = sum(layer.parameters for layer in layers)
        return 8 * sum(layer.nbytes(assignment.get(layer.name, kept)) for layer in layers) / max(weights, 1)
