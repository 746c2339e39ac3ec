"""What came into memory and what went, numbered, so that a reader learns what is new to it and nothing else."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable

from adapter_router.types import ResidencyChange

_REMEMBERED = 4096


class ChangeLog:
    """Digests that came or went, newest last. Not thread-safe."""

    def __init__(self, remembered: int = _REMEMBERED) -> None:
        """``remembered``: changes kept; a reader who is further behind is told everything."""
        self.revision = 0
        self._changed: deque[str] = deque(maxlen=remembered)

    def note(self, digest: str) -> None:
        """An adapter came or went."""
        self.revision += 1
        self._changed.append(digest)

    def since(
        self, revision: int, holds: Callable[[str], bool], everything: Callable[[], Iterable[str]]
    ) -> ResidencyChange:
        """News after ``revision``, in time that grows with their number.

        ``holds``: what is there now; ``everything``: all of it, asked for where the reader is too far behind.
        """
        behind = self.revision - revision
        if not 0 <= behind <= len(self._changed):  # too far behind, or not a revision of this log
            return ResidencyChange(self.revision, frozenset(everything()), complete=True)
        newest = reversed(self._changed)
        touched = {next(newest) for _ in range(behind)}
        added = frozenset(digest for digest in touched if holds(digest))
        return ResidencyChange(self.revision, added, frozenset(touched - added))
