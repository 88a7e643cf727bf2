"""The catalog: what exists, under which names, and what needs what. SQLite by default, PostgreSQL when configured.

Rows in, `gradstore.types` out. Jobs and their shards are in `datastore/leases.py`, features in `datastore/features.py`;
they share this module's engine and transactions.
"""

from __future__ import annotations

import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from gradstore.types import Adapter, Checkpoint, Dataset, DatasetSource, Page, Run, Subtask, Task, Taxonomy
from sqlalchemy import ColumnElement, Select, create_engine, delete, event, func, select, text, tuple_, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import IntegrityError, OperationalError
from sqlalchemy.orm import Session, sessionmaker

from datastore.catalog_states import PostgresqlStates, SqliteStates, States
from datastore.errors import Busy, Conflict, InUse, NamedOtherwise, NameTaken, NotFound
from datastore.schema import (
    AdapterRow,
    AdapterTargetRow,
    CheckpointRow,
    DatasetRow,
    IdempotencyRow,
    JobRow,
    Noun,
    RunCheckpointRow,
    RunRow,
    SelectionRow,
    SourceRow,
    Table,
    TaskRow,
    TaxonomyRow,
    UseRow,
)

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT = 30.0  # seconds that a writer waits for another
SQLITE_CONNECTIONS = 16
"""Kept open by a process, more than cores read at a time. Each keeps up to 2 MB of the catalog's pages in memory."""
WRITER_LOCK = 7240513
"""Key of the PostgreSQL advisory lock that a writing transaction holds: there, too, one writes at a time."""
_SILENCE = {
    "connect_timeout": 10,  # seconds
    "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3,
    "tcp_user_timeout": 30_000,  # milliseconds
}  # fmt: skip
"""How long a PostgreSQL that has gone silent, its host off or a router without memory, is waited for: by default two
hours, in which a worker would hang in its heartbeat or its commit."""
IDEMPOTENCY_LIFETIME = timedelta(days=1)
IDEMPOTENCY_WORK = timedelta(minutes=10)  # a request that has not answered by then is taken for dead
NounT = TypeVar("NounT", bound=Noun)


PART = "part_"
"""In a cascade's plan: what the names of its parts begin with."""


def utc_now() -> datetime:
    """The present time, aware."""
    return datetime.now(UTC)


