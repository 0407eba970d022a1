"""Studies that were removed; and indexes by which a removal finds what refers to a trial, and to an assignment."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"


def upgrade() -> None:
    op.create_table(
        "removals",
        sa.Column("id", sa.Integer, nullable=False, autoincrement=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("owner", sa.String(64)),
        sa.Column("trials", sa.Integer, nullable=False),
        sa.Column("changes", sa.Integer, nullable=False),
        sa.Column("user", sa.String(64)),
        sa.Column("removed_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_removals"),
    )
    op.create_index("ix_frontier_trial_id", "frontier", ["trial_id"])
    # The same for one study, and for all of them.
    op.drop_index("ix_trials_study_id_assignment", "trials")
    op.create_index("ix_trials_assignment_study_id", "trials", ["assignment", "study_id"])


def downgrade() -> None:
    op.drop_index("ix_trials_assignment_study_id", "trials")
    op.create_index("ix_trials_study_id_assignment", "trials", ["study_id", "assignment"])
    op.drop_index("ix_frontier_trial_id", "frontier")
    op.drop_table("removals")
