"""An upgrade keeps every row of a filled catalog, on both databases."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import JSON, Boolean, DateTime, Float, Integer, MetaData, Table, select

import datastore
from datastore.catalog import Catalog
from datastore.schema import Table as Schema

FIRST = "0001"
ROWS = 3


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Catalog]:
    url = f"sqlite:///{tmp_path}/catalog.sqlite3"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_server").database()
    catalog = Catalog(url)
    yield catalog
    catalog.close()


def migrate_to(catalog: Catalog, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(Path(datastore.__file__).parent / "migrations"))
    config.attributes["engine"] = catalog.engine
    command.upgrade(config, revision)


def tables(catalog: Catalog) -> list[Table]:
    """The tables that the database has, in an order in which rows can be written."""
    found = MetaData()
    found.reflect(catalog.engine)
    return [table for table in found.sorted_tables if table.name != "alembic_version"]


def row(table: Table, number: int) -> dict[str, Any]:
    """A made-up row; what refers to another table's row refers to the one of the same number."""
    values: dict[str, Any] = {}
    for column in table.columns:
        if isinstance(column.type, DateTime):
            values[column.name] = datetime(2026, 1, 1 + number, tzinfo=UTC)
        elif isinstance(column.type, Boolean):
            values[column.name] = bool(number % 2)
        elif isinstance(column.type, (Integer, Float)):
            values[column.name] = number + 1
        elif isinstance(column.type, JSON):
            values[column.name] = {"number": number}
        else:
            key = next(iter(column.foreign_keys), None)
            values[column.name] = (
                f"{key.column.table.name}.{key.column.name}.{number}"
                if key is not None
                else (f"{table.name}.{column.name}.{number}")
            )
    return values


def content(catalog: Catalog) -> dict[str, list[dict[str, Any]]]:
    found = tables(catalog)
    with catalog.engine.connect() as connection:
        return {table.name: [dict(row) for row in connection.execute(select(table)).mappings()] for table in found}


def test_a_filled_catalog_keeps_its_rows_when_it_is_upgraded(catalog: Catalog) -> None:
    migrate_to(catalog, FIRST)
    made = tables(catalog)
    with catalog.engine.begin() as connection:
        for table in made:
            connection.execute(table.insert(), [row(table, number) for number in range(ROWS)])
    before = content(catalog)
    assert {len(rows) for rows in before.values()} == {ROWS}

    catalog.migrate()
    after = content(catalog)
    for name, rows in before.items():
        kept = [{column: found[column] for column in rows[0]} for found in after[name]]
        assert kept == rows, name
    with catalog.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Schema.metadata) == []
