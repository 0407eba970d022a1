"""Connections: one database behind a URL, short transactions, and errors in one line.

SQLite runs in WAL mode, so readers never wait, with `synchronous=FULL`: a commit is on the disk before
it returns (https://sqlite.org/pragma.html#pragma_synchronous). That is one fsync for a trial that took
seconds, and it makes a result survive the loss of the machine and not only of the process. Writers take
the write lock when they begin (BEGIN IMMEDIATE): a transaction that reads first and then asks for the
lock can fail at once, without waiting (https://sqlite.org/lang_transaction.html).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import select
import sqlite3
import threading
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import sqlalchemy as sa
from sqlalchemy import exc

from autoq.errors import BadInput, NotFound, StoreAway, StoreError
from autoq.store import models as m
from autoq.store.checksum import WAY_OUT
from autoq.store.models import SCHEMA, VERSION_TABLE, metadata
from autoq.store.patience import Patience

LOCK_SECONDS = 30
CONNECT_SECONDS = 10
# Who is stopped, or cut off, in the middle of a transaction holds others up for no longer. SQLite's lock is a file's:
# there it lasts until the process goes on or ends.
STALLED_SECONDS = 8
TRUSTED_SECONDS = 1.0  # for which a connection that was used and has heard nothing since is not asked whether it lives
_MIGRATION_LOCK = 0x6175746F71  # "autoq", a key for PostgreSQL's advisory locks

_SQLITE_REASONS = {
    sqlite3.SQLITE_BUSY: "stays locked by another process; try again",
    sqlite3.SQLITE_READONLY: "is read-only",
    sqlite3.SQLITE_IOERR: "cannot be read or written: disk I/O error",
    sqlite3.SQLITE_CORRUPT: "is damaged: not a valid SQLite file",
    sqlite3.SQLITE_FULL: "cannot grow: the disk is full; free some space and go on, what was stored before is intact",
    sqlite3.SQLITE_CANTOPEN: "cannot be opened; check that the file and its folder may be written",
    sqlite3.SQLITE_NOTADB: "is not an SQLite database",
}
_POSTGRESQL_REASONS = {
    "53100": "cannot grow: the server's disk is full; free some space and go on, what was stored is intact",
    "53300": "has no free connections",
    "55P03": "stays locked by another process; try again",
    "57P": "was shut down",
    "25006": "is read-only",
}
# What passes by itself: connections and locks, a server that stops or starts, transactions that met each other.
_AWAY = ("08", "53300", "55P03", "57P", "40001", "40P01", "25P03")
# A cable that was pulled is noticed after so long and not after the hours that TCP takes by itself. On either side: a
# client that vanishes between the messages of one statement leaves a server with its locks, which is not idle before
# their Sync (https://www.postgresql.org/docs/current/protocol-flow.html), so that none of its own timeouts counts.
_KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 30_000}


class Fence(NamedTuple):
    """The lease of a study under which a connection writes: the study, and the count of its holders."""

    study_id: int
    epoch: int


def fence_of(connection: sa.Connection) -> tuple[Fence, str] | None:
    """The lease that what this connection writes on its study needs, and the receipt of this transaction, which is to
    be put into the lease; None: it needs none."""
    found: tuple[Fence, str] | None = connection.get_execution_options().get("autoq_fence")
    return found


class Database:
    """An open database. `name` is its URL without the password, or the path of its SQLite file.

    `fence` is the lease without which nothing is written on its study, and `patience` how long what is done under it
    waits for a database that is away.
    """

    def __init__(
        self, url: sa.URL, engine: sa.Engine, fence: Fence | None = None, patience: Patience | None = None
    ) -> None:
        self.name = _name(url)
        self._url = url
        self._password = url.password
        self._engine = engine
        self._fence, self.patience = fence, patience
        # Threads that would write at the same moment wait here, in turn; SQLite would have them ask again and again.
        self.turn = threading.Lock()
        self._writer = engine.execution_options(autoq_writes=True)
        # A listing takes several statements and must see one state of the database.
        snapshot = {"isolation_level": "REPEATABLE READ"} if engine.dialect.name == "postgresql" else {}
        self._reader = engine.execution_options(**snapshot)

    @property
    def address(self) -> str:
        """What opens this database again in another process. With the password: not to be shown."""
        return self._url.render_as_string(hide_password=False)

    def fenced(self, fence: Fence, patience: Patience | None = None) -> Database:
        """The same database, on the same connections, for the holder of a lease."""
        return Database(self._url, self._engine, fence, patience)

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    @contextlib.contextmanager
    def reading(self) -> Iterator[sa.Connection]:
        """A connection that sees one state of the database."""
        with self.refusals(), self._reader.connect() as connection:
            yield connection

    @contextlib.contextmanager
    def writing(self) -> Iterator[sa.Connection]:
        """A transaction that is committed at the end, or rolled back if an exception leaves it.

        Where a commit is not answered, it is looked up whether it was done, if the transaction is under a lease and
        has patience. Raises `StoreAway` where it was not, or nobody knows.
        """
        receipt = "" if self._fence is None else secrets.token_hex(8)
        with self.refusals(), self._writer.connect() as connection:
            if self._fence is not None:
                connection.execution_options(autoq_fence=(self._fence, receipt))
            yield connection
            self._check_place(connection)
            try:
                connection.commit()
                return
            except exc.SQLAlchemyError as problem:
                unanswered = self._refusal(problem)
                if not receipt or self.patience is None or not isinstance(unanswered, StoreAway):
                    raise
        if not self._was_stored(receipt, unanswered):
            raise unanswered

    def _was_stored(self, receipt: str, unanswered: StoreAway) -> bool:
        """Whether the transaction of that receipt was committed; waits for a database that can say so."""
        fence, patience = self._fence, self.patience
        assert fence is not None and patience is not None
        study, lease = m.studies.c, m.leases.c
        query = sa.select(lease.receipt).where(lease.study_id == fence.study_id, lease.epoch == fence.epoch)
        while True:
            patience.wait(unanswered)
            try:
                with self.refusals(), self._writer.connect() as connection:
                    # The server may not have noticed yet that nobody listens: it holds this row as long as it commits.
                    connection.execute(sa.select(study.id).where(study.id == fence.study_id).with_for_update())
                    return connection.execute(query).scalar() == receipt
            except StoreAway as problem:
                unanswered = problem

    def _check_place(self, connection: sa.Connection) -> None:
        """Refuse to write into an SQLite file that has been deleted or replaced: what is stored there is lost."""
        if connection.dialect.name != "sqlite":
            return
        path, identity = connection.info["autoq_file"]
        if _identity(path) != identity:
            raise StoreError(
                f"the database {self.name!r} was deleted, moved or replaced while it was in use; nothing more is "
                "stored in it"
            )

    @contextlib.contextmanager
    def refusals(self) -> Iterator[None]:
        """Turn database errors into `StoreError` with one line that has no password in it."""
        try:
            yield
        except exc.SQLAlchemyError as problem:
            raise self._refusal(problem) from problem
        except (ValueError, zlib.error) as problem:  # JSON, text, dates and compressed values that cannot be read
            said = " ".join(str(problem).split())
            told = f"the database {self.name!r} is damaged: a value cannot be read: {said}; {WAY_OUT}"
            raise StoreError(told) from problem
        except (LookupError, TypeError, AttributeError) as problem:
            # A mistake of ours, unless the file says things that no schema allows: NULL where there is none.
            if (found := self.damage()) is None:
                raise
            raise StoreError(f"the database {self.name!r} is damaged: {found}; {WAY_OUT}") from problem

    def damage(self) -> str | None:
        """What is wrong with an SQLite file, its pages or its values' kinds; None: nothing, or it is no such file."""
        if self._engine.dialect.name != "sqlite":
            return None
        try:
            with self._engine.connect() as connection:
                found = str(connection.exec_driver_sql("PRAGMA integrity_check(1)").scalar())
                if found != "ok":
                    return " ".join(found.split())
                return next(filter(None, (_wrong_kind(connection, table) for table in metadata.sorted_tables)), None)
        except exc.SQLAlchemyError as problem:
            return f"it {_reason(problem)}"

    def _refusal(self, problem: exc.SQLAlchemyError) -> StoreError:
        text = f"the database {self.name!r} {_reason(problem)}"
        if self._password:
            text = text.replace(str(self._password), "***")
        return (StoreAway if _is_away(problem) else StoreError)(text)

    def schema(self) -> str | None:
        """The revision of the schema, None where there is none yet."""
        with self.reading() as connection:
            return self._schema(connection)

    def _schema(self, connection: sa.Connection) -> str | None:
        if not sa.inspect(connection).has_table(VERSION_TABLE):
            return None
        found = connection.execute(sa.text(f"SELECT version_num FROM {VERSION_TABLE}")).scalar()  # noqa: S608 - a constant
        return None if found is None else str(found)

    def migrate(self) -> None:
        """Bring the schema to this code's revision. Any number of processes may do so at once.

        Raises `StoreError` where the schema is newer than this code, or where tables of something else
        are in the way.
        """
        with self.writing() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(sa.select(sa.func.pg_advisory_xact_lock(_MIGRATION_LOCK)))
            current = self._schema(connection)
            if current == SCHEMA:
                return
            if current is None:
                taken = sorted(set(sa.inspect(connection).get_table_names()) & set(metadata.tables))
                if taken:
                    raise StoreError(
                        f"the database {self.name!r} has tables of something else ({', '.join(taken)}); "
                        "give AutoQ a database of its own"
                    )
            _upgrade(connection, current, self.name)


