"""The folder is the registry: `autoq/methods/gptq.py` is the method `gptq`.

A plugin file defines exactly one concrete subclass of its folder's base class; names come from a
listing of the folder, so asking for them imports nothing heavy.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from autoq.errors import UnknownName

Folder = Literal["methods", "targets", "objectives", "search.samplers", "calibration.observers", "tasks.kinds"]
P = TypeVar("P")


@functools.cache
def names(folder: Folder) -> tuple[str, ...]:
    """The plugins of a folder, sorted, by listing the folder. Imports no plugin."""
    package = importlib.util.find_spec(f"autoq.{folder}")
    assert package is not None and package.submodule_search_locations is not None, folder
    found = pkgutil.iter_modules(package.submodule_search_locations)
    return tuple(sorted(module.name for module in found if not module.name.startswith("_")))


def load(folder: Folder, name: str, base: Callable[..., P]) -> P:
    """An instance of the plugin `name`, which must be the one concrete subclass of `base` in its file.

    `base` is the folder's abstract class (typed as a callable, for a type checker takes `type[P]` to mean
    one that can be instantiated). Raises `UnknownName` with the choices.
    """
    if name not in names(folder):
        raise UnknownName(folder.rsplit(".", 1)[-1].removesuffix("s"), name, names(folder))
    if (folder, name) not in _loaded:
        assert isinstance(base, type), base
        _loaded[folder, name] = _instance(folder, name, base)
    plugin: P = _loaded[folder, name]
    return plugin


_loaded: dict[tuple[str, str], Any] = {}
_DOCSTRING = re.compile(r'\A(?:\s|#[^\n]*\n)*"""(.+?)"""', re.DOTALL)


def _instance(folder: Folder, name: str, base: type) -> Any:
    module = importlib.import_module(f"autoq.{folder}.{name}")
    own = [
        value
        for value in vars(module).values()
        if inspect.isclass(value)
        and issubclass(value, base)
        and value.__module__ == module.__name__
        and not inspect.isabstract(value)
        and not value.__name__.startswith("_")
    ]
    assert len(own) == 1, f"{module.__name__} must define one {base.__name__}, found {len(own)}"
    return own[0]()


@functools.cache
def summary(folder: Folder, name: str) -> str:
    """The first line of a plugin file's docstring, read without importing it."""
    found = importlib.util.find_spec(f"autoq.{folder}")
    assert found is not None and found.submodule_search_locations is not None, folder
    source = Path(next(iter(found.submodule_search_locations)), f"{name}.py").read_text(encoding="utf-8")
    # Not by `ast`: in Python 3.11 two threads that parse at once end each other's (SystemError), and a server has many.
    text = _DOCSTRING.match(source)
    return text[1].strip().partition("\n")[0] if text else ""
