"""Receipts of leases: which transaction was the last on a study, for whoever had no answer to its commit; and checksums
of trials, against bits that a disk turns."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.add_column("leases", sa.Column("receipt", sa.String(16)))
    op.add_column("trials", sa.Column("checksum", sa.String(32)))


def downgrade() -> None:
    op.drop_column("trials", "checksum")
    op.drop_column("leases", "receipt")
