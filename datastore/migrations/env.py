"""Alembic's entry: migrate the engine that `Catalog.migrate` hands over."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection, text

from datastore.schema import Table

MIGRATION_LOCK = 7240513
"""Key of the PostgreSQL advisory lock that lets one process migrate at a time."""


def _migrate(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True, compare_type=True)
    with context.begin_transaction():
        if connection.dialect.name == "postgresql":
            connection.execute(text(f"SELECT pg_advisory_xact_lock({MIGRATION_LOCK})"))
        context.run_migrations()


_engine = context.config.attributes["engine"]
with _engine.connect() as _connection:
    _migrate(_connection)
    _connection.commit()
