"""A checksum of each study's frontier, whose members are under no other one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"


def upgrade() -> None:
    op.add_column("studies", sa.Column("members", sa.String(48)))


def downgrade() -> None:
    op.drop_column("studies", "members")