def _wrong_kind(connection: sa.Connection, table: sa.Table) -> str | None:
    """Which column of an SQLite table has a value of a kind that it never gets: a text that became bytes."""
    kinds = {sa.Integer: "integer", sa.Boolean: "integer", sa.Double: "real", sa.LargeBinary: "blob"}
    wrong = []
    for column in table.columns:
        impl = column.type.impl if isinstance(column.type, sa.types.TypeDecorator) else column.type
        kind = next((name for known, name in kinds.items() if isinstance(impl, known)), "text")
        wrong.append(sa.func.sum(sa.func.typeof(column).not_in((kind, "null"))))
    counts = connection.execute(sa.select(*wrong).select_from(table)).one()
    named = [column.name for column, count in zip(table.columns, counts, strict=True) if count]
    return f"a value in {table.name}.{named[0]} is of another kind" if named else None


def _upgrade(connection: sa.Connection, current: str | None, name: str) -> None:
    # Alembic takes half a second to import, and almost every opening has nothing to migrate.
    from alembic import command
    from alembic.config import Config
    from alembic.script import ScriptDirectory

    config = Config()
    folder = Path(__file__).parent / "migrations"
    config.set_main_option("script_location", str(folder).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    known = [script.revision for script in ScriptDirectory.from_config(config).walk_revisions()]
    if current is not None and current not in known:
        raise StoreError(
            f"the database {name!r} was made by a newer AutoQ (schema {current}, this one knows up to {SCHEMA}); "
            "upgrade AutoQ"
        )
    command.upgrade(config, "head")


def open_database(url: str, create: bool) -> Database:
    """The database behind a SQLAlchemy URL or a plain path (SQLite), with its schema up to date.

    With `create` False a missing SQLite file is not made, it raises `NotFound`. Raises `BadInput` for
    a URL that cannot be used and `StoreError` for a database that cannot.
    """
    parsed = _parse(url)
    if parsed.get_backend_name() == "sqlite":
        _check_file(parsed, create)
    database = Database(parsed, _engine(parsed))
    try:
        if database.schema() != SCHEMA:
            database.migrate()
    except BaseException:
        database.close()
        raise
    return database


def sqlite_file(url: str) -> Path | None:
    """The file of an SQLite database, given as `open_database` takes it; None for another one."""
    parsed = _parse(url)
    return Path(parsed.database) if parsed.get_backend_name() == "sqlite" and parsed.database else None


def _name(url: sa.URL) -> str:
    """What a user calls the database, fit for messages: a path, or a URL with its password masked."""
    if url.get_backend_name() == "sqlite":
        return url.database or ""
    return url.render_as_string(hide_password=True)


def _parse(url: str) -> sa.URL:
    if "://" not in url:
        return sa.URL.create("sqlite", database=url)
    try:
        parsed = sa.make_url(url)
        if parsed.drivername == "postgresql":
            # What this name means differs between versions of SQLAlchemy; this is the driver we test.
            parsed = parsed.set(drivername="postgresql+psycopg")
        dialect = parsed.get_dialect()
    except exc.NoSuchModuleError:
        raise BadInput(f"no database {parsed.drivername!r}; choose from sqlite, postgresql+psycopg") from None
    except (exc.ArgumentError, ValueError):
        # The text itself may hold a password: it is not repeated.
        raise BadInput(f"the database URL {url.partition('://')[0]}://… cannot be read as a SQLAlchemy URL") from None
    if dialect.is_async:
        raise BadInput(f"the database driver {parsed.drivername!r} is asynchronous; choose one that is not")
    return parsed


def _check_file(url: sa.URL, create: bool) -> None:
    if url.database in (None, "", ":memory:") or str(url.database).startswith("file:"):
        raise BadInput(f"the database {_name(url)!r} is not a file on disk; give a path such as autoq.db")
    path = Path(str(url.database))
    if not path.exists() and not create:
        raise NotFound(f"no database at {str(path)!r}; run `autoq search` first or name another one with --db")
    if path.is_dir() or not path.parent.is_dir():
        what = "is a folder" if path.is_dir() else f"cannot be made: there is no folder {str(path.parent)!r}"
        raise StoreError(f"the database {str(path)!r} {what}")
    if create:
        # Its owner's alone: it holds what was measured, and hashes of tokens. SQLite gives the files beside it the same
        # mode. Where it cannot be made, SQLite says why.
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))