class Catalog:
    """A handle on the catalog's database."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = _engine(url)
        self._writers = sessionmaker(self.engine, expire_on_commit=False)
        self._notes = sessionmaker(self.engine.execution_options(beside_others=True), expire_on_commit=False)
        readers = self.engine.execution_options(reading=True)
        self._readers = sessionmaker(readers, expire_on_commit=False)
        sqlite = self.engine.dialect.name == "sqlite"
        self._turn = Lock()
        self._states: States = SqliteStates(_database(url)) if sqlite else PostgresqlStates(readers)

    def migrate(self) -> None:
        """Bring the database to this version's schema; several processes may do so at once."""
        config = Config()
        config.set_main_option("script_location", str(MIGRATIONS))
        config.attributes["engine"] = self.engine
        command.upgrade(config, "head")

    def revisions(self) -> tuple[str | None, str]:
        """The database's schema, None before there is any, and the one that this version works with."""
        with self.engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
        return found, str(ScriptDirectory(str(MIGRATIONS)).get_current_head())

    def close(self) -> None:
        """Give the connections back."""
        self._states.close()
        self.engine.dispose()

    @contextmanager
    def transaction(self) -> Iterator[Session]:
        """A session that commits at its end, or rolls back when left by an exception. Raises `Busy`.

        The writers of a process wait for each other without a connection: held by those who wait, all connections would
        be gone, and with them those that readers need, and the writer whose turn it is where it looks something up.
        """
        if not self._turn.acquire(timeout=BUSY_TIMEOUT):
            raise Busy(f"the catalog has been written to for {BUSY_TIMEOUT:g} s without a break: try again")
        try:
            with self._writers.begin() as session:
                yield session
        finally:
            self._turn.release()

    @contextmanager
    def noting(self) -> Iterator[Session]:
        """A transaction for what the caller alone writes and decides nothing: on PostgreSQL it waits for nobody."""
        if self.engine.dialect.name == "sqlite":  # which has one writer whatever it writes
            with self.transaction() as session:
                yield session
            return
        with self._notes.begin() as session:
            yield session

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A session that only reads: on SQLite it waits for no writer."""
        with self._readers() as session:
            yield session

    def state(self) -> Hashable:
        """A value that comes again only where nothing was committed in between: what was read is then still so."""
        return self._states.now()

    def now(self, session: Session) -> float:
        """The present in Unix seconds, by the clock that all hosts share: PostgreSQL's own. SQLite has one host."""
        if self.engine.dialect.name == "postgresql":
            # now() would be the beginning of the transaction, before it waited for its turn
            return float(session.execute(select(func.extract("epoch", func.clock_timestamp()))).scalar_one())
        return time.time()

    def alive(self) -> bool:
        """Whether the database answers."""
        try:
            with self.reading() as session:
                session.execute(text("SELECT 1"))
        except OperationalError:
            return False
        return True

    # Datasets -----------------------------------------------------------------------------------------------------

    def add_dataset(
        self,
        *,
        id: str,
        rows: int,
        bytes: int,
        origins: dict[str, int],
        prefix: str | None,
        sources: Sequence[DatasetSource],
        name: str | None,
        replace: bool,
    ) -> Dataset:
        """Record a dataset, or more sources of a dataset that exists. Raises `NameTaken`."""
        with self.transaction() as session:
            row = session.get(DatasetRow, id)
            if row is None:
                if prefix is not None and session.get(DatasetRow, prefix) is None:  # deleted since the rows were read
                    prefix = None
                row = DatasetRow(
                    id=id, name=None, rows=rows, bytes=bytes, origins=origins, prefix=prefix, created_at=utc_now()
                )
                session.add(row)
                session.flush()
            for source in sources:
                if session.get(SourceRow, (id, source.sha256)) is None:
                    session.add(SourceRow(dataset_id=id, **source.model_dump()))
            if name is not None:
                _give_name(session, DatasetRow, row, name, replace=replace)
            session.flush()
            return _dataset(session, row)

    def dataset(self, reference: str) -> Dataset:
        """A dataset by id or name. Raises `NotFound`."""
        with self.reading() as session:
            return _dataset(session, _find(session, DatasetRow, reference))

    def datasets(self, *, limit: int, after: str | None = None) -> Page[Dataset]:
        """A page of datasets, newest first."""
        with self.reading() as session:
            rows, has_more = _page(session, DatasetRow, limit=limit, after=after)
            return Page[Dataset](data=[_dataset(session, row) for row in rows], has_more=has_more)

    def dataset_sizes(self) -> dict[str, int]:
        """Rows of every dataset: an upload looks for its longest stored prefix among them."""
        with self.reading() as session:
            return {row.id: row.rows for row in session.execute(select(DatasetRow.id, DatasetRow.rows))}

    def parts(self) -> set[str]:
        """The datasets that cascades have made of rows of others."""
        with self.reading() as session:
            plans = list(session.scalars(select(JobRow.plan).where(JobRow.kind == "cascade")))
        return {part for plan in plans for name, part in plan.items() if name.startswith(PART) and part is not None}

    def pools(self) -> list[str]:
        """The datasets that may be meant where none is named: all but the parts of cascades."""
        sizes, parts = self.dataset_sizes(), self.parts()
        return [id for id in sizes if id not in parts]

    def sources_of_others(self, dataset: str) -> set[str]:
        """Hashes of the uploads that other datasets hold."""
        with self.reading() as session:
            return set(session.scalars(select(SourceRow.sha256).where(SourceRow.dataset_id != dataset)))

    # Tasks --------------------------------------------------------------------------------------------------------

    def add_task(
        self, *, id: str, name: str, kind: str, subtasks: Sequence[Subtask], notes: Sequence[str], replace: bool
    ) -> Task:
        """Record a task under its name. Raises `NameTaken`."""
        with self.transaction() as session:
            row = session.get(TaskRow, id)
            if row is None:
                stored = [subtask.model_dump() for subtask in subtasks]
                row = TaskRow(id=id, name=None, kind=kind, subtasks=stored, notes=list(notes), created_at=utc_now())
                session.add(row)
                session.flush()
            _give_name(session, TaskRow, row, name, replace=replace)
            session.flush()
            return _task(row)

    def task(self, reference: str) -> Task:
        """A task by id or name. Raises `NotFound`."""
        with self.reading() as session:
            return _task(_find(session, TaskRow, reference))

    def tasks(self, *, limit: int, after: str | None = None) -> Page[Task]:
        """A page of tasks, newest first."""
        with self.reading() as session:
            rows, has_more = _page(session, TaskRow, limit=limit, after=after)
            return Page[Task](data=[_task(row) for row in rows], has_more=has_more)

    # Checkpoints and runs -------------------------------------------------------------------------------------------

    def add_checkpoint(self, checkpoint: Checkpoint, *, replace: bool = False) -> Checkpoint:
        """Record a checkpoint; one of the same content is returned as it is."""
        with self.transaction() as session:
            row = record_checkpoint(session, checkpoint)
            if checkpoint.name is not None:
                _give_name(session, CheckpointRow, row, checkpoint.name, replace=replace or None)
            session.flush()
            return _checkpoint(session, row)

    def checkpoint(self, reference: str) -> Checkpoint:
        """A checkpoint by id or name. Raises `NotFound`."""
        with self.reading() as session:
            return _checkpoint(session, _find(session, CheckpointRow, reference))

    def checkpoints(self, *, limit: int, after: str | None = None) -> Page[Checkpoint]:
        """A page of checkpoints, newest first."""
        with self.reading() as session:
            rows, has_more = _page(session, CheckpointRow, limit=limit, after=after)
            return Page[Checkpoint](data=_checkpoints(session, rows), has_more=has_more)

    def add_run(self, *, id: str, checkpoints: Sequence[str], name: str | None, finetune: str | None = None) -> Run:
        """Record the checkpoints (ids) of one training, in order. Raises `Conflict` where their base models differ."""
        with self.transaction() as session:
            row = record_run(session, id=id, checkpoints=checkpoints, finetune=finetune)
            if name is not None:
                _give_name(session, RunRow, row, name, replace=None)
            session.flush()
            return _run(session, row)

    def run(self, reference: str) -> Run:
        """A run by id or name. Raises `NotFound`."""
        with self.reading() as session:
            return _run(session, _find(session, RunRow, reference))

    def runs(self, *, limit: int, after: str | None = None) -> Page[Run]:
        """A page of runs, newest first."""
        with self.reading() as session:
            rows, has_more = _page(session, RunRow, limit=limit, after=after)
            return Page[Run](data=_runs(session, rows), has_more=has_more)

    def all_runs(self) -> list[Run]:
        """Every run, oldest first."""
        with self.reading() as session:
            return _runs(session, session.scalars(select(RunRow).order_by(RunRow.created_at, RunRow.id)).all())

    # Adapters -------------------------------------------------------------------------------------------------------

    def add_adapter(self, row: AdapterRow, *, targets: Iterable[str], name: str | None) -> tuple[Adapter, bool]:
        """Record an adapter, or return the one of the same content; says whether it is new.

        Raises `NameTaken`, `NamedOtherwise`, and `NotFound` where its checkpoint has been deleted meanwhile.
        """
        with self.transaction() as session:
            known = session.get(AdapterRow, row.id)
            if known is None:
                use(session, user=row.id, used=[row.checkpoint_id])
                session.add(row)
                session.flush()
                session.add_all(AdapterTargetRow(adapter_id=row.id, target=target) for target in targets)
            found = known or row
            if name is not None:
                _give_name(session, AdapterRow, found, name, replace=None)
            session.flush()
            return _adapters(session, [found])[0], known is None

    def adapter(self, reference: str) -> Adapter:
        """An adapter by id or name. Raises `NotFound`."""
        with self.reading() as session:
            return _adapters(session, [_find(session, AdapterRow, reference)])[0]

    def adapters(
        self,
        *,
        limit: int,
        after: str | None = None,
        base_model: str | None = None,
        revision: str | None = None,
        rank: int | None = None,
        target: Sequence[str] = (),
        dataset: str | None = None,
    ) -> Page[Adapter]:
        """A page of adapters, newest first: of this base model, rank and dataset (id), and on all of these targets."""
        of_base = {"model": base_model, "revision": revision}
        own = {"rank": rank, "dataset": dataset}
        where = [getattr(AdapterRow, name) == value for name, value in own.items() if value is not None]
        checkpoints = select(CheckpointRow.id).filter_by(**{k: v for k, v in of_base.items() if v is not None})
        where += [AdapterRow.checkpoint_id.in_(checkpoints)]
        for each in target:
            on_it = select(AdapterTargetRow.adapter_id).where(AdapterTargetRow.target == each)
            where.append(AdapterRow.id.in_(on_it))
        if not all(map(_is_text, filter(None, [base_model, revision, *target]))):
            return Page[Adapter](data=[], has_more=False)
        with self.reading() as session:
            rows, has_more = _page(session, AdapterRow, *where, limit=limit, after=after)
            return Page[Adapter](data=_adapters(session, rows), has_more=has_more)

    # Selections -----------------------------------------------------------------------------------------------------

    def add_selection(self, *, id: str, recipe: dict[str, Any], summary: dict[str, Any]) -> SelectionRow:
        """Record a selection under the hash of its recipe; asking again returns the first.

        Raises `NotFound` where one of its datasets or tasks is not there any more.
        """
        with self.transaction() as session:
            row = session.get(SelectionRow, id)
            if row is None:
                row = SelectionRow(id=id, name=None, recipe=recipe, summary=summary, created_at=utc_now())
                session.add(row)
                use(session, user=id, used=_needed(recipe))
            return row

    def selection(self, reference: str) -> SelectionRow:
        """A selection by id or name. Raises `NotFound`."""
        with self.reading() as session:
            return _find(session, SelectionRow, reference)

    def selections(self, *, limit: int, after: str | None = None) -> tuple[list[SelectionRow], bool]:
        """A page of selections, newest first, and whether there are more."""
        with self.reading() as session:
            return _page(session, SelectionRow, limit=limit, after=after)

    # Taxonomies -----------------------------------------------------------------------------------------------------

    def add_taxonomy(self, *, id: str, capabilities: list[dict[str, Any]], name: str | None = None) -> Taxonomy:
        """Record a taxonomy; one of the same content is returned as it is. Raises `NameTaken`."""
        with self.transaction() as session:
            row = session.get(TaxonomyRow, id)
            if row is None:
                row = TaxonomyRow(id=id, name=None, capabilities=capabilities, created_at=utc_now())
                session.add(row)
                session.flush()
            if name is not None:
                _give_name(session, TaxonomyRow, row, name, replace=None)
            return Taxonomy.model_validate(_columns(row))

    def taxonomy(self, reference: str) -> Taxonomy:
        """A taxonomy by id or name. Raises `NotFound`."""
        with self.reading() as session:
            return Taxonomy.model_validate(_columns(_find(session, TaxonomyRow, reference)))

    def taxonomies(self, *, limit: int, after: str | None = None) -> Page[Taxonomy]:
        """A page of taxonomies, newest first."""
        with self.reading() as session:
            rows, has_more = _page(session, TaxonomyRow, limit=limit, after=after)
            return Page[Taxonomy](data=[Taxonomy.model_validate(_columns(row)) for row in rows], has_more=has_more)

    # All nouns ------------------------------------------------------------------------------------------------------

    def rename(self, noun: type[Noun], reference: str, name: str | None) -> str:
        """Give a resource another name, or none, and return its id. Raises `NotFound`, `NameTaken`."""
        with self.transaction() as session:
            row = _find(session, noun, reference)
            if name is None:
                if noun is TaskRow:
                    raise Conflict("a task is always asked for by name: give it another one instead")
                row.name = None
            else:
                _take_name(session, noun, row, name, replace=None)
            return row.id

    def remove(self, noun: type[Noun], reference: str, *, delete_files: Callable[[str], None] = lambda _: None) -> str:
        """Delete a resource's record and return its id. Raises `NotFound`, and `InUse` naming who still needs it.

        `delete_files` is called with the id before others can record the same content again.
        """
        with self.transaction() as session:
            row = _find(session, noun, reference)
            users = sorted(session.scalars(select(UseRow.user).where(UseRow.used == row.id)))
            if noun is CheckpointRow:
                users += session.scalars(
                    select(RunCheckpointRow.run_id).where(RunCheckpointRow.checkpoint_id == row.id)
                )
            if users:
                raise InUse(_noun_name(noun), row.id, users)
            session.execute(delete(UseRow).where(UseRow.user == row.id))
            if isinstance(row, DatasetRow):
                _bridge(session, row)
            session.delete(row)
            session.flush()
            delete_files(row.id)
            return row.id

    def unknown(self, known: Select[str], found: Iterable[str]) -> list[str]:
        """The ids of `found` that `known` does not select."""
        with self.reading() as session:
            return _unknown(session, known, found)

    def delete_unknown(
        self, known: Select[str], found: Iterable[str], *, delete_files: Callable[[str], None]
    ) -> list[str]:
        """Call `delete_files` for the ids of `found` that `known` does not select, and return them: while it is called,
        nobody can record one of them.
        """
        with self.transaction() as session:
            unknown = _unknown(session, known, found)
            for id in unknown:
                delete_files(id)
            return unknown

    # Idempotency ------------------------------------------------------------------------------------------------------

    def reserve_key(self, key: str, fingerprint: str) -> IdempotencyRow | None:
        """Take an Idempotency-Key: None when it is new, else the first request's record, without a status while that
        request is at work. Raises `Conflict` when the key came with another request.
        """
        mine: dict[str, Any] = {"key": key, "fingerprint": fingerprint, "created_at": utc_now()}
        try:
            with self.transaction() as session:
                session.execute(delete(IdempotencyRow).where(outlived(mine["created_at"])))
                row = session.get(IdempotencyRow, key)
                if row is None:
                    session.add(IdempotencyRow(**mine))
                    return None
        except IntegrityError:  # another request took it just now
            return IdempotencyRow(**mine)
        if row.fingerprint != fingerprint:
            raise Conflict("this Idempotency-Key came with another request before; use a new key for a new request")
        return row

    def remember_answer(self, key: str, *, status: int, headers: dict[str, str], body: Any) -> None:
        """Keep the answer to the request that took this key."""
        with self.transaction() as session:
            values = {"status": status, "headers": headers, "body": {"json": body}}
            session.execute(update(IdempotencyRow).where(IdempotencyRow.key == key).values(**values))

    def free_unanswered_keys(self) -> int:
        """Give back the keys of requests that were at work when the server died; returns how many there were.

        Where another server is at work on one after all, a repeated request may be done twice, and comes to the same
        ids: everything is named by its content.
        """
        with self.transaction() as session:
            found = session.scalars(select(IdempotencyRow).where(IdempotencyRow.status.is_(None))).all()
            for row in found:
                session.delete(row)
            return len(found)

    def free_key(self, key: str) -> None:
        """Give back a key whose request was refused: the corrected request may use it."""
        with self.transaction() as session:
            session.execute(delete(IdempotencyRow).where(IdempotencyRow.key == key, IdempotencyRow.status.is_(None)))


