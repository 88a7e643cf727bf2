"""API keys and their log, jobs' owners and priorities, what workers are at, and rows that take workers down."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"

_INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Bring the schema up."""
    with op.batch_alter_table("jobs", schema=None) as jobs:
        jobs.add_column(sa.Column("priority", _INTEGER, server_default="0", nullable=False))
        jobs.add_column(sa.Column("api_key", sa.String(length=255), nullable=True))
        jobs.add_column(sa.Column("request_id", sa.String(length=255), nullable=True))

    with op.batch_alter_table("shards", schema=None) as shards:
        shards.add_column(sa.Column("trying", sa.JSON(), nullable=True))
        shards.add_column(sa.Column("poisoned", sa.JSON(), nullable=True))

    with op.batch_alter_table("workers", schema=None) as workers:
        workers.add_column(sa.Column("host", sa.String(length=255), nullable=True))
        workers.add_column(sa.Column("shard", _INTEGER, nullable=True))
        workers.add_column(sa.Column("kinds", sa.JSON(), nullable=True))
        workers.add_column(sa.Column("memory", sa.JSON(), nullable=True))
        workers.add_column(sa.Column("started_at", sa.DateTime(timezone=True), nullable=True))

    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=False),
        sa.Column("sha256", sa.String(length=255), nullable=False),
        sa.Column("scopes", sa.JSON(), nullable=False),
        sa.Column("requests_per_minute", _INTEGER, nullable=True),
        sa.Column("max_upload_bytes", _INTEGER, nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("used_at", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_api_keys")),
        sa.UniqueConstraint("name", name=op.f("uq_api_keys_name")),
        sa.UniqueConstraint("sha256", name=op.f("uq_api_keys_sha256")),
    )
    op.create_table(
        "audit",
        sa.Column("id", _INTEGER, autoincrement=True, nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("api_key", sa.String(length=255), nullable=True),
        sa.Column("client", sa.String(length=255), nullable=True),
        sa.Column("request_id", sa.String(length=255), nullable=False),
        sa.Column("method", sa.String(length=255), nullable=False),
        sa.Column("path", sa.String(length=4096), nullable=False),
        sa.Column("status", _INTEGER, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_audit")),
    )
    with op.batch_alter_table("audit", schema=None) as audit:
        audit.create_index(op.f("ix_audit_at"), ["at"], unique=False)
        audit.create_index(op.f("ix_audit_api_key"), ["api_key"], unique=False)
