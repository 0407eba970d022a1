"""What tests of attacks share: how many inputs are tried, and a watch on what trying one does."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

CPU_SECONDS = 10.0  # that one input may take: a hang, not a slow machine


@pytest.fixture(scope="session")
def rounds() -> Callable[[int, int], int]:
    """`rounds(short, long)`: how many inputs to try, the second number with AUTOQ_FAULTS=long."""
    long = os.environ.get("AUTOQ_FAULTS", "short") == "long"
    return lambda few, many: many if long else few


class _Watch:
    """Notes files that are opened to be written, processes that are started, and connections that are made."""

    def __init__(self) -> None:
        self.on = False
        self.seen: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.on:
            return
        if event == "open":
            path, mode, flags = arguments
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) if isinstance(flags, int) else False
            if writes and "__pycache__" not in str(path):
                self.seen.append(f"open {path!r} {mode!r}")
        elif event in ("subprocess.Popen", "os.system", "os.exec", "os.fork", "socket.connect", "pickle.find_class"):
            self.seen.append(f"{event} {arguments!r:.200}")


@pytest.fixture(scope="session")
def _watch() -> _Watch:
    return _Watch()


@pytest.fixture
def harmless(_watch) -> Callable[[object], contextlib.AbstractContextManager[None]]:
    """`with harmless(shown): try it`: it takes no time to speak of, writes nothing, starts and asks nobody."""

    @contextlib.contextmanager
    def tried(shown: object) -> Iterator[None]:
        _watch.seen.clear()
        _watch.on = True
        began = time.thread_time()
        try:
            yield
        except BaseException as problem:
            _watch.on = False
            problem.add_note(f"the input: {shown!r:.3000}")
            raise
        finally:
            _watch.on = False
        assert time.thread_time() - began < CPU_SECONDS, f"{shown!r:.3000}"
        assert not _watch.seen, f"{_watch.seen[:3]} of {shown!r:.3000}"

    return tried


def _service() -> ModuleType:
    """The fixtures of the tests of the service."""
    path = Path(__file__).parents[1] / "service" / "conftest.py"
    found = importlib.util.spec_from_file_location("service_fixtures", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["service_fixtures"] = module
    found.loader.exec_module(module)
    return module


service = _service()
template, store, server, open_server, serve, in_loop = (
    getattr(service, name) for name in ("template", "store", "server", "open_server", "serve", "in_loop")
)
