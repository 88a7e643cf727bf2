"""The catalog's tables: SQL is the truth about what exists, who computes what, and what has been published."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, Dialect, ForeignKey, Index, Integer, MetaData, String, TypeDecorator
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

_NAMING = {  # so that migrations can name what they alter
    "ix": "ix_%(table_name)s_%(column_0_N_name)s",
    "uq": "uq_%(table_name)s_%(column_0_N_name)s",
    "fk": "fk_%(table_name)s_%(column_0_N_name)s",
    "pk": "pk_%(table_name)s",
}


class UtcDateTime(TypeDecorator[datetime]):
    """An aware UTC time; SQLite keeps no time zone, so it is put back on reading."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002 - the interface
        """Store UTC; a naive time is a programming error."""
        if value is not None and value.tzinfo is None:
            raise ValueError("a time without a zone reached the catalog")
        return value.astimezone(UTC) if value else None

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002
        """Read UTC."""
        return value.replace(tzinfo=UTC) if value and value.tzinfo is None else value


class Table(DeclarativeBase):
    """Base of all tables."""

    metadata = MetaData(naming_convention=_NAMING)
    type_annotation_map = {  # noqa: RUF012 - read by SQLAlchemy
        dict[str, Any]: JSON,
        list[Any]: JSON,
        datetime: UtcDateTime,
        str: String(255),
        int: BigInteger().with_variant(Integer, "sqlite"),
    }


class Noun(Table):
    """Base of what users name, list, rename and delete."""

    __abstract__ = True

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str | None] = mapped_column(unique=True)
    created_at: Mapped[datetime] = mapped_column(index=True)


class DatasetRow(Noun):
    """A dataset: its rows lie in the datasets' folder."""

    __tablename__ = "datasets"

    rows: Mapped[int]
    bytes: Mapped[int]
    origins: Mapped[dict[str, Any]]
    prefix: Mapped[str | None]


class SourceRow(Table):
    """A file that was uploaded for a dataset."""

    __tablename__ = "dataset_sources"

    dataset_id: Mapped[str] = mapped_column(ForeignKey("datasets.id", ondelete="CASCADE"), primary_key=True)
    sha256: Mapped[str] = mapped_column(primary_key=True)
    filename: Mapped[str] = mapped_column(String(1024))
    format: Mapped[str]
    bytes: Mapped[int]
    rows: Mapped[int]
    skipped: Mapped[int]
    created_at: Mapped[datetime]


class TaskRow(Noun):
    """A task: its rows lie in the tasks' folder."""

    __tablename__ = "tasks"

    kind: Mapped[str]
    subtasks: Mapped[list[Any]]
    notes: Mapped[list[Any]]


class RunRow(Noun):
    """The checkpoints of one training."""

    __tablename__ = "runs"

    model: Mapped[str] = mapped_column(String(4096))
    revision: Mapped[str | None]
    finetune: Mapped[str | None] = mapped_column(index=True)


