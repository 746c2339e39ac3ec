"""How many rows may be sent a second time: retries of everything, when all is slow, would make it slower."""

from __future__ import annotations


class RetryBudget:
    """Rows; filled by every row that is sent first, and a little by time, as Finagle's is."""

    def __init__(self, ratio: float, reserve: float, per_second: float = 10.0) -> None:
        """``ratio``: earned by each row. ``reserve``: what it begins with, and the most it ever holds."""
        self._ratio = ratio
        self._reserve = reserve
        self._per_second = per_second
        self._left = reserve
        self._then = 0.0

    def earn(self, rows: int) -> None:
        """So many rows left for the first time."""
        self._left = min(self._reserve, self._left + self._ratio * rows)

    def take(self, rows: int, now: float) -> bool:
        """Whether so many rows may be sent again; then they are paid for."""
        self._left = min(self._reserve, self._left + self._per_second * max(0.0, now - self._then))
        self._then = now
        if rows > self._left:
            return False
        self._left -= rows
        return True
