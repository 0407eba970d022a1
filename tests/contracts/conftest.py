"""The databases that the store is tested on: SQLite, and a real PostgreSQL that is started here."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
from pathlib import Path

import pytest
import sqlalchemy as sa

from autoq.store import Store

PASSWORD = "s3cret/word"


class Server:
    """A PostgreSQL server of our own on a free loopback port, without fsync: no power fails in a test."""

    def __init__(self, binaries: Path) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="autoq-pg-"))
        self.binaries = binaries
        self.user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if self.user:
            shutil.chown(self.folder, "postgres")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (self.folder / "password").write_text(PASSWORD)
        (self.folder / "password").chmod(0o644)
        self.schemas = 0
        try:
            self.run("initdb", "-U", "autoq", "-A", "scram-sha-256", f"--pwfile={self.folder}/password",
                     "-E", "UTF8", "--locale=C", "--no-sync")  # fmt: skip
            options = f"-p {self.port} -k {self.folder} -c listen_addresses=127.0.0.1 -c fsync=off"
            self.run("pg_ctl", "-w", "-l", f"{self.folder}/log", "-o", options, "start")
        except BaseException:
            shutil.rmtree(self.folder)
            raise

    def run(self, program: str, *arguments: str) -> None:
        command = [*self.user, str(self.binaries / program), "-D", f"{self.folder}/data", *arguments]
        done = subprocess.run(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout

    def fresh(self) -> str:
        """A new schema, which is what a new database is to those who only see it, and made in no time."""
        self.schemas += 1
        name = f"test_{self.schemas}"
        url = sa.URL.create("postgresql+psycopg", "autoq", PASSWORD, "127.0.0.1", self.port, "postgres")
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        with engine.begin() as connection:
            connection.execute(sa.text(f"CREATE SCHEMA {name}"))
        own = url.update_query_dict({"options": f"-c search_path={name}"})
        return own.render_as_string(hide_password=False)

    def stop(self) -> None:
        self.run("pg_ctl", "-m", "immediate", "stop")
        shutil.rmtree(self.folder)


@pytest.fixture(scope="session")
def server():
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    binaries = found[-1].parent if found else Path(on_path).parent if on_path else None
    if binaries is None:
        reason = "postgresql: no server binaries here; install the package `postgresql`"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    server = Server(binaries)
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
