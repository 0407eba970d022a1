"""The schema and its changes, one Alembic revision each."""
