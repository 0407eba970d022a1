"""Run by Alembic for every migration. `autoq.store.database` opens the connection and the transaction."""

from __future__ import annotations

from alembic import context

from autoq.store.models import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    version_table=VERSION_TABLE,
)
with context.begin_transaction():
    context.run_migrations()
