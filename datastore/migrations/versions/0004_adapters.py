"""The bank of adapters."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"

_INTEGER = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Bring the schema up."""
    op.create_table(
        "adapters",
        sa.Column("checkpoint_id", sa.String(length=255), nullable=False),
        sa.Column("brought", sa.Boolean(), nullable=False),
        sa.Column("rank", _INTEGER, nullable=False),
        sa.Column("alpha", sa.Double(), nullable=False),
        sa.Column("scaling", sa.Double(), nullable=False),
        sa.Column("modules", _INTEGER, nullable=False),
        sa.Column("finetune", sa.String(length=255), nullable=True),
        sa.Column("dataset", sa.String(length=255), nullable=True),
        sa.Column("selection", sa.String(length=255), nullable=True),
        sa.Column("trained_on", sa.String(length=1000), nullable=True),
        sa.Column("sha256", sa.String(length=255), nullable=False),
        sa.Column("id", sa.String(length=255), nullable=False),
        sa.Column("name", sa.String(length=255), nullable=True),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["checkpoint_id"], ["checkpoints.id"], name=op.f("fk_adapters_checkpoint_id")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_adapters")),
        sa.UniqueConstraint("name", name=op.f("uq_adapters_name")),
    )
    with op.batch_alter_table("adapters", schema=None) as adapters:
        adapters.create_index(op.f("ix_adapters_checkpoint_id"), ["checkpoint_id"], unique=False)
        adapters.create_index(op.f("ix_adapters_created_at"), ["created_at"], unique=False)

    op.create_table(
        "adapter_targets",
        sa.Column("adapter_id", sa.String(length=255), nullable=False),
        sa.Column("target", sa.String(length=255), nullable=False),
        sa.ForeignKeyConstraint(
            ["adapter_id"], ["adapters.id"], name=op.f("fk_adapter_targets_adapter_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("adapter_id", "target", name=op.f("pk_adapter_targets")),
    )
