"""Who still waits for the rows of one call: each for its own time, all of them until the call is given up."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Sequence

from adapter_router.errors import AdapterRouterError, DeadlineExceeded
from adapter_router.types import Row

Gone = Callable[[int], AdapterRouterError | None]
"""Why nobody waits any more for the row of that number; None while somebody does. Asked from any thread."""


class CallCancelled(AdapterRouterError):
    """Stands in the place of a row whose caller has gone: nobody reads it, the metrics count it."""

    code = "cancelled"
    status = 499


class Callers:
    """Of the rows of one call. Thread-safe."""

    def __init__(self, rows: Sequence[Row], clock: Callable[[], float] = time.monotonic) -> None:
        """Time runs from now on; ``clock`` gives seconds."""
        now = clock()
        self._clock = clock
        self._timeouts = [row.timeout_s for row in rows]
        self._until = [math.inf if seconds is None else now + seconds for seconds in self._timeouts]
        self._hung_up = threading.Event()

    def hang_up(self) -> None:
        """Nobody waits for any of them from now on."""
        self._hung_up.set()

    def gone(self, index: int) -> AdapterRouterError | None:
        """See ``Gone``."""
        if self._hung_up.is_set():
            return CallCancelled("the call was cancelled")
        if self._clock() < self._until[index]:
            return None
        return DeadlineExceeded(f"its turn did not come within the {self._timeouts[index]:.3g} s that the row had left")
