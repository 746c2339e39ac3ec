"""What a store holds, in the order of use, and what it last saw at each source: a small database beside the copies.

It repeats what the directories say, so that neither making room nor looking at a source costs the listing of all
copies. Lost or damaged, it is made again from them.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from adapter_router.catalog.adapter_files import identity

_Result = TypeVar("_Result")

_BUSY_S = 5.0
_SCHEMA = (
    "CREATE TABLE copies (digest TEXT PRIMARY KEY, bytes INTEGER NOT NULL, used REAL NOT NULL) WITHOUT ROWID",
    "CREATE INDEX by_use ON copies (used, digest)",
    "CREATE TABLE total (bytes INTEGER NOT NULL)",
    "INSERT INTO total VALUES (0)",
    "CREATE TRIGGER added AFTER INSERT ON copies BEGIN UPDATE total SET bytes = bytes + NEW.bytes; END",
    "CREATE TRIGGER gone AFTER DELETE ON copies BEGIN UPDATE total SET bytes = bytes - OLD.bytes; END",
    "CREATE TABLE seen (source TEXT PRIMARY KEY, fingerprint TEXT NOT NULL, digest TEXT NOT NULL) WITHOUT ROWID",
    "CREATE INDEX seen_by_digest ON seen (digest)",
)


class StoreIndex:
    """Thread-safe, and shared by the processes that share the store."""

    def __init__(self, root: Path, path: Path) -> None:
        """Of the store at ``root``, in the file ``path``. Every method raises sqlite3.Error, on a full disk for one."""
        self._root = root
        self._path = path
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._opened: int | None = None

    def add(self, digest: str, num_bytes: int) -> None:
        """There is a copy of ``digest``, in use just now."""
        self._run(
            lambda db: db.execute("INSERT OR IGNORE INTO copies VALUES (?, ?, ?)", (digest, num_bytes, time.time()))
        )
        self.touch(digest)

    def touch(self, digest: str) -> None:
        """``digest`` is in use just now."""
        self._run(lambda db: db.execute("UPDATE copies SET used = ? WHERE digest = ?", (time.time(), digest)))

    def drop(self, digest: str, condition: Callable[[], bool] = lambda: True) -> None:
        """There is no copy of ``digest`` any more, if ``condition`` holds while nobody else can note one."""
        self._run(lambda db: _forget(db, digest) if condition() else None)

    def num_bytes(self) -> int:
        """Of all copies."""
        return int(self._run(lambda db: db.execute("SELECT bytes FROM total").fetchone()[0]))

    def reconcile(self) -> None:
        """Agree with the directories there are. Costs the listing of all copies."""
        self._run(self._agree)

    def least_recently_used(self) -> Iterator[str]:
        """Digests, one after the other; any of them may be dropped meanwhile."""
        query = "SELECT used, digest FROM copies WHERE (used, digest) > (?, ?) ORDER BY used, digest LIMIT 1"
        after: tuple[float, str] = (-1.0, "")
        while True:
            row = self._run(partial(_first, query, after))
            if row is None:
                return
            after = (row[0], row[1])
            yield after[1]

    def note_seen(self, source: str, fingerprint: str, digest: str) -> None:
        """``source``, when it looked like ``fingerprint``, held ``digest``."""
        self._run(lambda db: db.execute("INSERT OR REPLACE INTO seen VALUES (?, ?, ?)", (source, fingerprint, digest)))

    def seen(self, source: str, fingerprint: str) -> str | None:
        """What ``source`` held when it looked like ``fingerprint``; None: it was not looked at."""
        query = "SELECT digest FROM seen WHERE source = ? AND fingerprint = ?"
        row = self._run(lambda db: db.execute(query, (source, fingerprint)).fetchone())
        return None if row is None else str(row[0])

    def _run(self, action: Callable[[sqlite3.Connection], _Result]) -> _Result:
        with self._lock:
            try:
                return self._transact(action)
            except sqlite3.OperationalError:
                raise  # locked for long, or no room: nothing wrong with the file
            except sqlite3.DatabaseError:
                self._close()
                for suffix in ("", "-wal", "-shm"):
                    self._path.with_name(self._path.name + suffix).unlink(missing_ok=True)
                return self._transact(action)

    def _transact(self, action: Callable[[sqlite3.Connection], _Result]) -> _Result:
        if self._connection is not None and self._opened != _inode(self._path):
            self._close()  # another process found it damaged
        if self._connection is None:
            self._connection = self._open()
            self._opened = _inode(self._path)
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            result = action(self._connection)
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            raise
        self._connection.execute("COMMIT")
        return result

    def _open(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, timeout=_BUSY_S, isolation_level=None, check_same_thread=False)
        try:
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = OFF")  # it can be made again
            connection.execute("BEGIN IMMEDIATE")
            if connection.execute("PRAGMA user_version").fetchone()[0] == 0:
                for statement in _SCHEMA:
                    connection.execute(statement)
                self._agree(connection)
                connection.execute("PRAGMA user_version = 1")
            connection.execute("COMMIT")
        except BaseException:
            connection.close()
            raise
        return connection

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
        self._connection = None

    def _agree(self, db: sqlite3.Connection) -> None:
        known = {row[0] for row in db.execute("SELECT digest FROM copies")}
        with os.scandir(self._root) as found:
            there = {entry.name.replace("-", ":", 1): Path(entry.path) for entry in found if _is_copy(entry.name)}
        for digest in known - there.keys():
            _forget(db, digest)
        for digest in there.keys() - known:
            with contextlib.suppress(FileNotFoundError):
                status = there[digest].stat()
                db.execute("INSERT INTO copies VALUES (?, ?, ?)", (digest, bytes_of(there[digest]), status.st_mtime))


def bytes_of(directory: Path) -> int:
    """Of the files of an adapter that are in ``directory``."""
    return sum(size for _, _, size, *_ in identity(directory))


def _first(query: str, values: Sequence[object], db: sqlite3.Connection) -> tuple[Any, ...] | None:
    row: tuple[Any, ...] | None = db.execute(query, values).fetchone()
    return row


def _forget(db: sqlite3.Connection, digest: str) -> None:
    db.execute("DELETE FROM copies WHERE digest = ?", (digest,))
    db.execute("DELETE FROM seen WHERE digest = ?", (digest,))


def _is_copy(name: str) -> bool:
    return name.startswith("sha256-")


def _inode(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except FileNotFoundError:
        return None
