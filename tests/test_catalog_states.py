"""The catalog's state: it stays while nothing is committed, and no commit leaves it as it was, whoever makes it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from gradstore.types import DatasetSource

from datastore.catalog import Catalog, utc_now
from datastore.catalog_states import Remembered
from datastore.schema import DatasetRow


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def catalogs(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Catalog, Catalog]]:
    """Two handles on one catalog, as two processes have them."""
    if request.param == "sqlite":
        url = f"sqlite:///{tmp_path}/catalog.sqlite3"
    else:
        url = request.getfixturevalue("postgres_server").database()
    one, other = Catalog(url), Catalog(url)
    one.migrate()
    yield one, other
    one.close()
    other.close()


def add(catalog: Catalog, id: str) -> None:
    source = DatasetSource(
        sha256=id, filename="pool.jsonl", format="jsonl", bytes=10, rows=1, skipped=0, created_at=utc_now()
    )
    catalog.add_dataset(id=id, rows=1, bytes=10, origins={}, prefix=None, sources=[source], name=None, replace=False)


def test_reading_leaves_the_state_as_it_is(catalogs: tuple[Catalog, Catalog]) -> None:
    one, other = catalogs
    add(one, "ds_1")
    before = one.state(), other.state()
    for catalog in catalogs:
        assert catalog.dataset("ds_1").id == "ds_1"
    assert (one.state(), other.state()) == before


def test_every_commit_changes_it_for_everybody(catalogs: tuple[Catalog, Catalog]) -> None:
    seen = [tuple(catalog.state() for catalog in catalogs)]
    for number, writer in enumerate([*catalogs, *catalogs]):
        add(writer, f"ds_{number}")
        seen.append(tuple(catalog.state() for catalog in catalogs))
    writer.rename(DatasetRow, "ds_0", "pool")
    seen.append(tuple(catalog.state() for catalog in catalogs))
    writer.remove(DatasetRow, "ds_1")
    seen.append(tuple(catalog.state() for catalog in catalogs))
    for states in zip(*seen, strict=True):
        assert len(set(states)) == len(seen)


def test_what_is_looked_at_while_somebody_writes_is_not_what_is_seen_after_the_commit(
    catalogs: tuple[Catalog, Catalog],
) -> None:
    one, other = catalogs
    add(one, "ds_1")
    with one.transaction() as session:
        row = session.get_one(DatasetRow, "ds_1")
        row.name = "pool"
        session.flush()
        within = other.state()
        assert other.dataset("ds_1").name is None
    assert other.state() != within
    assert other.dataset("ds_1").name == "pool"


def test_a_catalog_opened_again_is_in_no_state_that_was_seen(tmp_path: Path) -> None:
    catalog = Catalog(f"sqlite:///{tmp_path}/catalog.sqlite3")
    catalog.migrate()
    before = catalog.state()
    catalog.close()
    assert catalog.state() != before
    catalog.close()


def test_what_was_found_is_remembered_in_its_state_only_and_no_more_than_so_many() -> None:
    remembered, looks = Remembered[int](most=2), list[int]()

    def look() -> int:
        looks.append(len(looks))
        return looks[-1]

    assert [remembered.get("a", 1, look), remembered.get("a", 1, look), remembered.get("b", 1, look)] == [0, 0, 1]
    assert [remembered.get("a", 2, look), remembered.get("a", 1, look)] == [2, 3], "of each key one state is kept"
    assert [remembered.get("c", 1, look), remembered.get("b", 1, look)] == [4, 5], "a third one is no longer there"

    def nothing() -> int:
        raise KeyError

    with pytest.raises(KeyError):
        remembered.get("d", 1, nothing)
    assert remembered.get("d", 1, look) == 6
