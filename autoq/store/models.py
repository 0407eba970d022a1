"""The tables. What is written here and what the migrations build are the same; a test compares them.

One row a trial. Assignments (8 KB of JSON for 210 layers) stand apart, compressed and keyed by their
hash, so that listing trials never reads them. The frontier is stored, not queried: dominance in SQL is
quadratic. `studies.changes` counts the changes of a study and `trials.changed` is the count at a
trial's last one, so whoever follows a study asks for what is newer than what it has seen.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.types import TypeDecorator

from autoq.store.checksum import sealed, unsealed

SCHEMA = "0009"  # the newest revision in migrations/versions
VERSION_TABLE = "autoq_schema"  # not Alembic's default name, which other tools' databases have too


class Json(TypeDecorator[Any]):
    """Any JSON value as text, the same on every database. None is NULL.

    Numbers must be finite, as in JSON's own definition (RFC 8259), unless `finite` is False. What another checksum
    covers needs no seal (`store.checksum`).
    """

    impl = sa.Text
    cache_ok = True

    def __init__(self, finite: bool = True, seal: bool = True) -> None:
        super().__init__()
        self.finite, self.seal = finite, seal

    def process_bind_param(self, value: Any, dialect: sa.Dialect) -> str | None:
        """To the database."""
        if value is None:
            return None
        text = json.dumps(value, separators=(",", ":"), allow_nan=not self.finite)
        return sealed(text) if self.seal and text != "{}" else text

    def process_result_value(self, value: Any, dialect: sa.Dialect) -> Any:
        """From the database."""
        # Most details and violations are empty, and there are several of them to a trial.
        if value is None:
            return None
        return {} if value == "{}" else json.loads(unsealed(value) if self.seal else value)


class Moment(TypeDecorator[datetime]):
    """A point in time, UTC on both sides; SQLite keeps no time zones and gives naive values back."""

    impl = sa.DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """To the database."""
        assert value is None or value.tzinfo is not None, "a naive time has no meaning in a database"
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: sa.Dialect) -> datetime | None:
        """From the database."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


