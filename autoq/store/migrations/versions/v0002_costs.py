"""Latency tables that studies of one device share."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    op.create_table(
        "costs",
        sa.Column("key", sa.String(64), nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_costs"),
    )


def downgrade() -> None:
    op.drop_table("costs")
