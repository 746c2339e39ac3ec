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
import shutil
import sqlite3
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
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
    directory_problems,
)
from adapter_router.catalog.copying import Replaced, copy_files
from adapter_router.catalog.holds import Hold, hold, take
from adapter_router.catalog.location import resolve
from adapter_router.catalog.store_index import StoreIndex, bytes_of
from adapter_router.errors import AdapterRejected, AdapterUnavailable
from adapter_router.types import AdapterFiles

logger = logging.getLogger(__name__)

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
        try:
            _held = self._hold or hold(self.directory)
            paths = {name: self.directory / name for name in FILES}
            files = {name: path.read_bytes() for name, path in paths.items() if name in REQUIRED or path.exists()}
        except OSError as error:
            if isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError):
                self._note_damage()
            raise AdapterUnavailable(f"stored adapter {self.digest} cannot be read: {error.strerror}") from error
        hasher = ContentHash()
        for name, content in files.items():
            hasher.start_file(name)
            hasher.update(content)
        if hasher.digest() != self.digest:
            self._note_damage()
            raise AdapterUnavailable(f"stored adapter {self.digest} was changed on disk; load it again")
        return AdapterFiles(
            files[CONFIG], files[WEIGHTS], files.get(HEAD_CONFIG), files.get(MANIFEST), files.get(INITIAL)
        )

    def __reduce__(self) -> tuple[type[StoredAdapter], tuple[str, Path]]:
        return StoredAdapter, (self.digest, self.directory)  # a hold is its process's

    def _note_damage(self) -> None:
        with contextlib.suppress(OSError):
            (self.directory / _DAMAGED).touch()


