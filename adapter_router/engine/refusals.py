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

Key = tuple[str, Hashable]
"""The digest of what was to be loaded, and whatever else the error depends on."""


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
        self._failures: OrderedDict[Key, _Failure] = OrderedDict()
        self._lock = threading.Lock()

    def failed(self, key: Key, error: AdapterRouterError) -> None:
        """Remember an AdapterRejected for good, anything else for a second, and twice as long each time, up to 30."""
        with self._lock:
            before = self._failures.pop(key, None)
            wait_s = _FIRST_S if before is None else min(2 * before.wait_s, _LAST_S)
            until = math.inf if isinstance(error, AdapterRejected) else self._clock() + wait_s
            self._failures[key] = _Failure(_bare(error), until, wait_s)
            while len(self._failures) > self._remembered:
                self._failures.popitem(last=False)

    def arrived(self, digest: str) -> None:
        """It is on this node after all: whoever could not have it may try again, and what was refused stays so."""
        with self._lock:
            healed = [key for key, one in self._failures.items() if key[0] == digest and one.until != math.inf]
            for key in healed:
                del self._failures[key]

    def check(self, key: Key) -> None:
        """Raise the error to answer with instead of trying."""
        with self._lock:
            failure = self._failures.get(key)
        if failure is not None and failure.until > self._clock():
            raise _bare(failure.error)


def _bare(error: AdapterRouterError) -> AdapterRouterError:
    """The error without its traceback, which keeps alive all that was being worked on: an adapter's whole files."""
    return type(error)(error.message, error.param, error.problems)