def outlived(now: datetime) -> ColumnElement[bool]:
    """Whether a key's day is over, or the server died with the request that took it."""
    died = IdempotencyRow.status.is_(None) & (IdempotencyRow.created_at < now - IDEMPOTENCY_WORK)
    return died | (IdempotencyRow.created_at < now - IDEMPOTENCY_LIFETIME)


def record_checkpoint(session: Session, checkpoint: Checkpoint) -> CheckpointRow:
    """Record a checkpoint, without its name, in a transaction of the caller's: a worker's commit is one."""
    row = session.get(CheckpointRow, checkpoint.id)
    if row is None:
        row = CheckpointRow(**checkpoint.model_dump(exclude={"run", "name"}), name=None)
        session.add(row)
        session.flush()
    return row


def record_run(session: Session, *, id: str, checkpoints: Sequence[str], finetune: str | None = None) -> RunRow:
    """Record a run in a transaction of the caller's. Raises `NotFound`, and `Conflict` where base models differ."""
    row = session.get(RunRow, id)
    if row is None:
        found = [_find(session, CheckpointRow, reference) for reference in checkpoints]
        bases = {(checkpoint.model, checkpoint.revision): checkpoint.id for checkpoint in found[::-1]}
        if len(bases) > 1:
            raise Conflict(_several_bases(bases))
        model, revision = next(iter(bases))
        row = RunRow(id=id, name=None, model=model, revision=revision, finetune=finetune, created_at=utc_now())
        session.add(row)
        session.flush()
        for position, checkpoint in enumerate(found):
            session.add(RunCheckpointRow(run_id=id, position=position, checkpoint_id=checkpoint.id))
        session.flush()
    return row


