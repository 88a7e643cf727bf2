"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Bring the schema up."""
    op.create_table(
        "checkpoints",
        sa.Column("model", sa.String(length=4096), nullable=False),
        sa.Column("revision", sa.String(length=255), nullable=True),
        sa.Column("method", sa.String(length=255), nullable=False),
        sa.Column("epoch", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("step", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("learning_rate", sa.Double(), nullable=True),
        sa.Column("has_moments", sa.Boolean(), nullable=False),
        sa.Column("moments_note", sa.String(length=4096), nullable=True),
        sa.Column("parameters", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("precision", sa.String(length=255), nullable=False),
        sa.Column("template", sa.String(length=255), nullable=True),
        sa.Column("max_length", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("bytes", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_checkpoints")),
        sa.UniqueConstraint("name", name=op.f("uq_checkpoints_name")),
    )
    with op.batch_alter_table("checkpoints", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_checkpoints_created_at"), ["created_at"], unique=False)

    op.create_table(
        "datasets",
        sa.Column("rows", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("bytes", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("origins", sa.JSON(), nullable=False),
        sa.Column("prefix", sa.String(length=255), nullable=True),
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_datasets")),
        sa.UniqueConstraint("name", name=op.f("uq_datasets_name")),
    )
    with op.batch_alter_table("datasets", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_datasets_created_at"), ["created_at"], unique=False)

    op.create_table(
        "idempotency_keys",
        sa.Column("key", sa.String(length=255), nullable=False),
        sa.Column("fingerprint", sa.String(length=255), nullable=False),
        sa.Column("status", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=True),
        sa.Column("headers", sa.JSON(), nullable=True),
        sa.Column("body", sa.JSON(), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_idempotency_keys")),
    )
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("kind", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("status", sa.String(length=255), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("plan", sa.JSON(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=True),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.Column("done", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("total", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("unit", sa.String(length=255), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("resumed_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("resumed_done", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_jobs")),
    )
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_jobs_created_at"), ["created_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_jobs_kind"), ["kind"], unique=False)
        batch_op.create_index(batch_op.f("ix_jobs_status"), ["status"], unique=False)
        batch_op.create_index("uq_jobs_kind_name", ["kind", "name"], unique=True)

    op.create_table(
        "runs",
        sa.Column("model", sa.String(length=4096), nullable=False),
        sa.Column("revision", sa.String(length=255), nullable=True),
        sa.Column("finetune", sa.String(length=255), nullable=True),
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_runs")),
        sa.UniqueConstraint("name", name=op.f("uq_runs_name")),
    )
    with op.batch_alter_table("runs", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_runs_created_at"), ["created_at"], unique=False)
        batch_op.create_index(batch_op.f("ix_runs_finetune"), ["finetune"], unique=False)

    op.create_table(
        "segments",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("rows", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("dim", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("dtype", sa.String(length=255), nullable=False),
        sa.Column("shard_rows", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("complete", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_segments")),
    )
    op.create_table(
        "selections",
        sa.Column("recipe", sa.JSON(), nullable=False),
        sa.Column("summary", sa.JSON(), nullable=False),
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_selections")),
        sa.UniqueConstraint("name", name=op.f("uq_selections_name")),
    )
    with op.batch_alter_table("selections", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_selections_created_at"), ["created_at"], unique=False)

    op.create_table(
        "tasks",
        sa.Column("kind", sa.String(length=255), nullable=False),
        sa.Column("subtasks", sa.JSON(), nullable=False),
        sa.Column("notes", sa.JSON(), nullable=False),
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_tasks")),
        sa.UniqueConstraint("name", name=op.f("uq_tasks_name")),
    )
    with op.batch_alter_table("tasks", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_tasks_created_at"), ["created_at"], unique=False)

    op.create_table(
        "uses",
        sa.Column("user", sa.String(length=255), nullable=False),
        sa.Column("used", sa.String(length=255), nullable=False),
        sa.PrimaryKeyConstraint("user", "used", name=op.f("pk_uses")),
    )
    with op.batch_alter_table("uses", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_uses_used"), ["used"], unique=False)

    op.create_table(
        "workers",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("device", sa.String(length=255), nullable=False),
        sa.Column("job", sa.String(length=255), nullable=True),
        sa.Column("flops", sa.JSON(), nullable=False),
        sa.Column("gone", sa.Boolean(), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_workers")),
    )
    op.create_table(
        "chunks",
        sa.Column("segment_id", sa.String(length=255), nullable=False),
        sa.Column("start", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("stop", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("attempt", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("digest", sa.String(length=255), nullable=False),
        sa.Column("excluded", sa.JSON(), nullable=False),
        sa.Column("tokens", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("published", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["segment_id"], ["segments.id"], name=op.f("fk_chunks_segment_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("segment_id", "start", name=op.f("pk_chunks")),
    )
    with op.batch_alter_table("chunks", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_chunks_published"), ["published"], unique=False)

    op.create_table(
        "dataset_sources",
        sa.Column("dataset_id", sa.String(length=255), nullable=False),
        sa.Column("sha256", sa.String(length=255), nullable=False),
        sa.Column("filename", sa.String(length=1024), nullable=False),
        sa.Column("format", sa.String(length=255), nullable=False),
        sa.Column("bytes", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("rows", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("skipped", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["dataset_id"], ["datasets.id"], name=op.f("fk_dataset_sources_dataset_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("dataset_id", "sha256", name=op.f("pk_dataset_sources")),
    )
    op.create_table(
        "feature_sets",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("dataset", sa.String(length=255), nullable=True),
        sa.Column("task", sa.String(length=255), nullable=True),
        sa.Column("checkpoint", sa.String(length=255), nullable=False),
        sa.Column("recipe", sa.String(length=255), nullable=False),
        sa.Column("parameters", sa.JSON(), nullable=False),
        sa.Column("rows", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["checkpoint"], ["checkpoints.id"], name=op.f("fk_feature_sets_checkpoint")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_feature_sets")),
    )
    with op.batch_alter_table("feature_sets", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_feature_sets_checkpoint"), ["checkpoint"], unique=False)
        batch_op.create_index(batch_op.f("ix_feature_sets_dataset"), ["dataset"], unique=False)
        batch_op.create_index(batch_op.f("ix_feature_sets_recipe"), ["recipe"], unique=False)
        batch_op.create_index(batch_op.f("ix_feature_sets_task"), ["task"], unique=False)

    op.create_table(
        "run_checkpoints",
        sa.Column("run_id", sa.String(length=255), nullable=False),
        sa.Column("position", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("checkpoint_id", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(["checkpoint_id"], ["checkpoints.id"], name=op.f("fk_run_checkpoints_checkpoint_id")),
        sa.ForeignKeyConstraint(["run_id"], ["runs.id"], name=op.f("fk_run_checkpoints_run_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("run_id", "position", name=op.f("pk_run_checkpoints")),
    )
    with op.batch_alter_table("run_checkpoints", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_run_checkpoints_checkpoint_id"), ["checkpoint_id"], unique=False)

    op.create_table(
        "shards",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), autoincrement=True, nullable=False),
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("kind", sa.String(length=255), nullable=False),
        sa.Column("status", sa.String(length=255), nullable=False),
        sa.Column("payload", sa.JSON(), nullable=False),
        sa.Column("units", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("done", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("attempt", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("failures", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("owner", sa.String(length=255), nullable=True),
        sa.Column("leased_until", sa.Double(), nullable=True),
        sa.Column("claimed_at", sa.Double(), nullable=True),
        sa.Column("worked", sa.Double(), nullable=False),
        sa.Column("error", sa.JSON(), nullable=True),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_shards_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_shards")),
        sqlite_autoincrement=True,
    )
    with op.batch_alter_table("shards", schema=None) as batch_op:
        batch_op.create_index("ix_shards_claim", ["status", "kind", "id"], unique=False)
        batch_op.create_index("ix_shards_job", ["job_id", "number"], unique=False)

    op.create_table(
        "feature_segments",
        sa.Column("feature_set_id", sa.String(length=255), nullable=False),
        sa.Column("start", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("stop", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("segment_id", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(
            ["feature_set_id"], ["feature_sets.id"], name=op.f("fk_feature_segments_feature_set_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["segment_id"], ["segments.id"], name=op.f("fk_feature_segments_segment_id")),
        sa.PrimaryKeyConstraint("feature_set_id", "start", name=op.f("pk_feature_segments")),
    )
    with op.batch_alter_table("feature_segments", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_feature_segments_segment_id"), ["segment_id"], unique=False)

    op.create_table(
        "job_features",
        sa.Column("job_id", sa.String(length=255), nullable=False),
        sa.Column("position", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("feature_set_id", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(["feature_set_id"], ["feature_sets.id"], name=op.f("fk_job_features_feature_set_id")),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_features_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "position", name=op.f("pk_job_features")),
    )
    with op.batch_alter_table("job_features", schema=None) as batch_op:
        batch_op.create_index(batch_op.f("ix_job_features_feature_set_id"), ["feature_set_id"], unique=False)


def downgrade() -> None:
    """Take the schema back."""
    with op.batch_alter_table("job_features", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_job_features_feature_set_id"))

    op.drop_table("job_features")
    with op.batch_alter_table("feature_segments", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_feature_segments_segment_id"))

    op.drop_table("feature_segments")
    with op.batch_alter_table("shards", schema=None) as batch_op:
        batch_op.drop_index("ix_shards_job")
        batch_op.drop_index("ix_shards_claim")

    op.drop_table("shards")
    with op.batch_alter_table("run_checkpoints", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_run_checkpoints_checkpoint_id"))

    op.drop_table("run_checkpoints")
    with op.batch_alter_table("feature_sets", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_feature_sets_task"))
        batch_op.drop_index(batch_op.f("ix_feature_sets_recipe"))
        batch_op.drop_index(batch_op.f("ix_feature_sets_dataset"))
        batch_op.drop_index(batch_op.f("ix_feature_sets_checkpoint"))

    op.drop_table("feature_sets")
    op.drop_table("dataset_sources")
    with op.batch_alter_table("chunks", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_chunks_published"))

    op.drop_table("chunks")
    op.drop_table("workers")
    with op.batch_alter_table("uses", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_uses_used"))

    op.drop_table("uses")
    with op.batch_alter_table("tasks", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_tasks_created_at"))

    op.drop_table("tasks")
    with op.batch_alter_table("selections", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_selections_created_at"))

    op.drop_table("selections")
    op.drop_table("segments")
    with op.batch_alter_table("runs", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_runs_finetune"))
        batch_op.drop_index(batch_op.f("ix_runs_created_at"))

    op.drop_table("runs")
    with op.batch_alter_table("jobs", schema=None) as batch_op:
        batch_op.drop_index("uq_jobs_kind_name")
        batch_op.drop_index(batch_op.f("ix_jobs_status"))
        batch_op.drop_index(batch_op.f("ix_jobs_kind"))
        batch_op.drop_index(batch_op.f("ix_jobs_created_at"))

    op.drop_table("jobs")
    op.drop_table("idempotency_keys")
    with op.batch_alter_table("datasets", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_datasets_created_at"))

    op.drop_table("datasets")
    with op.batch_alter_table("checkpoints", schema=None) as batch_op:
        batch_op.drop_index(batch_op.f("ix_checkpoints_created_at"))

    op.drop_table("checkpoints")
