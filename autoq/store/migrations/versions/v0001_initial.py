"""Studies, assignments, trials, measurements, frontier, tables."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_MOMENT = sa.DateTime(timezone=True)


def upgrade() -> None:
    op.create_table(
        "studies",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("objectives", sa.Text, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("message", sa.Text),
        sa.Column("changes", sa.Integer, nullable=False),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("started_at", _MOMENT),
        sa.Column("finished_at", _MOMENT),
        sa.Column("sampler_attrs", sa.Text, nullable=False),
        sa.Column("plan", sa.Text),
        sa.PrimaryKeyConstraint("id", name="pk_studies"),
        sa.UniqueConstraint("name", name="uq_studies_name"),
    )
    op.create_table(
        "assignments",
        sa.Column("hash", sa.String(64), nullable=False),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("hash", name="pk_assignments"),
    )
    op.create_table(
        "trials",
        sa.Column("id", sa.Integer, nullable=False),
        sa.Column("study_id", sa.Integer, nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("origin", sa.String(16), nullable=False),
        sa.Column("baseline", sa.Text),
        sa.Column("assignment", sa.String(64), nullable=False),
        sa.Column("duplicate_of", sa.Integer),
        sa.Column("attempt", sa.Integer, nullable=False),
        sa.Column("changed", sa.Integer, nullable=False),
        sa.Column("feasible", sa.Boolean),
        sa.Column("violations", sa.Text),
        sa.Column("sampler_attrs", sa.Text, nullable=False),
        sa.Column("error_type", sa.Text),
        sa.Column("error_message", sa.Text),
        sa.Column("traceback", sa.Text),
        sa.Column("worker", sa.Text),
        sa.Column("seconds", sa.Double),
        sa.Column("created_at", _MOMENT, nullable=False),
        sa.Column("finished_at", _MOMENT),
        sa.PrimaryKeyConstraint("id", name="pk_trials"),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_trials_study_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["assignment"], ["assignments.hash"], name="fk_trials_assignment"),
        sa.UniqueConstraint("study_id", "number", name="uq_trials_study_id_number"),
    )
    for column in ("assignment", "state", "changed"):
        op.create_index(f"ix_trials_study_id_{column}", "trials", ["study_id", column])
    op.create_table(
        "measurements",
        sa.Column("trial_id", sa.Integer, nullable=False),
        sa.Column("objective", sa.String(128), nullable=False),
        sa.Column("part", sa.String(16), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("value", sa.Double, nullable=False),
        sa.Column("stderr", sa.Double),
        sa.Column("unit", sa.String(64), nullable=False),
        sa.Column("n", sa.BigInteger, nullable=False),
        sa.Column("device", sa.Text, nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("trial_id", "objective", "part", name="pk_measurements"),
        sa.ForeignKeyConstraint(["trial_id"], ["trials.id"], name="fk_measurements_trial_id", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "frontier",
        sa.Column("study_id", sa.Integer, nullable=False),
        sa.Column("trial_id", sa.Integer, nullable=False),
        sa.Column("point", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("study_id", "trial_id", name="pk_frontier"),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_frontier_study_id", ondelete="CASCADE"),
        sa.ForeignKeyConstraint(["trial_id"], ["trials.id"], name="fk_frontier_trial_id", ondelete="CASCADE"),
        sqlite_with_rowid=False,
    )
    op.create_table(
        "tables",
        sa.Column("study_id", sa.Integer, nullable=False),
        sa.Column("name", sa.String(64), nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.PrimaryKeyConstraint("study_id", "name", name="pk_tables"),
        sa.ForeignKeyConstraint(["study_id"], ["studies.id"], name="fk_tables_study_id", ondelete="CASCADE"),
    )


def downgrade() -> None:
    for table in ("tables", "frontier", "measurements", "trials", "assignments", "studies"):
        op.drop_table(table)
