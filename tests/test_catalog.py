"""The catalog: its schema is what the migrations make, names are aliases of one thing, and what is needed stays."""

from __future__ import annotations

import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from gradstore.types import Checkpoint, DatasetSource, Subtask
from sqlalchemy import select

from datastore.catalog import Catalog, utc_now
from datastore.errors import Conflict, InUse, NamedOtherwise, NameTaken, NotFound
from datastore.schema import CheckpointRow, DatasetRow, RunRow, Table, TaskRow

SOURCE = DatasetSource(
    sha256="a" * 64, filename="pool.jsonl", format="jsonl", bytes=10, rows=1, skipped=0, created_at=datetime.now(UTC)
)


MANY = 60  # more than a catalog has connections


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    catalog = Catalog(f"sqlite:///{tmp_path}/catalog.sqlite3")
    catalog.migrate()
    return catalog


def dataset(catalog: Catalog, id: str, *, name: str | None = None, rows: int = 1, replace: bool = False) -> None:
    catalog.add_dataset(
        id=id, rows=rows, bytes=10, origins={"pool": rows}, prefix=None, sources=[SOURCE], name=name, replace=replace
    )


def checkpoint(catalog: Catalog, id: str, model: str = "tiny") -> None:
    catalog.add_checkpoint(
        Checkpoint(
            id=id,
            name=None,
            run=None,
            model=model,
            revision=None,
            method="lora",
            epoch=1,
            step=1,
            learning_rate=1e-4,
            has_moments=True,
            moments_note=None,
            parameters=1,
            precision="float32",
            template="tulu",
            max_length=64,
            bytes=1,
            created_at=utc_now(),
        )
    )


def test_the_migrations_make_the_schema(catalog: Catalog) -> None:
    with catalog.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []


