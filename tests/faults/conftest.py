"""What fault tests share: how often each fault is injected."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest


@pytest.fixture(scope="session")
def rounds() -> Callable[[int, int], int]:
    """`rounds(short, long)`: how often to inject a fault, the second number with AUTOQ_FAULTS=long."""
    long = os.environ.get("AUTOQ_FAULTS", "short") == "long"
    return lambda few, many: many if long else few
