"""Magnitude pruning: the weights closest to zero become zero; the rest may be quantized.

Han, Pool, Tran & Dally, "Learning both Weights and Connections for Efficient Neural Networks" (2015): a weight is
as important as it is large,

    S_ij = |w_ij|

Where we differ: Han et al. take one threshold for a layer and train on after pruning. Here weights are compared
within a row, as wanda compares them, so that every row keeps the same number and sizes follow from shapes; and
nothing is trained. Storage and patterns are in `_pruning`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from autoq.methods import Statistics
from autoq.methods._pruning import PruningMethod
from autoq.scheme import Sparse


class Magnitude(PruningMethod):
    """The largest weights of each row stay."""

    def input_norms(self, scheme: Sparse, inputs: int, statistics: Statistics | None) -> Tensor:
        return torch.ones(inputs, dtype=torch.float64)