def test_several_processes_may_migrate_at_once(tmp_path: Path) -> None:
    code = f"from datastore.catalog import Catalog; Catalog('sqlite:///{tmp_path}/shared.sqlite3').migrate()"
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(4)]
    errors = [process.communicate(timeout=60)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, errors


def test_times_come_back_in_utc(catalog: Catalog) -> None:
    dataset(catalog, "ds_1")
    created = catalog.dataset("ds_1").created_at
    assert created.tzinfo is not None
    assert abs((utc_now() - created).total_seconds()) < 60


def test_a_name_is_an_alias_of_one_dataset(catalog: Catalog) -> None:
    dataset(catalog, "ds_1", name="pool")
    dataset(catalog, "ds_1", name="pool")
    with pytest.raises(NameTaken, match="replace=true"):
        dataset(catalog, "ds_2", name="pool")
    dataset(catalog, "ds_2", name="pool", replace=True)
    assert catalog.dataset("pool").id == "ds_2"
    assert catalog.dataset("ds_1").name is None


def test_content_that_has_a_name_keeps_it_unless_told_otherwise(catalog: Catalog) -> None:
    dataset(catalog, "ds_1", name="mine")
    with pytest.raises(NamedOtherwise, match="called 'mine' already") as refused:
        dataset(catalog, "ds_1", name="yours")
    assert refused.value.id == "ds_1"
    assert catalog.dataset("mine").id == "ds_1"
    dataset(catalog, "ds_1", name="yours", replace=True)
    assert catalog.dataset("yours").id == "ds_1"
    catalog.rename(DatasetRow, "yours", "ours")
    assert catalog.dataset("ours").id == "ds_1"


def test_a_refused_name_leaves_no_dataset_behind(catalog: Catalog) -> None:
    dataset(catalog, "ds_1", name="pool")
    with pytest.raises(NameTaken):
        dataset(catalog, "ds_2", name="pool")
    with pytest.raises(NotFound, match="GET /datasets"):
        catalog.dataset("ds_2")


def test_a_source_is_recorded_once(catalog: Catalog) -> None:
    dataset(catalog, "ds_1")
    dataset(catalog, "ds_1")
    assert len(catalog.dataset("ds_1").sources) == 1


def test_pages_go_on_where_the_last_one_ended(catalog: Catalog) -> None:
    for number in range(5):
        dataset(catalog, f"ds_{number}")
    first = catalog.datasets(limit=3)
    second = catalog.datasets(limit=3, after=first.data[-1].id)
    assert [row.id for row in [*first.data, *second.data]] == ["ds_4", "ds_3", "ds_2", "ds_1", "ds_0"]
    assert (first.has_more, second.has_more) == (True, False)


def test_a_task_keeps_a_name(catalog: Catalog) -> None:
    subtask = Subtask(name="all", validation=2, test=1, metric="none")
    catalog.add_task(id="task_1", name="mmlu", kind="jsonl", subtasks=[subtask], notes=["odd"], replace=False)
    assert (catalog.task("mmlu").validation, catalog.task("task_1").test) == (2, 1)
    with pytest.raises(Conflict):
        catalog.rename(TaskRow, "mmlu", None)
    catalog.rename(TaskRow, "mmlu", "other")
    assert catalog.task("other").id == "task_1"


def test_a_run_has_one_base_model_and_keeps_the_order_of_its_checkpoints(catalog: Catalog) -> None:
    for number, model in enumerate(["tiny", "tiny", "other"]):
        checkpoint(catalog, f"ck_{number}", model)
    run = catalog.add_run(id="run_1", checkpoints=["ck_1", "ck_0"], name="warm-up")
    assert [one.id for one in run.checkpoints] == ["ck_1", "ck_0"]
    assert catalog.checkpoint("ck_0").run == "run_1"
    with pytest.raises(Conflict, match="base model"):
        catalog.add_run(id="run_2", checkpoints=["ck_0", "ck_2"], name=None)


def test_a_checkpoint_of_a_run_is_not_deleted(catalog: Catalog) -> None:
    checkpoint(catalog, "ck_1")
    catalog.add_run(id="run_1", checkpoints=["ck_1"], name=None)
    with pytest.raises(InUse, match="run_1"):
        catalog.remove(CheckpointRow, "ck_1")
    catalog.remove(RunRow, "run_1")
    assert catalog.remove(CheckpointRow, "ck_1") == "ck_1"


def test_what_a_selection_needs_is_not_deleted(catalog: Catalog) -> None:
    dataset(catalog, "ds_1")
    catalog.add_selection(id="sel_1", recipe={"datasets": ["ds_1"], "tasks": []}, summary={"count": 1})
    with pytest.raises(InUse, match="sel_1"):
        catalog.remove(DatasetRow, "ds_1")


def test_an_unknown_name_says_where_to_look(catalog: Catalog) -> None:
    with pytest.raises(NotFound, match=r"no run is called 'x'; GET /runs"):
        catalog.run("x")


def test_a_catalog_that_cannot_be_opened_is_not_alive(tmp_path: Path) -> None:
    catalog = Catalog(f"sqlite:///{tmp_path}/catalog.sqlite3")
    assert catalog.alive()
    catalog.close()
    (tmp_path / "catalog.sqlite3").unlink()
    (tmp_path / "catalog.sqlite3").mkdir()
    assert not catalog.alive()


@pytest.mark.parametrize("kind", ["sqlite", pytest.param("postgresql", marks=pytest.mark.services)])
def test_writers_that_wait_take_no_connection_from_readers(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = (
        f"sqlite:///{tmp_path}/c.sqlite3" if kind == "sqlite" else request.getfixturevalue("postgres_server").database()
    )
    catalog = Catalog(url)
    catalog.migrate()
    with ThreadPoolExecutor(MANY) as others:
        with catalog.transaction() as session:
            session.execute(select(DatasetRow.id)).all()  # the first statement takes a connection and the lock
            writers = [others.submit(dataset, catalog, f"ds_{number}") for number in range(MANY)]
            for _ in range(20):
                time.sleep(0.01)
                assert set(catalog.dataset_sizes()) == set()  # also by whoever holds the lock
                assert catalog.engine.pool.checkedout() == 1  # type: ignore[attr-defined]
        for writer in writers:
            writer.result()
    assert len(catalog.dataset_sizes()) == MANY
    catalog.close()
