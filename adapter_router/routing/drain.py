"""How fast the queue drains when there is enough in it: what could be served, not what happened to be asked for."""

from __future__ import annotations

_INTERVAL_S = 0.1
_HALF_LIFE_S = 5.0
_KNOWN_S = 0.5  # of measuring, before a rate is named
_STALE_S = 60.0


class Drain:
    """Rows and tokens a second, from one departure to later ones.

    An interval counts if at least twice as much as was served in it waited all through it; one with less only if it was
    faster than what is known: then replicas can do that too. What was measured counts half after 5 s of measuring, and
    nothing when no interval has counted for a minute.
    """

    def __init__(self) -> None:
        self._seconds = self._rows = self._tokens = 0.0  # of the intervals that count, the older the less
        self._counted = 0.0  # when the last one ended
        self._start: float | None = None
        self._served = (0, 0)  # rows and tokens since ``_start``
        self._fewest = 0  # tokens queued at any time since ``_start``

    def rates(self, now: float) -> tuple[float, float] | None:
        """Rows and tokens a second, both above 0; None while they are not known."""
        if self._seconds < _KNOWN_S or now - self._counted > _STALE_S:
            return None
        return self._rows / self._seconds, self._tokens / self._seconds

    def left(self, rows: int, tokens: int, queued: int, now: float, served: bool) -> None:
        """``rows`` have left, ``queued`` tokens stay."""
        self._fewest = min(self._fewest, queued)
        if not queued:
            self._start = None
        elif served and self._start is None:
            self._begin(queued, now)
        elif served and self._start is not None:
            self._served = self._served[0] + rows, self._served[1] + tokens
            if now - self._start >= _INTERVAL_S:
                self._end(now - self._start, now)
                self._begin(queued, now)

    def _begin(self, queued: int, now: float) -> None:
        self._start, self._served, self._fewest = now, (0, 0), queued

    def _end(self, seconds: float, now: float) -> None:
        if now - self._counted > _STALE_S:
            self._seconds = self._rows = self._tokens = 0.0
        rows, tokens = self._served
        busy = self._fewest >= 2 * tokens
        if not busy and not (self._seconds and tokens / seconds > self._tokens / self._seconds):
            return
        fade = 0.5 ** (seconds / _HALF_LIFE_S)
        self._seconds = fade * self._seconds + seconds
        self._rows = fade * self._rows + rows
        self._tokens = fade * self._tokens + tokens
        self._counted = now