def _several_bases(checkpoints: Mapping[tuple[str, str | None], str]) -> str:
    """Say which base models the checkpoints have, by one checkpoint of each."""
    found = (
        f"{checkpoint} was trained on {model}" + (f" at revision {revision}" if revision else "")
        for (model, revision), checkpoint in sorted(checkpoints.items(), key=lambda one: one[1])
    )
    return f"the checkpoints of a run share one base model; {', '.join(found)}: make a run of each"


def use(session: Session, *, user: str, used: Iterable[str]) -> None:
    """Record what a job, a selection or an adapter depends on, in the transaction that records it.

    Raises `NotFound` for an id that has been deleted since it was looked up.
    """
    for id in sorted(set(used)):
        noun = USABLE.get(id.partition("_")[0], JobRow)
        if session.get(noun, id) is None:
            raise NotFound(_noun_name(noun), id, collection=f"/{noun.__tablename__}")
        session.add(UseRow(user=user, used=id))


def _needed(recipe: dict[str, Any]) -> list[str]:
    """What a selection cannot be chosen again without, its features apart."""
    several = ("datasets", "tasks", "exclude", "decontaminate")
    return [
        *(id for name in several for id in recipe.get(name, [])),
        *filter(None, [recipe.get("match"), recipe.get("by")]),
    ]


