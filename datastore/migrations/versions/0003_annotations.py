"""Taxonomies, and what labellers have replied."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"

_INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Bring the schema up."""
    op.create_table(
        "taxonomies",
        sa.Column("capabilities", sa.JSON(), nullable=False),
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_taxonomies")),
        sa.UniqueConstraint("name", name=op.f("uq_taxonomies_name")),
    )
    with op.batch_alter_table("taxonomies", schema=None) as taxonomies:
        taxonomies.create_index(op.f("ix_taxonomies_created_at"), ["created_at"], unique=False)

    op.create_table(
        "replies",
        sa.Column("annotation_id", sa.String(length=255), nullable=False),
        sa.Column("row", _INTEGER, nullable=False),
        sa.Column("labels", sa.JSON(), nullable=True),
        sa.Column("reply", sa.String(length=1024), nullable=True),
        sa.ForeignKeyConstraint(
            ["annotation_id"], ["jobs.id"], name=op.f("fk_replies_annotation_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("annotation_id", "row", name=op.f("pk_replies")),
    )
