"""Content-addressed store: private, immutable copies of adapter directories.

Adapters are never served from the directory a caller named: a file truncated under a memory map kills the process,
and one rewritten in place changes weights already loaded. A copy is staged, hashed while it is written, and moved
into place under its digest in one rename, so several processes of a node may share a store.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sqlite3
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from adapter_router.catalog.adapter_files import (
    CONFIG,
    FILES,
    HEAD_CONFIG,
    INITIAL,
    MANIFEST,
    REQUIRED,
    WEIGHTS,
    ContentHash,
)
from adapter_router.catalog.copying import Replaced, checked, copy_files, told
from adapter_router.catalog.holds import Hold, hold, take, turn
from adapter_router.catalog.staging import Staging
from adapter_router.catalog.store_index import StoreIndex, bytes_of
from adapter_router.catalog.undecided import Undecided
from adapter_router.errors import AdapterRejected, AdapterUnavailable
from adapter_router.types import AdapterFiles

logger = logging.getLogger(__name__)

_SHORT_OF = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # says nothing about a copy
_COPIES = 3  # of a directory that is written while it is copied, before we give up
_DAMAGED = ".damaged"  # an empty file in a copy that was found to be another than was admitted


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter's private copy: ``digest`` (``sha256:…``) of its files and the ``directory`` that holds them."""

    digest: str
    directory: Path
    _hold: Hold | None = field(default=None, compare=False, repr=False)  # no eviction while somebody has this value

    def read(self) -> AdapterFiles:
        """The files' contents, verified against the digest.

        Raises AdapterUnavailable when the copy is gone or is no longer what was admitted.
        """
        held = None
        try:
            held = self._hold or hold(self.directory)
            paths = {name: self.directory / name for name in FILES}
            files = {name: path.read_bytes() for name, path in paths.items() if name in REQUIRED or path.exists()}
        except OSError as error:
            if error.errno not in _SHORT_OF:
                self._note_damage(held)
            raise AdapterUnavailable(f"stored adapter {self.digest} cannot be read: {error.strerror}") from error
        hasher = ContentHash()
        for name, content in files.items():
            hasher.start_file(name)
            hasher.update(content)
        if hasher.digest() != self.digest:
            self._note_damage(held)
            raise AdapterUnavailable(f"stored adapter {self.digest} was changed on disk; load it again")
        return AdapterFiles(
            files[CONFIG], files[WEIGHTS], files.get(HEAD_CONFIG), files.get(MANIFEST), files.get(INITIAL)
        )

    def __reduce__(self) -> tuple[type[StoredAdapter], tuple[str, Path]]:
        return StoredAdapter, (self.digest, self.directory)  # a hold is its process's

    def _note_damage(self, held: Hold | None) -> None:
        """Of what was read, ``held``: by now another may have put a sound one in its place."""
        with contextlib.suppress(OSError):
            if held is not None and held.is_of(self.directory):
                (self.directory / _DAMAGED).touch()