def name_if_free(session: Session, row: Noun, name: str) -> None:
    """Name a resource that has no name yet, unless another of its kind is called so."""
    noun = type(row)
    if row.name is None and session.scalar(select(noun.id).where(noun.name == name)) is None:
        row.name = name


def _engine(url: str) -> Engine:
    return _sqlite(url) if url.startswith("sqlite") else _postgresql(url)


def _database(url: str) -> str:
    return url.removeprefix("sqlite:///")


def _sqlite(url: str) -> Engine:
    Path(_database(url)).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(
        url, connect_args={"timeout": BUSY_TIMEOUT}, hide_parameters=True, pool_size=SQLITE_CONNECTIONS
    )

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        connection.isolation_level = None  # the BEGIN below is ours: sqlite3's own is deferred
        connection.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT * 1000)}")
        _use_wal(connection)
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("PRAGMA foreign_keys = ON")

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        # A deferred transaction that turns into a writer fails at once ("database is locked"); an immediate one waits.
        connection.exec_driver_sql("BEGIN" if _only_reads(connection) else "BEGIN IMMEDIATE")

    return engine


def _postgresql(url: str) -> Engine:
    """What is looked at and then written must not be another's between the two (docs/decisions/one-writer.md)."""
    engine = create_engine(url, pool_pre_ping=True, hide_parameters=True, connect_args=_SILENCE)

    @event.listens_for(engine, "connect")
    def _configure(connection: Any, _: Any) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = {int(BUSY_TIMEOUT * 1000)}")
            cursor.execute("SET idle_in_transaction_session_timeout = '10min'")  # of a writer that hangs
        connection.commit()

    @event.listens_for(engine, "begin")
    def _begin(connection: Any) -> None:
        if not (_only_reads(connection) or connection.get_execution_options().get("beside_others")):
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({WRITER_LOCK})")

    return engine


