"""The database under the catalog: connections, snapshots to read from, and one writer at a time."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, delete, event, insert, make_url, select, update
from sqlalchemy.exc import ArgumentError, DataError, DBAPIError, IntegrityError, ProgrammingError, TimeoutError
from sqlalchemy.pool import ConnectionPoolEntry

from adapter_router.catalog.schema import bring_up_to_date
from adapter_router.catalog.tables import clock, events
from adapter_router.errors import CatalogUnavailable

KEPT_EVENTS = 1_000_000
_WAIT_S = 30  # for another writer
_STALLED_S = 60  # after which PostgreSQL ends a writer that does nothing
# After 25 s without a sign from a machine that was lost without a word; the system's own patience is hours.
_KEEPALIVE = {"keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 3, "tcp_user_timeout": 25_000}
_CONNECTIONS = 8
_MOST_CONNECTIONS = 32

Clock = Callable[[], float]


class Writing:
    """One transaction that changes the catalog: all of it is seen at once, or nothing."""

    def __init__(self, connection: Connection, now: float, kept_events: int) -> None:
        self.connection = connection
        self.now = now
        self._kept = kept_events
        row = connection.execute(select(clock.c.revision, clock.c.num_adapters).with_for_update()).one()
        self.revision: int = row.revision
        self.num_adapters: int = row.num_adapters
        self._before = row.revision

    def record(self, name: str, kind: str, detail: Mapping[str, Any]) -> int:
        """Note that something happened to ``name``; returns its revision."""
        self.revision += 1
        values = {"at": self.now, "name": name, "kind": kind, "detail": json.dumps(detail, sort_keys=True)}
        self.connection.execute(insert(events).values(revision=self.revision, **values))
        return self.revision

    def finish(self) -> None:
        """Move the clock on, and let the oldest events go."""
        if self.revision == self._before:
            return
        values = {"revision": self.revision, "num_adapters": self.num_adapters}
        self.connection.execute(update(clock).values(values))
        self.connection.execute(delete(events).where(events.c.revision <= self.revision - self._kept))


class Database:
    """SQLite (one machine) or PostgreSQL (any number). Thread-safe.

    Whoever writes holds the clock's lock from the first to the last statement, so changes become visible in the order
    of their revisions, and what a writer has read is still so when it writes.
    """

    def __init__(self, url: str, now: Clock = time.time, kept_events: int = KEPT_EVENTS) -> None:
        """Raises ValueError for a URL that names no such database, CatalogUnavailable when it cannot be reached."""
        parsed = _checked(url)
        self.now = now
        self.kept_events = kept_events
        self.engine = _sqlite(parsed) if parsed.get_backend_name() == "sqlite" else _postgresql(parsed)
        # SQLite's own waiting is a lottery; within this process it is a queue.
        self._turn = threading.Lock()
        with self._translated():
            bring_up_to_date(self.engine)

    def close(self) -> None:
        """Close all connections."""
        self.engine.dispose()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A connection that sees one state of the whole catalog. Raises CatalogUnavailable."""
        options: dict[str, Any] = {}
        if self.engine.name == "postgresql":
            options = {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}
        with self._translated(), self.engine.connect() as connection:
            yield connection.execution_options(**options)

    @contextmanager
    def writing(self) -> Iterator[Writing]:
        """A transaction that nobody else's overlaps; an error undoes it. Raises CatalogUnavailable."""
        with (
            self._translated(),
            self._turn,
            self.engine.connect() as connection,
            connection.execution_options(writing=True).begin(),
        ):
            writing = Writing(connection, self.now(), self.kept_events)
            yield writing
            writing.finish()

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except (IntegrityError, ProgrammingError, DataError):
            raise  # a fault of ours, and no other time will be better
        except (DBAPIError, TimeoutError, sqlite3.Error) as error:
            cause = error.orig if isinstance(error, DBAPIError) else error
            raise CatalogUnavailable(f"the catalog's database does not answer as it should: {cause}") from error


def _checked(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError as error:
        raise ValueError(f"the catalog's URL must be sqlite:///… or postgresql+psycopg://…: {error}") from None
    if parsed.drivername == "postgresql":
        parsed = parsed.set(drivername="postgresql+psycopg")
    shown = parsed.render_as_string(hide_password=True)
    if parsed.drivername not in ("sqlite", "postgresql+psycopg"):
        raise ValueError(f"the catalog is at {shown}, must be at sqlite:///… or postgresql+psycopg://…")
    if parsed.drivername == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise ValueError(f"the catalog is at {shown}, must be a file: sqlite:////directory/catalog.db")
    return parsed


def _sqlite(url: URL) -> Engine:
    assert url.database is not None
    Path(url.database).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    engine = create_engine(
        url,
        pool_size=_CONNECTIONS,
        max_overflow=_MOST_CONNECTIONS - _CONNECTIONS,
        # The driver would begin transactions where it thinks fit, and never before it reads.
        connect_args={"isolation_level": None, "timeout": _WAIT_S, "check_same_thread": False},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: ConnectionPoolEntry) -> None:
        for pragma in ("synchronous = FULL", "foreign_keys = ON"):
            connection.execute(f"PRAGMA {pragma}")

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        writes = connection.get_execution_options().get("writing")
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _postgresql(url: URL) -> Engine:
    try:
        engine = create_engine(
            url,
            pool_size=_CONNECTIONS,
            max_overflow=_MOST_CONNECTIONS - _CONNECTIONS,
            pool_pre_ping=True,
            connect_args={"connect_timeout": _WAIT_S, **_KEEPALIVE},
        )
    except ModuleNotFoundError as error:
        raise ValueError(
            f"a catalog on PostgreSQL needs {error.name}: pip install 'adapter-router[postgres]'"
        ) from None

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _: ConnectionPoolEntry) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET lock_timeout = '{_WAIT_S}s'")
            cursor.execute(f"SET idle_in_transaction_session_timeout = '{_STALLED_S}s'")
        connection.commit()

    return engine
