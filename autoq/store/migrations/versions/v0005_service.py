"""What a server keeps: owners and a queue of studies, tokens, workers, exports, and remarks on trials."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"

_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.add_column("studies", sa.Column("owner", sa.String(64)))
    op.add_column("studies", sa.Column("priority", sa.Integer, nullable=False, server_default="0"))
    op.add_column("studies", sa.Column("queued_at", _MOMENT))
    op.add_column("studies", sa.Column("request", sa.String(16)))
    op.create_table(
        "leases",
        sa.Column("study_id", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("holder", sa.String(128)),
        sa.Column("epoch", sa.Integer, nullable=False),
        sa.Column("until", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("study_id", name="pk_leases"),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_leases_study_id_studies", ondelete="CASCADE"),
    )
    op.create_table(
        "submissions",
        sa.Column("user", sa.String(64), nullable=False),
        sa.Column("key", sa.String(128), nullable=False),
        sa.Column("fingerprint", sa.String(64), nullable=False),
        sa.Column("study_id", sa.Integer, nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("user", "key", name="pk_submissions"),
        sa.ForeignKeyConstraint(
            ["study_id"], ["studies.id"], name="fk_submissions_study_id_studies", ondelete="CASCADE"
        ),
    )
    op.create_table(
        "tokens",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("user", sa.String(64), nullable=False),
        sa.Column("role", sa.String(16), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("expires_at", _MOMENT),
        sa.Column("revoked_at", _MOMENT),
        sa.Column("used_at", _MOMENT),
        sa.PrimaryKeyConstraint("id", name="pk_tokens"),
        sa.UniqueConstraint("digest", name="uq_tokens_digest"),
    )
    op.create_table(
        "workers",
        sa.Column("id", sa.String(128), nullable=False),
        sa.Column("study_id", sa.Integer),
        sa.Column("node", sa.Text, nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("memory_bytes", sa.BigInteger),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("trial", sa.Integer),
        sa.Column("started_at", _MOMENT, nullable=False),
        sa.Column("seen_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_workers"),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_workers_study_id_studies", ondelete="SET NULL"),
    )
    op.create_table(
        "exports",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("study_id", sa.Integer, nullable=False),
        sa.Column("trial", sa.Integer, nullable=False),
        sa.Column("target", sa.String(64), nullable=False),
        sa.Column("user", sa.String(64)),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("message", sa.Text),
        sa.Column("progress", sa.Text),
        sa.Column("result", sa.Text),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("started_at", _MOMENT),
        sa.Column("finished_at", _MOMENT),
        sa.PrimaryKeyConstraint("id", name="pk_exports"),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_exports_study_id_studies", ondelete="CASCADE"),
    )
    op.create_table(
        "remarks",
        sa.Column("study_id", sa.Integer, nullable=False),
        sa.Column("trial", sa.Integer, nullable=False),
        sa.Column("note", sa.Text, nullable=False),
        sa.Column("tags", sa.Text, nullable=False),
        sa.Column("user", sa.String(64)),
        sa.Column("changed_at", _MOMENT, nullable=False),
        sa.PrimaryKeyConstraint("study_id", "trial", name="pk_remarks"),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_remarks_study_id_studies", ondelete="CASCADE"),
    )


def downgrade() -> None:
    for table in ("remarks", "exports", "workers", "tokens", "submissions", "leases"):
        op.drop_table(table)
    for column in ("request", "queued_at", "priority", "owner"):
        op.drop_column("studies", column)