def _only_reads(connection: Any) -> bool:
    return bool(connection.get_execution_options().get("reading", False))


def _use_wal(connection: sqlite3.Connection) -> None:
    """Switch to write-ahead logging, which takes a lock that busy_timeout does not wait for."""
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        else:
            return


def _find(session: Session, noun: type[NounT], reference: str) -> NounT:
    found: Sequence[NounT] = ()
    if _is_text(reference):  # what no database takes is no name of anything
        found = session.scalars(select(noun).where((noun.id == reference) | (noun.name == reference))).all()
    if not found:
        raise NotFound(_noun_name(noun), reference, collection=f"/{noun.__tablename__}")
    return next((row for row in found if row.id == reference), found[0])


def _is_text(reference: str) -> bool:
    """Whether a text has neither a NUL nor lone surrogates, half of a pair that JSON can hold."""
    return not any(letter == "\0" or "\ud800" <= letter <= "\udfff" for letter in reference)


def _bridge(session: Session, row: DatasetRow) -> None:
    """Tie the datasets that begin with a dataset about to be deleted to the one that it begins with: no gradients of an
    earlier version are out of reach for a later one.
    """
    session.execute(update(DatasetRow).where(DatasetRow.prefix == row.id).values(prefix=row.prefix))


USABLE: dict[str, type[Table]] = {
    "ds": DatasetRow, "task": TaskRow, "ck": CheckpointRow, "sel": SelectionRow, "tax": TaxonomyRow, "ad": AdapterRow
}  # fmt: skip
"""What can be needed by something else, by the beginning of its id; all others are jobs."""


