"""Brings a database to the schema of ``tables``, however many processes start at once."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy import Connection, Engine, inspect, text

from adapter_router.catalog.tables import HEAD

_LOCK = 0x6164_7074_7274  # PostgreSQL's advisory locks are numbers


def bring_up_to_date(engine: Engine) -> None:
    """Create or upgrade the schema. Raises ValueError when newer code wrote it."""
    with engine.connect() as connection:
        found = _revision(connection)
    if found == HEAD:
        return
    with _alone(engine), engine.connect() as connection, connection.execution_options(writing=True).begin():
        if engine.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
        found = _revision(connection)  # another process may have been first
        if found is not None and found > HEAD:
            url = engine.url.render_as_string(hide_password=True)
            raise ValueError(
                f"the catalog {url} has schema {found} and this version of adapter-router knows {HEAD}: update it"
            )
        if found != HEAD:
            _upgrade(connection)


def _revision(connection: Connection) -> str | None:
    if not inspect(connection).has_table("alembic_version"):
        return None
    found: str | None = connection.execute(text("SELECT version_num FROM alembic_version")).scalar()
    return found


def _upgrade(connection: Connection) -> None:
    from alembic import command  # noqa: PLC0415 - only who finds an old schema needs it
    from alembic.config import Config  # noqa: PLC0415

    config = Config()
    config.set_main_option("script_location", "adapter_router.catalog:migrations")
    config.attributes["connection"] = connection
    command.upgrade(config, HEAD)


@contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    """SQLite's journal mode cannot be changed while others are about to."""
    if engine.name != "sqlite":
        yield
        return
    lock = os.open(f"{engine.url.database}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with engine.connect() as connection:
            raw = connection.connection.dbapi_connection
            assert raw is not None
            raw.execute("PRAGMA journal_mode = WAL")
        yield
    finally:
        os.close(lock)
