"""AutoQ: per-layer mixed-precision quantization search, measured on the runtime you deploy to.

study = autoq.search("demo")        # run a study
table = autoq.sensitivity("demo")   # predict what each layer loses, without a search
study = autoq.open("demo")          # find one that ran
model, tokenizer = autoq.load(DIR)  # run what `autoq export` wrote for torch-cpu
"""

import importlib
import sys
import types
from typing import Any

__version__ = "0.1.0"
__all__ = ["Study", "load", "open", "search", "sensitivity"]


class _CallableModule(types.ModuleType):
    """The package `autoq.search`, which is also the function of that name."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return importlib.import_module("autoq.study").search(*args, **kwargs)


# Importing a submodule binds its name here, so `autoq.search` could not be a function for long.
search = importlib.import_module("autoq.search")
sys.modules["autoq.search"].__class__ = _CallableModule


def __getattr__(name: str) -> Any:
    if name == "open":
        return importlib.import_module("autoq.study").open_study
    if name == "load":
        return importlib.import_module("autoq.study").load_export
    if name in ("Study", "sensitivity"):
        return getattr(importlib.import_module("autoq.study"), name)
    raise AttributeError(f"module 'autoq' has no attribute {name!r}")
