"""Models: their skeleton without weights, and the loaded thing with weights that can be swapped.

`inspect` needs no weights and no forward pass on real data; `load` gives a `LoadedModel`. Both refuse
pickled checkpoints and checkpoints that bring their own code.
"""

from __future__ import annotations

from autoq.models.inspection import inspect
from autoq.models.loading import load
from autoq.models.loaded import LoadedModel

__all__ = ["LoadedModel", "inspect", "load"]
