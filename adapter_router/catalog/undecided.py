"""Loads of copies that are under way in this process: a copy that is not decided on yet stays."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections import Counter
from pathlib import Path

from adapter_router.catalog.holds import Hold, hold


class Undecided:
    """Loads by digest. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._under_way: Counter[str] = Counter()
        self._holds: dict[str, Hold] = {}
        self._made: dict[str, int] = {}  # the stamps of copies that this process has made

    def begin(self, digest: str) -> None:
        """One load; ``place`` or ``hold`` follows."""
        with self._lock:
            self._under_way[digest] += 1

    def share(self, digest: str, directory: Path, times: int) -> bool:
        """Begin more loads of a copy that is there; False when it has gone. Raises OSError."""
        with self._lock:
            if self._under_way[digest] == 0:
                held = hold(directory)
                if held is None:
                    del self._under_way[digest]
                    return False
                self._holds[digest] = held
            self._under_way[digest] += times
        return True

    def place(self, digest: str, staging: Path, directory: Path) -> bool:
        """Move ``staging`` to ``directory`` and hold it; False when a copy is there. Raises OSError."""
        made = stamp(staging)
        held = hold(staging)  # from before it is in its place: there is no moment in which it could be evicted
        if held is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(staging))
        with self._lock:
            try:
                staging.rename(directory)
            except OSError as error:
                if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
                    return False
                raise
            self._made[digest] = made
            self._holds[digest] = held
        return True

    def hold(self, digest: str, directory: Path, held: Hold) -> None:
        """A copy that was there already. Raises OSError."""
        with self._lock:
            self._holds[digest] = held
            if digest not in self._made:
                stamp(directory)  # whoever made it shall not remove it

    def keep(self, digest: str) -> None:
        """What this process has made is wanted."""
        with self._lock:
            self._made.pop(digest, None)

    def end(self, digest: str) -> int | None:
        """One load; the stamp of the copy if this was the last, nobody wants it, and this process has made it."""
        with self._lock:
            self._under_way[digest] -= 1
            if self._under_way[digest] > 0:
                return None
            del self._under_way[digest]
            if digest in self._holds:
                self._holds.pop(digest).release()
            return self._made.pop(digest, None)


def stamp(directory: Path) -> int:
    """Note in the file system that ``directory`` is wanted; a number no other caller gets."""
    now = time.time_ns()
    os.utime(directory, ns=(now, now))
    return directory.stat().st_mtime_ns