class ContentStore:
    """Directory of adapters by digest; the only writer of what lies under ``root``. Thread-safe."""

    def __init__(self, root: Path, max_bytes: int = 1 << 40, budget_bytes: int | None = None) -> None:
        """``max_bytes``: of one adapter's weights, ``adapter_memory_bytes``: no more fits on a device.

        ``budget_bytes``: of all copies together; where they are more, those go that were not used for longest. A copy
        that is being read or not decided on stays, whatever the budget.
        """
        self.root = root
        self.max_bytes = max_bytes
        self.budget_bytes = budget_bytes
        self.num_evicted = 0
        self._lock = threading.Lock()
        self._undecided: Counter[str] = Counter()  # loads under way, by digest
        self._holds: dict[str, Hold] = {}  # of the undecided
        self._mending = threading.Lock()
        self._created: dict[str, int] = {}  # when this process made the copies of loads that are under way
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.work = root / ".work"  # whatever is not an adapter's copy
        self.work.mkdir(mode=0o700, exist_ok=True)
        self.index = StoreIndex(root, self.work / "index.db")
        self._tidy()

    def admit(self, source: str | os.PathLike[str], *, followed: bool = False) -> StoredAdapter:
        """Copy the adapter directory ``source`` (or ``package:…``) into the store; the same content is kept once.

        ``followed``: it is where links lead, and refused if it is one by now. The caller says with ``settle`` what
        became of it. Raises AdapterRejected with every problem of the directory itself, AdapterUnavailable when it is
        written all the time.
        """
        for _ in range(_COPIES):
            directory = self._checked(source, followed=followed)
            try:
                with self.scratch() as staging:
                    return self.adopt(staging, copy_files(directory, staging, self.max_bytes))
            except Replaced:
                continue
            except OSError as error:
                raise AdapterRejected.because([f"{source} cannot be copied: {error.strerror}"]) from error
            except ValueError as error:
                raise AdapterRejected.because([str(error)]) from error
        raise AdapterUnavailable(f"{os.fspath(source):.200} is being written; wait until that is done, and try again")

    def adopt(self, staging: Path, digest: str) -> StoredAdapter:
        """Take the directory ``staging``, which lies under ``root`` and has nothing but an adapter's files.

        ``digest`` is that of its files. As ``admit`` from there on. Raises OSError.
        """
        stored = StoredAdapter(digest, self._directory(digest))
        with self._lock:
            self._undecided[digest] += 1
        try:
            while not self._publish(staging, stored):
                pass  # what was there has been evicted just now
        except BaseException:
            self._decide(digest)
            raise
        self._keep_index(lambda: self.index.add(digest, bytes_of(stored.directory)))
        self.make_room(0)
        return stored

    def find(self, digest: str) -> StoredAdapter | None:
        """The copy of ``digest``, if there is a sound one; it stays as long as somebody has the answer."""
        directory = self._directory(digest)
        held = hold(directory)
        if held is None or (directory / _DAMAGED).exists():
            return None
        self._keep_index(lambda: self.index.touch(digest))
        return StoredAdapter(digest, directory, held)

    def share(self, stored: StoredAdapter, times: int = 1) -> bool:
        """Begin more loads of ``stored``, each with a ``settle`` of its own; False when its copy is gone."""
        with self._lock:
            if self._undecided[stored.digest] == 0:
                held = hold(stored.directory)
                if held is None:
                    del self._undecided[stored.digest]
                    return False
                self._holds[stored.digest] = held
            self._undecided[stored.digest] += times
        return True

    def settle(self, stored: StoredAdapter, *, keep: bool) -> None:
        """End one load of ``stored``. A copy that this process made and that nobody wants is removed."""
        with self._lock:
            if keep:
                self._created.pop(stored.digest, None)
            made = self._created.get(stored.digest)
        if self._decide(stored.digest) and made is not None:
            # Unless another process has come upon it meanwhile.
            self._remove(stored.digest, lambda: stored.directory.stat().st_mtime_ns == made)
        self.make_room(0)

    def make_room(self, num_bytes: int) -> None:
        """Remove what was not used for longest until ``num_bytes`` more would be within the budget."""
        if self.budget_bytes is None:
            return
        with contextlib.suppress(sqlite3.Error):
            for digest in self.index.least_recently_used():
                if self.index.num_bytes() + num_bytes <= self.budget_bytes:
                    return
                if self._remove(digest):
                    self.num_evicted += 1

    def note_seen(self, source: str, fingerprint: str, digest: str) -> None:
        """``source``, when it looked like ``fingerprint``, held ``digest``."""
        self._keep_index(lambda: self.index.note_seen(source, fingerprint, digest))

    def seen(self, source: str, fingerprint: str) -> str | None:
        """What ``source`` held when it looked like ``fingerprint``, if anybody on this node has looked."""
        try:
            return self.index.seen(source, fingerprint)
        except sqlite3.Error:
            return None

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory on the store's own disk for as long as the caller needs it."""
        home = self.work / "staging"
        home.mkdir(mode=0o700, exist_ok=True)
        held = None
        while held is None:  # without it another process would tidy the directory away, and may have just now
            path = Path(tempfile.mkdtemp(dir=home))
            held = hold(path)
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            held.release()

    def _directory(self, digest: str) -> Path:
        return self.root / digest.replace(":", "-")

    def _checked(self, source: str | os.PathLike[str], *, followed: bool) -> Path:
        """``source`` with its links followed."""
        try:
            directory = Path(resolve(os.fspath(source)))
            problems = directory_problems(directory, self.max_bytes)
            actual = directory if problems else directory.resolve()
            if followed and actual != directory:
                problems = [f"{directory} is a link by now; name the place that it leads to"]
        except ValueError as error:
            problems = [str(error)]
        except OSError as error:
            problems = [f"{os.fspath(source):.200} is not a directory that can be read: {error.strerror}"]
        if problems:
            raise AdapterRejected.because(problems)
        return actual

    def _publish(self, staging: Path, stored: StoredAdapter) -> bool:
        """Move ``staging`` into place, or come upon what is there; False when that has gone meanwhile."""
        with self._lock:
            made = _stamp(staging)
            try:
                staging.rename(stored.directory)
                self._created[stored.digest] = made
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
            ours = stored.digest in self._created
        held = hold(stored.directory)
        if held is None:
            return False
        with self._lock:
            self._holds[stored.digest] = held
        if staging.exists():
            self._mend(staging, stored)
        if not ours:
            _stamp(stored.directory)  # whoever made it shall not remove it
        return True

    def _mend(self, staging: Path, stored: StoredAdapter) -> None:
        """Put ``staging`` in the place of a copy that is damaged."""
        with self._mending:
            try:
                stored.read()
                if not (stored.directory / _DAMAGED).exists():
                    return
            except AdapterUnavailable:
                pass
            with self.scratch() as damaged:
                stored.directory.rename(damaged / "copy")
                staging.rename(stored.directory)
            held = hold(stored.directory)
            if held is not None:
                with self._lock:
                    self._holds[stored.digest] = held

    def _decide(self, digest: str) -> bool:
        """End one load; whether it was the last of this digest."""
        with self._lock:
            self._undecided[digest] -= 1
            if self._undecided[digest] > 0:
                return False
            del self._undecided[digest]
            self._created.pop(digest, None)
            if digest in self._holds:
                self._holds.pop(digest).release()
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
        with self.scratch() as refused:
            directory.rename(refused / "copy")
        return True

    def _keep_index(self, write: Callable[[], None]) -> None:
        try:
            write()
        except sqlite3.Error as error:
            logger.warning("the index of the store at %s cannot be written: %s", self.root, error)

    def _tidy(self) -> None:
        """Remove what processes that died have left behind."""
        for leftover in (self.work / "staging").glob("*"):
            taken = take(leftover)
            if taken is not None:
                shutil.rmtree(leftover, ignore_errors=True)
        if self.budget_bytes is not None:
            self._keep_index(self.index.reconcile)
            self.make_room(0)


def _stamp(directory: Path) -> int:
    """Note in the file system that ``directory`` is wanted; a number no other caller gets."""
    now = time.time_ns()
    os.utime(directory, ns=(now, now))
    return directory.stat().st_mtime_ns
