"""The databases that the store is tested on: SQLite, and a real PostgreSQL that is started here."""

from __future__ import annotations

from types import ModuleType

import pytest

from autoq.store import Store


@pytest.fixture(scope="session")
def server(postgresql: ModuleType):
    server = postgresql.Server(postgresql.binaries())
    yield server
    server.stop()


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request, tmp_path):
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/autoq.db"
    return request.getfixturevalue("server").fresh()


@pytest.fixture
def store(url):
    with Store.open(url) as store:
        yield store