class ContentStore:
    """Directory of adapters by digest; the only writer of what lies under ``root``. Thread-safe."""

    def __init__(self, root: Path, max_bytes: int = 1 << 40, budget_bytes: int | None = None) -> None:
        """``max_bytes``: of one adapter's weights.

        ``budget_bytes``: of all copies together; where they are more, those go that were not used for longest. A copy
        that is being read or not decided on stays, whatever the budget. An adapter that is larger than all of it is
        refused: everybody else's copies would go, and it could not stay either.
        """
        self.root = root
        self.max_bytes = max_bytes
        self.budget_bytes = budget_bytes
        self.num_evicted = 0
        self._undecided = Undecided()
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.work = root / ".work"  # whatever is not an adapter's copy
        self.work.mkdir(mode=0o700, exist_ok=True)
        self.staging = Staging(self.work / "staging")
        self.index = StoreIndex(root, self.work / "index.db")
        self.staging.tidy()
        if budget_bytes is not None:
            self._keep_index(self.index.reconcile)
            self.make_room(0)

    def admit(self, source: str | os.PathLike[str], *, followed: bool = False) -> StoredAdapter:
        """Copy the adapter directory ``source`` (or ``package:…``) into the store; the same content is kept once.

        ``followed``: it is where links lead, and refused if it is one by now. The caller says with ``settle`` what
        became of it. Raises AdapterRejected with every problem of the directory itself, AdapterUnavailable when it is
        written all the time, or cannot be copied for another reason than its own: no room, too many open files.
        """
        for _ in range(_COPIES):
            try:
                directory = checked(source, self.max_bytes, followed=followed)
                self._check_budget(bytes_of(directory))
                with self.staging.scratch() as staging:
                    return self.adopt(staging, copy_files(directory, staging, self.max_bytes))
            except (Replaced, FileNotFoundError):
                continue
            except OSError as error:
                raise told(source, error) from error
            except ValueError as error:
                raise AdapterRejected.because([str(error)]) from error
        raise AdapterUnavailable(f"{os.fspath(source):.200} is being written; wait until that is done, and try again")

    def adopt(self, staging: Path, digest: str) -> StoredAdapter:
        """Take the directory ``staging``, which lies under ``root`` and has nothing but an adapter's files.

        ``digest`` is that of its files. As ``admit`` from there on. Raises OSError, AdapterRejected.
        """
        self._check_budget(bytes_of(staging))
        stored = StoredAdapter(digest, self._directory(digest))
        self._undecided.begin(digest)
        try:
            while not self._publish(staging, stored):
                pass  # what was there has gone just now
        except BaseException:
            self._undecided.end(digest)
            raise
        self._keep_index(lambda: self.index.add(digest, bytes_of(stored.directory)))
        self.make_room(0)
        return stored

    def find(self, digest: str) -> StoredAdapter | None:
        """The copy of ``digest``, if there is a sound one; it stays as long as somebody has the answer.

        Raises AdapterUnavailable.
        """
        directory = self._directory(digest)
        try:
            held = hold(directory)
            if held is None or (directory / _DAMAGED).exists():
                return None
        except OSError as error:
            raise AdapterUnavailable(f"stored adapter {digest} cannot be opened: {error.strerror}") from error
        self._keep_index(lambda: self.index.touch(digest))
        return StoredAdapter(digest, directory, held)

    def share(self, stored: StoredAdapter, times: int = 1) -> bool:
        """Begin more loads of ``stored``, each with a ``settle`` of its own; False when its copy is gone."""
        return self._undecided.share(stored.digest, stored.directory, times)

    def settle(self, stored: StoredAdapter, *, keep: bool) -> None:
        """End one load of ``stored``. A copy that this process made and that nobody wants is removed."""
        if keep:
            self._undecided.keep(stored.digest)
        made = self._undecided.end(stored.digest)
        if made is not None:
            try:  # unless another process has come upon it meanwhile
                self._remove(stored.digest, lambda: stored.directory.stat().st_mtime_ns == made)
            except OSError as error:
                logger.warning("%s, which is not wanted, cannot be removed: %s", stored.directory, error)
        self.make_room(0)

    def make_room(self, num_bytes: int) -> None:
        """Remove what was not used for longest until ``num_bytes`` more would be within the budget.

        Raises AdapterRejected when so many would not be within it whatever went.
        """
        if self.budget_bytes is None:
            return
        self._check_budget(num_bytes)
        try:
            for digest in self.index.least_recently_used():
                if self.index.num_bytes() + num_bytes <= self.budget_bytes:
                    return
                if self._remove(digest):
                    self.num_evicted += 1
        except (sqlite3.Error, OSError) as error:
            logger.warning("no room can be made in the store at %s: %s", self.root, error)

    def note_seen(self, source: str, fingerprint: str, digest: str) -> None:
        """``source``, when it looked like ``fingerprint``, held ``digest``."""
        self._keep_index(lambda: self.index.note_seen(source, fingerprint, digest))

    def seen(self, source: str, fingerprint: str) -> str | None:
        """What ``source`` held when it looked like ``fingerprint``, if anybody on this node has looked."""
        try:
            return self.index.seen(source, fingerprint)
        except (sqlite3.Error, OSError):
            return None

    def _directory(self, digest: str) -> Path:
        return self.root / digest.replace(":", "-")

    def _check_budget(self, num_bytes: int) -> None:
        if self.budget_bytes is not None and num_bytes > self.budget_bytes:
            limit = f"all adapters' together may have {self.budget_bytes} (store_bytes)"
            raise AdapterRejected.because([f"its files have {num_bytes} bytes, and {limit}"])

    def _publish(self, staging: Path, stored: StoredAdapter) -> bool:
        """Move ``staging`` into place, or come upon what is there; False when that has gone meanwhile."""
        if self._undecided.place(stored.digest, staging, stored.directory):
            return True
        held = hold(stored.directory)
        if held is None or self._put_away_damaged(stored, held):
            return False
        self._undecided.hold(stored.digest, stored.directory, held)
        return True

    def _put_away_damaged(self, stored: StoredAdapter, held: Hold) -> bool:
        """Remove ``held``, the copy that was come upon, if it is damaged; whether it has gone."""
        with contextlib.suppress(AdapterUnavailable):
            stored.read()
            if not (stored.directory / _DAMAGED).exists():
                return False
        with turn(self.work / "mending"):
            if held.is_of(stored.directory):  # else another has done so, and put a sound one there
                self.staging.discard(stored.directory)
        return True

    def _remove(self, digest: str, condition: Callable[[], bool] = lambda: True) -> bool:
        """Remove a copy that nobody holds; whether there was one."""
        directory = self._directory(digest)
        taken = take(directory)
        if taken is None:
            self._keep_index(lambda: self.index.drop(digest, lambda: not directory.exists()))
            return False
        if not condition():
            return False
        # The index first: as soon as the copy has gone from its place another one may be put there, and noted.
        self._keep_index(lambda: self.index.drop(digest))
        self.staging.discard(directory)
        return True

    def _keep_index(self, write: Callable[[], None]) -> None:
        try:
            write()
        except (sqlite3.Error, OSError) as error:
            logger.warning("the index of the store at %s cannot be written: %s", self.root, error)
