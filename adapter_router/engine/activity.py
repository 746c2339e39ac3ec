"""How hard a device works to have the right adapters on it, of late: rates that fade. No torch."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_MEMORY_S = 10.0


class Activity:
    """Loads and evictions of the last seconds. Thread-safe.

    Both numbers are exponential averages: what was t seconds ago counts exp(-t / memory_s). An idle past counts, too,
    so that both begin at 0.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, memory_s: float = _MEMORY_S) -> None:
        """``clock`` gives seconds."""
        self._clock = clock
        self._memory_s = memory_s
        self._lock = threading.Lock()
        self._then = clock()
        self._loads = 0
        self._loading = 0.0
        self._evictions_s = 0.0

    @property
    def evictions_s(self) -> float:
        """Adapters driven off the device, a second."""
        with self._lock:
            self._fade()
            return self._evictions_s

    @property
    def loading_fraction(self) -> float:
        """The part of the time, 0 to 1, in which at least one adapter was being loaded."""
        with self._lock:
            self._fade()
            return self._loading

    def evicted(self) -> None:
        """One adapter was driven off the device."""
        with self._lock:
            self._fade()
            self._evictions_s += 1 / self._memory_s

    @contextmanager
    def loading(self) -> Iterator[None]:
        """Around one load; others may run beside it."""
        self._count(1)
        try:
            yield
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        with self._lock:
            self._fade()
            self._loads += change

    def _fade(self) -> None:
        """Bring both averages up to now; the number of loads has been the same since the last time."""
        now = self._clock()
        left = math.exp((self._then - now) / self._memory_s)
        self._then = now
        self._evictions_s *= left
        self._loading = self._loading * left + (1 - left if self._loads else 0.0)
