"""Alembic's entry: migrate the engine that `Catalog.migrate` hands over."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from datastore.schema import Table


def _migrate(connection: Connection) -> None:
    context.configure(connection=connection, target_metadata=Table.metadata, render_as_batch=True, compare_type=True)
    with context.begin_transaction():
        context.run_migrations()


_engine = context.config.attributes["engine"]
with _engine.connect() as _connection:
    _migrate(_connection)
    _connection.commit()