def _noun_name(noun: type[Table]) -> str:
    return "taxonomy" if noun is TaxonomyRow else str(noun.__tablename__).removesuffix("s")


def _give_name(session: Session, noun: type[Noun], row: Noun, name: str, *, replace: bool | None) -> None:
    """Name what was sent; content that is known under another name keeps it, since somebody relies on that."""
    if row.name not in (None, name) and not replace:
        otherwise = "rename it" if replace is None else "send replace=true to give it this one"
        raise NamedOtherwise(row.id, row.name or "", otherwise=otherwise)
    _take_name(session, noun, row, name, replace=replace)


def _take_name(session: Session, noun: type[Noun], row: Noun, name: str, *, replace: bool | None) -> None:
    """Give a resource a name; `replace` is None where nobody can ask for it. Raises `NameTaken`."""
    holder = session.scalar(select(noun).where(noun.name == name))
    if holder is not None and holder.id != row.id:
        if not replace:
            raise NameTaken(_noun_name(noun), name, holder.id, movable=replace is not None)
        holder.name = None
        session.flush()
    row.name = name


def _page(
    session: Session, noun: type[NounT], *where: ColumnElement[bool], limit: int, after: str | None
) -> tuple[list[NounT], bool]:
    query = select(noun).where(*where)
    if after is not None:
        last = _find(session, noun, after)
        query = query.where(tuple_(noun.created_at, noun.id) < (last.created_at, last.id))
    return take(session, query.order_by(noun.created_at.desc(), noun.id.desc()), limit)


RowT = TypeVar("RowT")


def take(session: Session, query: Select[RowT], limit: int) -> tuple[list[RowT], bool]:
    """The first `limit` rows of a query, and whether there are more."""
    rows = list(session.scalars(query.limit(limit + 1)))
    return rows[:limit], len(rows) > limit