def _engine(url: sa.URL) -> sa.Engine:
    options: dict[str, Any] = {}
    backend = url.get_backend_name()
    if backend == "sqlite" and "timeout" not in url.query:
        options["timeout"] = LOCK_SECONDS
    if backend == "postgresql":
        if "connect_timeout" not in url.query:
            options["connect_timeout"] = CONNECT_SECONDS
        options |= {name: value for name, value in _KEEPALIVE.items() if name not in url.query}
        settings = f"-c lock_timeout={LOCK_SECONDS}s -c idle_in_transaction_session_timeout={STALLED_SECONDS}s"
        settings += "".join(f" -c tcp_{name.removeprefix('tcp_')}={value}" for name, value in _KEEPALIVE.items())
        options["options"] = f"{settings} {url.query.get('options', '')}"
        url = url.difference_update_query(["options"])
    try:
        # What is written is the users' and belongs in no message or log.
        engine = sa.create_engine(url, connect_args=options, hide_parameters=True)
    except ModuleNotFoundError as problem:
        hint = "pip install 'autoq[postgresql]'" if problem.name == "psycopg" else f"pip install {problem.name}"
        raise StoreError(f"the database driver {url.drivername!r} is not installed: {hint}") from None
    if backend == "sqlite":
        sa.event.listen(engine, "connect", _prepare_sqlite)
        sa.event.listen(engine, "begin", _begin_sqlite)
    else:
        _check_when_idle(engine)
    return engine


