"""Pruning by weights and activations: what adds least to a row's output becomes zero; the rest may be quantized.

Sun, Liu, Bair & Kolter, "A Simple and Effective Pruning Approach for Large Language Models" (2024): a weight is as
important as its product with the size of its input, compared within the row that makes one output,

    S_ij = |w_ij| ||x_j||_2

    ||x_j||  the norm of input j over the calibration tokens; its root mean square orders weights alike, and is the
             square root of the statistic `input_mean_square`

Nothing is trained, and the weights that stay do not move. Where we differ: Wanda prunes block after block, each
with the inputs that the pruned blocks before it make. Here every layer is one choice among others that the search
combines, so the inputs are those of the unquantized model. Where inputs were zero on all calibration tokens, the
weight's magnitude decides among their weights; Wanda's own code leaves that to their order. Storage and patterns
are in `_pruning`.
"""

from __future__ import annotations

from torch import Tensor

from autoq.methods import Statistics
from autoq.methods._inputs import InputMethod, needed
from autoq.methods._pruning import PruningMethod
from autoq.scheme import Sparse


class Wanda(PruningMethod, InputMethod):
    """The weights that matter most to each output on the calibration data stay."""

    def input_norms(self, scheme: Sparse, inputs: int, statistics: Statistics | None) -> Tensor:
        moments = needed(scheme, statistics, "input_mean_square", (inputs,))
        return moments.double().sqrt()