def _dataset(session: Session, row: DatasetRow) -> Dataset:
    query = select(SourceRow).where(SourceRow.dataset_id == row.id).order_by(SourceRow.created_at)
    sources = [DatasetSource.model_validate(source, from_attributes=True) for source in session.scalars(query)]
    return Dataset.model_validate({**_columns(row), "sources": sources})


def _task(row: TaskRow) -> Task:
    subtasks = [Subtask.model_validate(subtask) for subtask in row.subtasks]
    validation, test = (sum(getattr(subtask, split) for subtask in subtasks) for split in ("validation", "test"))
    # A task whose name was taken over by other content is known by its id.
    values = {**_columns(row), "name": row.name or row.id, "subtasks": subtasks, "validation": validation, "test": test}
    return Task.model_validate(values)


def _checkpoint(session: Session, row: CheckpointRow) -> Checkpoint:
    return _checkpoints(session, [row])[0]


def _checkpoints(session: Session, rows: Sequence[CheckpointRow]) -> list[Checkpoint]:
    """Checkpoints, each with the run that it belongs to: of several the first by id."""
    query = (
        select(RunCheckpointRow.checkpoint_id, func.min(RunCheckpointRow.run_id).label("run"))
        .where(RunCheckpointRow.checkpoint_id.in_([row.id for row in rows]))
        .group_by(RunCheckpointRow.checkpoint_id)
    )
    runs = {found.checkpoint_id: found.run for found in session.execute(query)}
    return [Checkpoint.model_validate({**_columns(row), "run": runs.get(row.id)}) for row in rows]


def _adapters(session: Session, rows: Sequence[AdapterRow]) -> list[Adapter]:
    """Adapters with what their checkpoints know of them: three queries, however many there are."""
    ids = [row.id for row in rows]
    targets: dict[str, list[str]] = defaultdict(list)
    query = select(AdapterTargetRow).where(AdapterTargetRow.adapter_id.in_(ids)).order_by(AdapterTargetRow.target)
    for found in session.scalars(query):
        targets[found.adapter_id].append(found.target)
    holders = select(CheckpointRow).where(CheckpointRow.id.in_([row.checkpoint_id for row in rows]))
    checkpoints = {checkpoint.id: checkpoint for checkpoint in session.scalars(holders)}
    return [_adapter(row, checkpoints[row.checkpoint_id], targets[row.id]) for row in rows]


def _adapter(row: AdapterRow, checkpoint: CheckpointRow, targets: Sequence[str]) -> Adapter:
    values = {name: getattr(checkpoint, name) for name in ("revision", "parameters", "template", "bytes")}
    values |= {"checkpoint": checkpoint.id, "base_model": checkpoint.model, "targets": targets}
    return Adapter.model_validate({**_columns(row), **values})


def _run(session: Session, row: RunRow) -> Run:
    return _runs(session, [row])[0]


def _runs(session: Session, rows: Sequence[RunRow]) -> list[Run]:
    """Runs with their checkpoints: two queries, however many there are."""
    query = (
        select(RunCheckpointRow.run_id, CheckpointRow)
        .join(CheckpointRow, RunCheckpointRow.checkpoint_id == CheckpointRow.id)
        .where(RunCheckpointRow.run_id.in_([row.id for row in rows]))
        .order_by(RunCheckpointRow.run_id, RunCheckpointRow.position)
    )
    members = session.execute(query).all()
    described = _checkpoints(session, [checkpoint for _, checkpoint in members])
    of_run: dict[str, list[Checkpoint]] = defaultdict(list)
    for (run, _), checkpoint in zip(members, described, strict=True):
        of_run[run].append(checkpoint)
    return [Run.model_validate({**_columns(row), "checkpoints": of_run[row.id]}) for row in rows]


def _columns(row: Noun) -> dict[str, Any]:
    return {column.key: getattr(row, column.key) for column in row.__table__.columns}


def _unknown(session: Session, known: Select[str], found: Iterable[str]) -> list[str]:
    return sorted(set(found) - set(session.scalars(known)))
