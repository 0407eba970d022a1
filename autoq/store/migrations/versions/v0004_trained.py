"""Trials that were trained from others, and their layers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.add_column("trials", sa.Column("parent", sa.Integer))
    op.add_column("trials", sa.Column("recovery", sa.Text))
    op.create_table(
        "trained_layers",
        sa.Column("digest", sa.String(40), nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("digest", name="pk_trained_layers"),
    )


def downgrade() -> None:
    op.drop_table("trained_layers")
    for column in ("recovery", "parent"):
        op.drop_column("trials", column)
