"""Directories on a store's own disk that are not an adapter's copy yet, or not any more."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

from adapter_router.catalog.holds import hold, take


class Staging:
    """The directories below ``home``, which several processes share. Thread-safe; every method raises OSError."""

    def __init__(self, home: Path) -> None:
        self._home = home
        home.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A directory for as long as the caller needs it."""
        held = None
        while held is None:  # without it another process would tidy the directory away, and may have just now
            path = Path(tempfile.mkdtemp(dir=self._home))
            try:
                held = hold(path)
            except OSError:
                path.rmdir()
                raise
        try:
            yield path
        finally:
            shutil.rmtree(path, ignore_errors=True)
            held.release()

    def discard(self, directory: Path) -> None:
        """Remove ``directory``, which the caller holds: all at once for everybody else, and also on a full disk."""
        gone = self._home / uuid.uuid4().hex
        directory.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)

    def tidy(self) -> None:
        """Remove what processes that died have left behind."""
        for leftover in self._home.glob("*"):
            taken = take(leftover)
            if taken is not None:
                shutil.rmtree(leftover, ignore_errors=True)
