"""Loads that need not be tried again, or not yet: what was refused stays so, what was unavailable may heal."""

from __future__ import annotations

import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass

from adapter_router.errors import AdapterRejected, AdapterRouterError

_REMEMBERED = 1024
_FIRST_S = 1.0
_LAST_S = 30.0


@dataclass
class _Failure:
    error: AdapterRouterError
    until: float
    wait_s: float


class Refusals:
    """Errors by what was to be loaded, bounded; the oldest are forgotten. Thread-safe."""

    def __init__(self, clock: Callable[[], float] = time.monotonic, remembered: int = _REMEMBERED) -> None:
        self._clock = clock
        self._remembered = remembered
        self._failures: OrderedDict[Hashable, _Failure] = OrderedDict()
        self._lock = threading.Lock()

    def failed(self, key: Hashable, error: AdapterRouterError) -> None:
        """Remember an AdapterRejected for good, anything else for a second, and twice as long each time, up to 30."""
        with self._lock:
            before = self._failures.pop(key, None)
            wait_s = _FIRST_S if before is None else min(2 * before.wait_s, _LAST_S)
            until = math.inf if isinstance(error, AdapterRejected) else self._clock() + wait_s
            self._failures[key] = _Failure(error, until, wait_s)
            while len(self._failures) > self._remembered:
                self._failures.popitem(last=False)

    def succeeded(self, key: Hashable) -> None:
        """It loads after all."""
        with self._lock:
            self._failures.pop(key, None)

    def check(self, key: Hashable, *, for_good: bool = False) -> None:
        """Raise the error to answer with instead of trying; ``for_good``: only one that no time heals."""
        with self._lock:
            failure = self._failures.get(key)
        if failure is None or failure.until <= self._clock() or (for_good and failure.until != math.inf):
            return
        # A new one: an exception that many threads raise would gather all their tracebacks.
        error = failure.error
        raise type(error)(error.message, error.param, error.problems)
