"""The receipt of a lease: which transaction was the last on a study, for whoever had no answer to its commit."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("leases", sa.Column("receipt", sa.String(16)))


def downgrade() -> None:
    op.drop_column("leases", "receipt")
