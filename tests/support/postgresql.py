"""A PostgreSQL server of our own, to be started, stopped and killed by tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

PASSWORD = "s3cret/word"


def binaries() -> Path:
    """The folder of the server's programs. Skips the test where there are none, which is a failure in CI."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    on_path = shutil.which("initdb")
    folder = found[-1].parent if found else Path(on_path).parent if on_path else None
    if folder is None:
        reason = "postgresql: no server binaries here; install the package `postgresql`"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


class Server:
    """A PostgreSQL server of our own on a free loopback port, without fsync: no power fails in a test.

    With a `Network` it runs there, and is reached from here. A `durable` one waits for its disk, as all do by default.
    """

    def __init__(self, binaries: Path, network: Any = None, durable: bool = False) -> None:
        self.host = "127.0.0.1" if network is None else network.there
        self.folder = Path(tempfile.mkdtemp(prefix="autoq-pg-"))
        self.binaries = binaries
        self.user = ["runuser", "-u", "postgres", "--"] if os.geteuid() == 0 else []
        if network is not None:
            self.user = [*network.inside, *self.user]
        if os.geteuid() == 0:
            shutil.chown(self.folder, "postgres")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        (self.folder / "password").write_text(PASSWORD)
        (self.folder / "password").chmod(0o644)
        self.schemas = 0
        self.options = f"-p {self.port} -k {self.folder} -c listen_addresses={self.host}"
        self.options += "" if durable else " -c fsync=off"
        try:
            self.run("initdb", "-U", "autoq", "-A", "scram-sha-256", f"--pwfile={self.folder}/password",
                     "-E", "UTF8", "--locale=C", "--no-sync")  # fmt: skip
            if network is not None:
                with (self.folder / "data" / "pg_hba.conf").open("a") as rules:
                    rules.write(f"host all all {network.here}/32 scram-sha-256\n")
            self.start()
        except BaseException:
            shutil.rmtree(self.folder)
            raise

    def run(self, program: str, *arguments: str) -> None:
        command = [*self.user, str(self.binaries / program), "-D", f"{self.folder}/data", *arguments]
        done = subprocess.run(command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        assert done.returncode == 0, done.stdout

    def start(self) -> None:
        """Start it, also where what a kill left behind has not ended yet."""
        until = time.monotonic() + 60
        while True:
            try:
                return self.run("pg_ctl", "-w", "-l", f"{self.folder}/log", "-o", self.options, "start")
            except AssertionError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    def halt(self, mode: str) -> None:
        """Stop it: `fast` ends what runs, `immediate` is a crash that it has to recover from."""
        try:
            self.run("pg_ctl", "-w", "-t", "20", "-m", mode, "stop")
        except AssertionError:
            # A fast stop while it has just recovered from a crash may never end: all backends are gone, and its
            # checkpointer sleeps because nobody tells it (seen with 15.18).
            if mode != "fast":
                raise
            self.run("pg_ctl", "-w", "-m", "immediate", "stop")

    def kill(self) -> None:
        """SIGKILL to the postmaster; its children end when they notice."""
        os.kill(self.pid(), signal.SIGKILL)

    def pid(self) -> int:
        """The postmaster's."""
        return int((self.folder / "data" / "postmaster.pid").read_text().split()[0])

    def backends(self) -> list[int]:
        """The processes of all connections but the one that asks."""
        query = "SELECT pid FROM pg_stat_activity WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
        return [int(row[0]) for row in self._ask(query)]

    def terminate(self) -> int:
        """End all connections, as an administrator does; how many there were."""
        query = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
        return len(self._ask(f"{query} AND backend_type = 'client backend'"))

    def _ask(self, query: str) -> list[tuple[object, ...]]:
        engine = sa.create_engine(self.url(), poolclass=sa.NullPool)
        with engine.connect() as connection:
            return [tuple(row) for row in connection.execute(sa.text(query))]

    def url(self, port: int | None = None) -> sa.URL:
        """The database itself, by another port where something stands in between."""
        return sa.URL.create("postgresql+psycopg", "autoq", PASSWORD, self.host, port or self.port, "postgres")

    def fresh(self) -> str:
        """A new schema, which is what a new database is to those who only see it, and made in no time."""
        self.schemas += 1
        name = f"test_{self.schemas}"
        url = self.url()
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        with engine.begin() as connection:
            connection.execute(sa.text(f"CREATE SCHEMA {name}"))
        own = url.update_query_dict({"options": f"-c search_path={name}"})
        return own.render_as_string(hide_password=False)

    def stop(self) -> None:
        """Stop it, if it runs, and remove all of it."""
        with contextlib.suppress(AssertionError):
            self.halt("immediate")
        shutil.rmtree(self.folder)