metadata = sa.MetaData(
    naming_convention={
        "pk": "pk_%(table_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    }
)

studies = sa.Table(
    "studies",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(128), nullable=False, unique=True),
    sa.Column("spec", Json, nullable=False),
    sa.Column("objectives", Json, nullable=False),  # [[name, unit, direction], …]
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("message", sa.Text),
    sa.Column("changes", sa.Integer, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("started_at", Moment),
    sa.Column("finished_at", Moment),
    sa.Column("sampler_attrs", Json(finite=False), nullable=False),
    sa.Column("plan", Json),
    sa.Column("owner", sa.String(64)),  # the user of a server who submitted it; NULL: whoever has the database
    sa.Column("priority", sa.Integer, nullable=False, server_default="0"),
    sa.Column("queued_at", Moment),
    sa.Column("members", sa.String(48)),  # checksum of its frontier: see `store.checksum`
    sa.Column("request", sa.String(16)),  # `cancel` or `yield`, once the trials that are out have ended
)

assignments = sa.Table(
    "assignments",
    metadata,
    sa.Column("hash", sa.String(64), primary_key=True),
    sa.Column("body", sa.LargeBinary, nullable=False),  # zlib of the canonical JSON
)

trials = sa.Table(
    "trials",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_id", sa.ForeignKey("studies.id", ondelete="CASCADE"), nullable=False),
    sa.Column("number", sa.Integer, nullable=False),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("origin", sa.String(16), nullable=False),
    sa.Column("baseline", sa.Text),
    sa.Column("assignment", sa.ForeignKey("assignments.hash"), nullable=False),
    sa.Column("duplicate_of", sa.Integer),  # the number of another trial of this study
    sa.Column("attempt", sa.Integer, nullable=False),
    sa.Column("changed", sa.Integer, nullable=False),
    sa.Column("feasible", sa.Boolean),
    sa.Column("violations", Json(seal=False)),
    sa.Column("sampler_attrs", Json(finite=False), nullable=False),
    sa.Column("error_type", sa.Text),
    sa.Column("error_message", sa.Text),
    sa.Column("traceback", sa.Text),
    sa.Column("worker", sa.Text),
    sa.Column("seconds", sa.Double),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("finished_at", Moment),
    sa.Column("parent", sa.Integer),  # the number of the trial of this study that it was made of
    sa.Column("recovery", Json, key="derivation"),  # how
    sa.Column("checksum", sa.String(32)),  # of the result, once there is one: see `store.checksum`
    sa.UniqueConstraint("study_id", "number"),
    sa.Index(None, "assignment", "study_id"),
    sa.Index(None, "study_id", "state"),
    sa.Index(None, "study_id", "changed"),
)

# Layers that were trained, which no method makes again: what an assignment's `scheme#digest` stands for. In the
# database and not in files beside it, so that a trial has its weights wherever its database is moved or asked from,
# and gets them in one transaction with its row; in a table of their own, which reading trials never touches.
trained_layers = sa.Table(
    "trained_layers",
    metadata,
    sa.Column("digest", sa.String(40), primary_key=True),
    sa.Column("body", sa.LargeBinary, nullable=False),  # a safetensors file
)

measurements = sa.Table(
    "measurements",
    metadata,
    sa.Column("trial_id", sa.ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("objective", sa.String(128), primary_key=True),
    sa.Column("part", sa.String(16), primary_key=True),
    sa.Column("kind", sa.String(16), nullable=False),
    sa.Column("value", sa.Double, nullable=False),
    sa.Column("stderr", sa.Double),
    sa.Column("unit", sa.String(64), nullable=False),
    sa.Column("n", sa.BigInteger, nullable=False),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("detail", Json(seal=False), nullable=False),
    sqlite_with_rowid=False,
)

# One number per token behind a measurement, for comparisons in pairs on the same tokens.
token_values = sa.Table(
    "token_values",
    metadata,
    sa.Column("trial_id", sa.ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("objective", sa.String(128), primary_key=True),
    sa.Column("part", sa.String(16), primary_key=True),
    sa.Column("windows", sa.Integer, nullable=False),
    sa.Column("tokens", sa.Integer, nullable=False),
    sa.Column("body", sa.LargeBinary, nullable=False),  # see `packing`, window by window
)

frontier = sa.Table(
    "frontier",
    metadata,
    sa.Column("study_id", sa.ForeignKey("studies.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("trial_id", sa.ForeignKey("trials.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("point", Json(seal=False), nullable=False),  # values in the order of the study's objectives
    sa.Index(None, "trial_id"),
    sqlite_with_rowid=False,
)

tables = sa.Table(
    "tables",
    metadata,
    sa.Column("study_id", sa.ForeignKey("studies.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("name", sa.String(64), primary_key=True),
    sa.Column("body", Json, nullable=False),
)

# Latency tables that studies share: a machine times a model's layers once.
costs = sa.Table(
    "costs",
    metadata,
    sa.Column("key", sa.String(64), primary_key=True),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("body", Json, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
)

# Predicted losses per layer and scheme that studies share: they depend on model, data and method alone.
sensitivities = sa.Table(
    "sensitivities",
    metadata,
    sa.Column("key", sa.String(128), primary_key=True),
    sa.Column("body", Json, nullable=False),
    sa.Column("created_at", Moment, nullable=False),
)

# One controller runs a study: who holds it until when. `epoch` counts the holders, so that what a former one still
# sends can be told apart.
leases = sa.Table(
    "leases",
    metadata,
    sa.Column("study_id", sa.ForeignKey("studies.id", ondelete="CASCADE"), primary_key=True, autoincrement=False),
    sa.Column("holder", sa.String(128)),
    sa.Column("epoch", sa.Integer, nullable=False),
    sa.Column("until", Moment, nullable=False),
    sa.Column("receipt", sa.String(16)),  # of the last transaction on the study under this lease
)

# A submission that is sent twice under one key makes one study. The key is its user's own.
submissions = sa.Table(
    "submissions",
    metadata,
    sa.Column("user", sa.String(64), primary_key=True),
    sa.Column("key", sa.String(128), primary_key=True),
    sa.Column("fingerprint", sa.String(64), nullable=False),  # of the body: another one under this key is refused
    sa.Column("study_id", sa.ForeignKey("studies.id", ondelete="CASCADE"), nullable=False),
    sa.Column("created_at", Moment, nullable=False),
    sqlite_with_rowid=False,
)

# Who may use a server. The token itself is nowhere: its SHA-256 is enough to know it again.
tokens = sa.Table(
    "tokens",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("user", sa.String(64), nullable=False),
    sa.Column("role", sa.String(16), nullable=False),  # viewer, submitter, admin
    sa.Column("digest", sa.String(64), nullable=False, unique=True),
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("expires_at", Moment),
    sa.Column("revoked_at", Moment),
    sa.Column("used_at", Moment),
)

# What evaluates, as its controller last saw it.
workers = sa.Table(
    "workers",
    metadata,
    sa.Column("id", sa.String(128), primary_key=True),
    sa.Column("study_id", sa.ForeignKey("studies.id", ondelete="SET NULL")),
    sa.Column("node", sa.Text, nullable=False),
    sa.Column("device", sa.Text, nullable=False),
    sa.Column("memory_bytes", sa.BigInteger),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("trial", sa.Integer),
    sa.Column("started_at", Moment, nullable=False),
    sa.Column("seen_at", Moment, nullable=False),
)

exports = sa.Table(
    "exports",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("study_id", sa.ForeignKey("studies.id", ondelete="CASCADE"), nullable=False),
    sa.Column("trial", sa.Integer, nullable=False),
    sa.Column("target", sa.String(64), nullable=False),
    sa.Column("user", sa.String(64)),
    sa.Column("state", sa.String(16), nullable=False),
    sa.Column("message", sa.Text),
    sa.Column("progress", Json),
    sa.Column("result", Json),  # the manifest, and what verification found
    sa.Column("created_at", Moment, nullable=False),
    sa.Column("started_at", Moment),
    sa.Column("finished_at", Moment),
)

# What people note on a trial.
remarks = sa.Table(
    "remarks",
    metadata,
    sa.Column("study_id", sa.ForeignKey("studies.id", ondelete="CASCADE"), primary_key=True),
    sa.Column("trial", sa.Integer, primary_key=True),
    sa.Column("note", sa.Text, nullable=False),
    sa.Column("tags", Json, nullable=False),
    sa.Column("user", sa.String(64)),
    sa.Column("changed_at", Moment, nullable=False),
    sqlite_with_rowid=False,
)

# Studies that are no more. Their numbers are never given again.
removals = sa.Table(
    "removals",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
    sa.Column("name", sa.String(128), nullable=False),
    sa.Column("owner", sa.String(64)),
    sa.Column("trials", sa.Integer, nullable=False),  # how many it had
    sa.Column("changes", sa.Integer, nullable=False),  # and how many changes, its removal with them
    sa.Column("user", sa.String(64)),  # who removed it
    sa.Column("removed_at", Moment, nullable=False),
)
