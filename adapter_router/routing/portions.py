"""Who got how many of the rows of late: what a queue does not show while it is empty most of the time."""

from __future__ import annotations

_LARGEST = 1e100


class Portions:
    """Rows by name. They fade with the rows that follow, anybody's, so that no clock is needed."""

    def __init__(self, horizon: float = 200.0) -> None:
        """``horizon``: rows for each name, after which those before count a third."""
        self._horizon = horizon
        self._rows: dict[str, float] = {}
        self._total = 0.0
        self._newest = 1.0  # what a row counts now: instead of all others growing smaller, each new one is larger

    def add(self, name: str, rows: int, names: int) -> None:
        """``rows`` more for one of ``names``."""
        self._newest *= 1 + rows / (self._horizon * names)
        self._rows[name] = self._rows.get(name, 0.0) + rows * self._newest
        self._total += rows * self._newest
        if self._newest > _LARGEST:
            self._rows = {one: counted / self._newest for one, counted in self._rows.items()}
            self._total /= self._newest
            self._newest = 1.0

    def of(self, name: str) -> float:
        """Its part of all rows; 0 while there are none."""
        return self._rows.get(name, 0.0) / self._total if self._total else 0.0

    @property
    def total(self) -> float:
        """All rows as they count now."""
        return self._total / self._newest

    def forget(self, name: str) -> None:
        """It has gone."""
        self._total -= self._rows.pop(name, 0.0)
