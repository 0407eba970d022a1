"""Values per token behind measurements, and sensitivities that studies share."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "token_values",
        sa.Column("trial_id", sa.Integer, nullable=False),
        sa.Column("objective", sa.String(128), nullable=False),
        sa.Column("part", sa.String(16), nullable=False),
        sa.Column("windows", sa.Integer, nullable=False),
        sa.Column("tokens", sa.Integer, nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("trial_id", "objective", "part", name="pk_token_values"),
        sa.ForeignKeyConstraint(["trial_id"], ["trials.id"], name="fk_token_values_trial_id", ondelete="CASCADE"),
    )
    op.create_table(
        "sensitivities",
        sa.Column("key", sa.String(128), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name="pk_sensitivities"),
    )


def downgrade() -> None:
    for table in ("sensitivities", "token_values"):
        op.drop_table(table)