class RunCheckpointRow(Table):
    """Which checkpoints a run has, in order."""

    __tablename__ = "run_checkpoints"

    run_id: Mapped[str] = mapped_column(ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    checkpoint_id: Mapped[str] = mapped_column(ForeignKey("checkpoints.id"), index=True)


class CheckpointRow(Noun):
    """An adapter and its Adam moments; the tensors lie in the checkpoints' folder."""

    __tablename__ = "checkpoints"

    model: Mapped[str] = mapped_column(String(4096))
    revision: Mapped[str | None]
    method: Mapped[str]
    epoch: Mapped[int | None]
    step: Mapped[int | None]
    learning_rate: Mapped[float | None]
    has_moments: Mapped[bool]
    moments_note: Mapped[str | None] = mapped_column(String(4096))
    parameters: Mapped[int]
    precision: Mapped[str]
    template: Mapped[str | None]
    max_length: Mapped[int | None]
    bytes: Mapped[int]


class AdapterRow(Noun):
    """An adapter of the bank: what is known of it beside its checkpoint, which has its files."""

    __tablename__ = "adapters"

    checkpoint_id: Mapped[str] = mapped_column(ForeignKey("checkpoints.id"), index=True)
    brought: Mapped[bool]
    """Whether the checkpoint was stored for it, and goes with it where nothing else needs it."""
    rank: Mapped[int]
    alpha: Mapped[float]
    scaling: Mapped[float]
    modules: Mapped[int]
    finetune: Mapped[str | None]
    dataset: Mapped[str | None]
    """As it was when the adapter came: the dataset may be deleted since."""
    selection: Mapped[str | None]
    trained_on: Mapped[str | None] = mapped_column(String(1000))
    sha256: Mapped[str]


class AdapterTargetRow(Table):
    """The kinds of modules that an adapter is on: lists are asked for by them."""

    __tablename__ = "adapter_targets"

    adapter_id: Mapped[str] = mapped_column(ForeignKey("adapters.id", ondelete="CASCADE"), primary_key=True)
    target: Mapped[str] = mapped_column(primary_key=True)


class JobRow(Table):
    """Work that outlives a request."""

    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(index=True)
    name: Mapped[str | None]
    status: Mapped[str] = mapped_column(index=True)
    request: Mapped[dict[str, Any]]
    plan: Mapped[dict[str, Any]]
    """What the request was resolved to, in ids."""
    result: Mapped[dict[str, Any] | None]
    error: Mapped[dict[str, Any] | None]
    done: Mapped[int]
    total: Mapped[int]
    unit: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(index=True)
    started_at: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]
    resumed_at: Mapped[datetime | None]
    """When the present run of the job began: the rate is counted from here."""
    resumed_done: Mapped[int]
    priority: Mapped[int] = mapped_column(server_default="0")
    """Jobs of a higher one have their shards claimed first."""
    api_key: Mapped[str | None]
    """Id of the API key that started it: workers share themselves out among keys."""
    request_id: Mapped[str | None]
    """Id of the request that started it, which the log's lines of its shards carry, too."""

    __table_args__ = (Index("uq_jobs_kind_name", "kind", "name", unique=True),)


class ShardRow(Table):
    """A piece of a job that one worker does under a lease."""

    __tablename__ = "shards"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"))
    number: Mapped[int]
    kind: Mapped[str]
    status: Mapped[str]
    payload: Mapped[dict[str, Any]]
    units: Mapped[int]
    done: Mapped[int]
    attempt: Mapped[int]
    """Fencing token: counted up with every claim, checked by every write."""
    failures: Mapped[int]
    """Attempts that ended in an error or with a lost lease."""
    owner: Mapped[str | None]
    leased_until: Mapped[float | None]
    """Unix seconds."""
    claimed_at: Mapped[float | None]
    """Unix seconds; null while nobody works on it."""
    worked: Mapped[float]
    """Seconds that its attempts have worked, the present one apart."""
    error: Mapped[dict[str, Any] | None]
    trying: Mapped[list[Any] | None]
    """Rows that the present attempt is at, kept where an earlier one took its worker down."""
    poisoned: Mapped[list[Any] | None]
    """Rows that took their worker down every time, and are left out."""

    __table_args__ = (
        Index("ix_shards_claim", "status", "kind", "id"),
        Index("ix_shards_job", "job_id", "number"),
        {"sqlite_autoincrement": True},  # an id names a shard's bytes in the store: it is never given again
    )


class FeatureSetRow(Table):
    """The features of one dataset or task at one checkpoint, as a list of segments."""

    __tablename__ = "feature_sets"

    id: Mapped[str] = mapped_column(primary_key=True)
    dataset: Mapped[str | None] = mapped_column(index=True)
    task: Mapped[str | None] = mapped_column(index=True)
    checkpoint: Mapped[str] = mapped_column(ForeignKey("checkpoints.id"), index=True)
    recipe: Mapped[str] = mapped_column(index=True)
    """Hash of everything but the rows: a grown dataset looks for its prefix under the same recipe."""
    parameters: Mapped[dict[str, Any]]
    rows: Mapped[int]
    created_at: Mapped[datetime]


class SegmentRow(Table):
    """An immutable range of rows of a feature set: one Zarr group."""

    __tablename__ = "segments"

    id: Mapped[str] = mapped_column(primary_key=True)
    rows: Mapped[int]
    dim: Mapped[int]
    dtype: Mapped[str]
    shard_rows: Mapped[int]
    """Rows of a shard: ranges of two jobs on one segment must be the same ranges."""
    complete: Mapped[bool]


class FeatureSegmentRow(Table):
    """Which segments a feature set has, in order of rows."""

    __tablename__ = "feature_segments"

    feature_set_id: Mapped[str] = mapped_column(ForeignKey("feature_sets.id", ondelete="CASCADE"), primary_key=True)
    start: Mapped[int] = mapped_column(primary_key=True)
    stop: Mapped[int]
    segment_id: Mapped[str] = mapped_column(ForeignKey("segments.id"), index=True)


