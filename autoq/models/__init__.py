"""Models: their skeleton without weights, and the loaded thing with weights that can be swapped.

`inspect` reads no weights and no data; `load` gives a `LoadedModel`. Both refuse pickled checkpoints
and checkpoints that bring their own code. The names are resolved when they are first used, because
`autoq.models.demo` and `autoq.models.sources` must be reachable without importing torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from autoq.models.inspection import inspect
    from autoq.models.loaded import LoadedModel
    from autoq.models.loading import load

__all__ = ["LoadedModel", "inspect", "load"]

_HOMES = {"LoadedModel": "loaded", "inspect": "inspection", "load": "loading"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
