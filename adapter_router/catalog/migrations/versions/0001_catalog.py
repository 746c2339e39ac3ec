"""Adapters, their versions, what names mean, and what happened."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None

_NAME = sa.String(200).with_variant(sa.String(200, collation="C"), "postgresql")
_DIGEST = sa.Text().with_variant(sa.Text(collation="C"), "postgresql")
_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    """Create everything."""
    clock = op.create_table(
        "clock",
        sa.Column("id", sa.Integer, primary_key=True, autoincrement=False),
        sa.Column("revision", _ID, nullable=False),
        sa.Column("num_adapters", _ID, nullable=False),
    )
    op.bulk_insert(clock, [{"id": 1, "revision": 0, "num_adapters": 0}])
    op.create_table(
        "adapters",
        sa.Column("id", _ID, primary_key=True, autoincrement=False),
        sa.Column("name", _NAME, nullable=False, unique=True),
        sa.Column("spec", sa.Text, nullable=False),
        sa.Column("pinned", sa.Boolean, nullable=False),
        sa.Column("preload", sa.Boolean, nullable=False),
        sa.Column("lazy", sa.Boolean, nullable=False),
        sa.Column("managed", sa.Boolean, nullable=False),
        sa.Column("phase", sa.String(16), nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("updated", sa.Double, nullable=False),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("failure", sa.Text),
        sa.Column("retry_at", sa.Double),
        sa.Column("claimed_by", sa.String(200)),
        sa.Column("claimed_until", sa.Double),
        sa.Column("due", sa.Double, index=True),
        sa.Column("wanted", sa.Boolean, nullable=False),
        sa.Column("newest", sa.Integer, nullable=False),
        sa.Index(None, "phase", "name"),
        sa.Index(None, "wanted", "name"),
        sa.Index(None, "managed", "name"),
    )
    op.create_table(
        "versions",
        sa.Column("id", _ID, primary_key=True, autoincrement=False),
        sa.Column("adapter_id", _ID, sa.ForeignKey("adapters.id"), nullable=False),
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("identity", sa.String(64), nullable=False),
        sa.Column("digest", _DIGEST, nullable=False, index=True),
        sa.Column("base", sa.Text, nullable=False),
        sa.Column("num_bytes", _ID, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created", sa.Double, nullable=False),
        sa.Column("retired", sa.Double),
        sa.UniqueConstraint("adapter_id", "number"),
        sa.UniqueConstraint("adapter_id", "identity"),
        sa.Index(None, "adapter_id", "digest"),
    )
    op.create_table(
        "totals",
        sa.Column("base", sa.Text, primary_key=True),
        sa.Column("adapters", _ID, nullable=False),
        sa.Column("versions", _ID, nullable=False),
        sa.Column("num_bytes", _ID, nullable=False),
    )
    op.create_table(
        "aliases",
        sa.Column("name", _NAME, primary_key=True),
        sa.Column("adapter_id", _ID, sa.ForeignKey("adapters.id"), unique=True),
        sa.Column("revision", _ID, nullable=False),
        sa.Column("updated", sa.Double, nullable=False),
    )
    op.create_table(
        "targets",
        sa.Column("alias", _NAME, sa.ForeignKey("aliases.name"), primary_key=True),
        sa.Column("version_id", _ID, sa.ForeignKey("versions.id"), primary_key=True, index=True),
        sa.Column("weight", sa.Integer, nullable=False),
    )
    op.create_table(
        "history",
        sa.Column("alias", _NAME, sa.ForeignKey("aliases.name"), primary_key=True),
        sa.Column("revision", _ID, primary_key=True, autoincrement=False),
        sa.Column("targets", sa.Text, nullable=False),
    )
    op.create_table(
        "events",
        sa.Column("revision", _ID, primary_key=True, autoincrement=False),
        sa.Column("at", sa.Double, nullable=False),
        sa.Column("name", _NAME, nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("detail", sa.Text, nullable=False),
        sa.Index(None, "name", "revision"),
    )
