"""Alembic's entry. Run by ``catalog.schema`` on its own connection, and by ``alembic`` to write a new revision."""

from __future__ import annotations

from alembic import context
from sqlalchemy import Connection

from adapter_router.catalog.tables import metadata


def run(connection: Connection) -> None:
    """Upgrade within the caller's transaction: all of it or nothing, on SQLite too."""
    context.configure(connection=connection, target_metadata=metadata, transactional_ddl=True)
    with context.begin_transaction():
        context.run_migrations()


run(context.config.attributes["connection"])
