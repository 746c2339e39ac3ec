"""The highest value of the last seconds."""

from __future__ import annotations

from collections import deque


class Highest:
    """Of a value that holds until the next one is told, throughout the last ``length_s`` seconds."""

    def __init__(self, length_s: float) -> None:
        self._length_s = length_s
        self._began: float | None = None
        # [until when it held, value], values falling: one that is not above a later one can never be the highest again.
        self._held: deque[list[float]] = deque()

    def tell(self, value: float, now: float) -> float | None:
        """The value from ``now`` on; returns the highest, None while less than ``length_s`` are known."""
        self._began = now if self._began is None else self._began
        if self._held:
            self._held[-1][0] = now
        while self._held and self._held[-1][1] <= value:
            self._held.pop()
        self._held.append([now, value])
        while len(self._held) > 1 and self._held[0][0] <= now - self._length_s:
            self._held.popleft()
        return self._held[0][1] if now - self._began >= self._length_s else None