def _check_when_idle(engine: sa.Engine) -> None:
    """Have a connection of the pool asked whether it still lives before it is used again: a question to the server, one
    of nine that storing results takes. So it is not asked where it answered within `TRUSTED_SECONDS` and nothing has
    come since: a server that ends a connection says so, and one that was killed is hung up for by its system."""

    def used(connection: Any, record: sa.pool.ConnectionPoolEntry) -> None:
        record.info["autoq_used"] = time.monotonic()

    def check(connection: Any, record: sa.pool.ConnectionPoolEntry, _: object) -> None:
        try:
            if time.monotonic() - record.info["autoq_used"] > TRUSTED_SECONDS or _has_come(connection):
                engine.dialect.do_ping(connection)
        except engine.dialect.loaded_dbapi.Error as problem:
            raise exc.InvalidatePoolError from problem  # this connection and all that are as old are made anew

    sa.event.listen(engine, "connect", used)
    sa.event.listen(engine, "checkin", used)
    sa.event.listen(engine, "checkout", check)


def _has_come(connection: Any) -> bool:
    """Whether something can be read from a connection that waits for nothing; also where the driver does not tell."""
    if (fileno := getattr(connection, "fileno", None)) is None:
        return True
    watched = select.poll()
    watched.register(fileno(), select.POLLIN)
    return bool(watched.poll(0))


def _identity(path: str) -> tuple[int, int] | None:
    """What tells a file from another one of its name; None where there is none."""
    try:
        found = os.stat(path)  # noqa: PTH116 - once for every write
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _prepare_sqlite(connection: sqlite3.Connection, record: sa.pool.ConnectionPoolEntry) -> None:
    # The driver's own BEGIN comes late and is never IMMEDIATE: `_begin_sqlite` says it instead.
    connection.isolation_level = None
    connection.execute("PRAGMA foreign_keys = ON")
    connection.execute("PRAGMA synchronous = FULL")
    deadline = time.monotonic() + connection.execute("PRAGMA busy_timeout").fetchone()[0] / 1000
    while True:
        try:
            # The file keeps this. SQLite does not wait for other processes while it switches a new file.
            connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as problem:
            if problem.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
        time.sleep(0.02)
    path = connection.execute("PRAGMA database_list").fetchone()[2]
    record.info["autoq_file"] = path, _identity(path)


def _begin_sqlite(connection: sa.Connection) -> None:
    writes = connection.get_execution_options().get("autoq_writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _is_away(problem: exc.SQLAlchemyError) -> bool:
    """Whether it is likely to pass by itself: no connection, one that broke, or a lock that somebody else has."""
    cause = getattr(problem, "orig", None) or problem
    code, state = getattr(cause, "sqlite_errorcode", None), getattr(cause, "sqlstate", None)
    if code is not None:
        return code & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
    if state is not None:
        return bool(state.startswith(_AWAY))
    broken = isinstance(problem, exc.DBAPIError) and problem.connection_invalidated
    return broken or isinstance(problem, exc.OperationalError | exc.TimeoutError)


def _reason(problem: exc.SQLAlchemyError) -> str:
    """One clause that says what is wrong with the database."""
    cause = getattr(problem, "orig", None) or problem
    code = getattr(cause, "sqlite_errorcode", None)
    if code is not None and code & 0xFF in _SQLITE_REASONS:
        return _SQLITE_REASONS[code & 0xFF]
    state = getattr(cause, "sqlstate", None)
    for prefix, reason in _POSTGRESQL_REASONS.items():
        if state is not None and state.startswith(prefix):
            return reason
    text = " ".join(str(cause).split()) or type(cause).__name__
    if isinstance(problem, exc.OperationalError) and state is None and code is None:
        return f"cannot be reached: {text}"
    return f"refuses: {text}"
