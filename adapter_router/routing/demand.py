"""How much is asked of each adapter just now: rates that fade, in memory that does not grow."""

from __future__ import annotations

import heapq
import math
from collections import OrderedDict


class Demand:
    """Rates by key; what is asked for counts half after ``half_life_s``. The caller brings the clock."""

    def __init__(self, half_life_s: float = 10.0, capacity: int = 100_000) -> None:
        """``capacity``: keys that are remembered, the most recently noted ones."""
        self._fade = math.log(2) / half_life_s
        self._capacity = capacity
        self._noted: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._noted)

    def note(self, key: str, amount: float, now: float) -> None:
        """``amount``, in any unit, was asked of ``key``; ``now`` in seconds, never less than before."""
        self._noted[key] = (self._weight(key, now) + amount, now)
        self._noted.move_to_end(key)
        if len(self._noted) > self._capacity:
            self._noted.popitem(last=False)

    def rate(self, key: str, now: float) -> float:
        """Amount per second: of what comes evenly, its rate, once it has come for a few half-lives."""
        return self._weight(key, now) * self._fade

    def hottest(self, count: int, now: float) -> list[str]:
        """The ``count`` keys of the highest rates, highest first. Looks at all that is remembered."""
        return heapq.nlargest(count, self._noted, key=lambda key: self._weight(key, now))

    def _weight(self, key: str, now: float) -> float:
        amount, then = self._noted.get(key, (0.0, now))
        return amount * math.exp(-self._fade * (now - then))