class JobFeatureRow(Table):
    """Which feature sets a job answers with."""

    __tablename__ = "job_features"

    job_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    position: Mapped[int] = mapped_column(primary_key=True)
    feature_set_id: Mapped[str] = mapped_column(ForeignKey("feature_sets.id"), index=True)


class ChunkRow(Table):
    """The manifest: the attempt whose bytes a range of a segment has. What is not here does not exist."""

    __tablename__ = "chunks"

    segment_id: Mapped[str] = mapped_column(ForeignKey("segments.id", ondelete="CASCADE"), primary_key=True)
    start: Mapped[int] = mapped_column(primary_key=True)
    stop: Mapped[int]
    attempt: Mapped[int]
    digest: Mapped[str]
    excluded: Mapped[list[Any]]
    """(row of the segment, reason) of every row without a feature."""
    tokens: Mapped[int]
    published: Mapped[bool] = mapped_column(index=True)


class SelectionRow(Noun):
    """An answer of /select, read back under its recipe's hash."""

    __tablename__ = "selections"

    recipe: Mapped[dict[str, Any]]
    summary: Mapped[dict[str, Any]]


class TaxonomyRow(Noun):
    """The capabilities that rows are labelled with."""

    __tablename__ = "taxonomies"

    capabilities: Mapped[list[Any]]


class ReplyRow(Table):
    """What a labeller has replied about a row of an annotation, kept as it comes: a retry goes on from there."""

    __tablename__ = "replies"

    annotation_id: Mapped[str] = mapped_column(ForeignKey("jobs.id", ondelete="CASCADE"), primary_key=True)
    row: Mapped[int] = mapped_column(primary_key=True)
    labels: Mapped[list[Any] | None]
    """Numbers of the capabilities; null where the reply could not be read."""
    reply: Mapped[str | None] = mapped_column(String(1024))
    """The beginning of a reply that could not be read, or what went wrong."""


class UseRow(Table):
    """What something depends on: nothing that is used can be deleted."""

    __tablename__ = "uses"

    user: Mapped[str] = mapped_column(primary_key=True)
    used: Mapped[str] = mapped_column(primary_key=True, index=True)


class IdempotencyRow(Table):
    """The answer to a POST that carried an Idempotency-Key."""

    __tablename__ = "idempotency_keys"

    key: Mapped[str] = mapped_column(primary_key=True)
    fingerprint: Mapped[str]
    """Hash of method, path and body: the key must not come back with another request."""
    status: Mapped[int | None]
    """Null while the first request is at work."""
    headers: Mapped[dict[str, Any] | None]
    body: Mapped[dict[str, Any] | None]
    created_at: Mapped[datetime]


class WorkerRow(Table):
    """A worker's last sign of life; the last one's is kept when it is gone, since it tells what jobs will take."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    device: Mapped[str]
    job: Mapped[str | None]
    flops: Mapped[dict[str, Any]]
    """Operations a second by precision."""
    gone: Mapped[bool]
    seen_at: Mapped[datetime]
    host: Mapped[str | None]
    shard: Mapped[int | None]
    """Number of the shard within its job."""
    kinds: Mapped[list[Any] | None]
    """Kinds of jobs that it does."""
    memory: Mapped[dict[str, Any] | None]
    """Bytes of the device's memory: `used` and `total`."""
    started_at: Mapped[datetime | None]


class ApiKeyRow(Table):
    """A key that requests are let in with; the key itself is nowhere, only its hash."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(unique=True)
    sha256: Mapped[str] = mapped_column(unique=True)
    scopes: Mapped[list[Any]]
    requests_per_minute: Mapped[int | None]
    max_upload_bytes: Mapped[int | None]
    created_at: Mapped[datetime]
    revoked_at: Mapped[datetime | None]
    used_at: Mapped[datetime | None]


class AuditRow(Table):
    """Who changed what, or was refused."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(primary_key=True, autoincrement=True)
    at: Mapped[datetime] = mapped_column(index=True)
    api_key: Mapped[str | None] = mapped_column(index=True)
    client: Mapped[str | None]
    """Address that the request came from."""
    request_id: Mapped[str]
    method: Mapped[str]
    path: Mapped[str] = mapped_column(String(4096))
    status: Mapped[int]
