"""One fetch of a source at a time: within a process its callers share the outcome, other processes wait for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from adapter_router.catalog.holds import take
from adapter_router.catalog.store import ContentStore, StoredAdapter
from adapter_router.errors import AdapterRouterError, AdapterUnavailable

_LOOK_S = 0.05


class _Flight:
    def __init__(self) -> None:
        self.num_waiting = 0
        self.done = threading.Event()
        self.outcome: StoredAdapter | BaseException | None = None


class Flights:
    """Of one process. Thread-safe."""

    def __init__(self, store: ContentStore) -> None:
        self._store = store
        self._lock = threading.Lock()
        self._flights: dict[str, _Flight] = {}

    def join(self, key: str, fetch: Callable[[], StoredAdapter]) -> StoredAdapter:
        """What ``fetch`` returns or raises, called by whoever is first; every caller settles the copy it gets."""
        with self._lock:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = _Flight()
                first = True
            else:
                flight.num_waiting += 1
                first = False
        if first:
            self._fly(key, flight, fetch)
        flight.done.wait()
        outcome = flight.outcome
        if isinstance(outcome, StoredAdapter):
            return outcome
        if isinstance(outcome, AdapterRouterError) and not first:
            raise type(outcome)(*outcome.args)  # a traceback belongs to one thread
        assert outcome is not None
        raise outcome

    def _fly(self, key: str, flight: _Flight, fetch: Callable[[], StoredAdapter]) -> None:
        try:
            flight.outcome = fetch()
        except BaseException as error:
            flight.outcome = error
        with self._lock:
            del self._flights[key]  # nobody joins from now on
        if isinstance(flight.outcome, StoredAdapter) and flight.num_waiting:
            self._store.share(flight.outcome, flight.num_waiting)
        flight.done.set()


@contextmanager
def alone(home: Path, timeout_s: float) -> Iterator[None]:
    """Have the directory ``home`` for this process and this thread; it is made, and may be removed meanwhile.

    Raises AdapterUnavailable when others have it for ``timeout_s``.
    """
    until = time.monotonic() + timeout_s
    while True:
        home.mkdir(mode=0o700, parents=True, exist_ok=True)
        taken = take(home)
        if taken is not None:
            break
        if time.monotonic() >= until:
            raise AdapterUnavailable(f"another process of this node was fetching it for {timeout_s:g} s; try again")
        time.sleep(_LOOK_S)
    try:
        yield
    finally:
        taken.release()
