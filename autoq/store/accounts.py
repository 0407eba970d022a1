"""Who may use a server: tokens, of which the database has the SHA-256 alone.

A token is 32 random bytes, so its hash needs no salt and no slowness: what cannot be guessed cannot be guessed from
its hash either. Rows are never deleted: a token that was revoked stays in the list, with the time.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Literal, get_args

import sqlalchemy as sa

from autoq.errors import BadInput, NotFound, UnknownName
from autoq.store import models as m
from autoq.store.clock import database_time
from autoq.store.database import Database

Role = Literal["viewer", "submitter", "admin"]
PREFIX = "autoq_"
_USED = timedelta(minutes=1)  # how exact `used_at` is: a write for every read would be one too many
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
_TOKEN = re.compile(PREFIX + r"[A-Za-z0-9_-]{43}")
_COLUMNS = tuple(column for column in m.tokens.c if column.name != "digest")


@dataclass(frozen=True)
class TokenRecord:
    """One token without its secret. `used_at` is exact to a minute."""

    id: int
    name: str
    user: str
    role: Role
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    used_at: datetime | None

    def valid(self, moment: datetime | None = None) -> bool:
        """Whether it is neither revoked nor expired."""
        expired = self.expires_at is not None and self.expires_at <= (moment or datetime.now(UTC))
        return self.revoked_at is None and not expired

    def to_json(self) -> dict[str, Any]:
        """The token as JSON; `valid` says whether it opens anything now."""
        moments = {
            name: None if (moment := getattr(self, name)) is None else moment.isoformat()
            for name in ("created_at", "expires_at", "revoked_at", "used_at")
        }
        named = {"id": self.id, "name": self.name, "user": self.user, "role": self.role}
        return {**named, "valid": self.valid(), **moments}


class Accounts:
    """The tokens of one database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str, user: str, role: str, lasting: timedelta | None = None) -> tuple[str, TokenRecord]:
        """A new token, which nobody can tell again, and its record. Raises `BadInput`."""
        if not name.strip() or len(name) > 100 or not name.isprintable():
            raise BadInput(f"name: must be 1 to 100 printable characters (got {name[:100]!r})")
        if not _USER.fullmatch(user):
            raise BadInput(
                f"user: must start with a letter or digit and go on with those or . _ @ - (got {user[:80]!r})"
            )
        if role not in get_args(Role):
            raise UnknownName("role", role, get_args(Role))
        secret = PREFIX + secrets.token_urlsafe(32)
        values: dict[str, Any] = {"name": name, "user": user, "role": role, "digest": _digest(secret)}
        with self._database.writing() as connection:
            # The database's time, by which all servers on it let the token expire.
            moment = database_time(connection)
            values |= {"created_at": moment, "expires_at": None if lasting is None else moment + lasting}
            done = connection.execute(sa.insert(m.tokens).values(**values))
            assert done.inserted_primary_key is not None
            row = connection.execute(sa.select(*_COLUMNS).where(m.tokens.c.id == done.inserted_primary_key[0])).one()
        return secret, TokenRecord(*row)

    def list(self) -> list[TokenRecord]:
        """All tokens, oldest first."""
        with self._database.reading() as connection:
            return [TokenRecord(*row) for row in connection.execute(sa.select(*_COLUMNS).order_by(m.tokens.c.id))]

    def any(self) -> bool:
        """Whether there ever was a token: a server on a database that has one asks for them."""
        with self._database.reading() as connection:
            return connection.execute(sa.select(m.tokens.c.id).limit(1)).first() is not None

    def find(self, secret: str) -> TokenRecord | None:
        """The valid token that `secret` is, None where it is none; notes that it was used."""
        if not _TOKEN.fullmatch(secret):
            return None
        t, digest = m.tokens.c, _digest(secret)
        with self._database.reading() as connection:
            row = connection.execute(sa.select(t.digest, *_COLUMNS).where(t.digest == digest)).one_or_none()
            moment = database_time(connection)
        if row is None or not hmac.compare_digest(row[0], digest):
            return None
        found = TokenRecord(*row[1:])
        if not found.valid(moment):
            return None
        if found.used_at is None or abs(moment - found.used_at) > _USED:
            with self._database.writing() as connection:
                connection.execute(sa.update(m.tokens).where(t.id == found.id).values(used_at=moment))
        return found

    def still(self, token_id: int) -> bool:
        """Whether a token that was valid still is."""
        with self._database.reading() as connection:
            row = connection.execute(sa.select(*_COLUMNS).where(m.tokens.c.id == token_id)).one_or_none()
            return row is not None and TokenRecord(*row).valid(database_time(connection))

    def revoke(self, token_id: int) -> TokenRecord:
        """Let a token open nothing from now on; one that was revoked stays so. Raises `NotFound`."""
        t = m.tokens.c
        with self._database.writing() as connection:
            revoked = sa.update(m.tokens).where(t.id == token_id, t.revoked_at.is_(None))
            connection.execute(revoked.values(revoked_at=database_time(connection)))
            row = connection.execute(sa.select(*_COLUMNS).where(t.id == token_id)).one_or_none()
        if row is None:
            raise NotFound(f"no token with id {token_id}")
        return TokenRecord(*row)


def _digest(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
