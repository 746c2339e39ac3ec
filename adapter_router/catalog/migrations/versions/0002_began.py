"""When a registration began, so that what is under way for the one before is told from it."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Those that are there began before everything else."""
    number = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
    op.add_column("adapters", sa.Column("began", number, nullable=False, server_default="0"))
