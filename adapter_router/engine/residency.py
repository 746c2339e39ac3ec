"""Adapters on the device: read, validated and installed by one loader thread, leased to forwards, evicted when idle.

The forward thread never loads. A thread that waits for an adapter holds no lease while it waits, and a lease is only
held across a forward, so room always comes free and waiting threads cannot block each other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from adapter_router.adapters.validate import Request
from adapter_router.catalog.store import StoredAdapter
from adapter_router.engine.base_model import BaseModel
from adapter_router.engine.placing import place
from adapter_router.engine.reading import Loaded, Reader
from adapter_router.engine.resident import ResidentAdapter
from adapter_router.engine.slots import SlotTable
from adapter_router.errors import AdapterRejected, AdapterRouterError, AdapterUnavailable, InternalError
from adapter_router.metrics import EngineMetrics
from adapter_router.types import AdapterVersion, TaskKind

logger = logging.getLogger(__name__)

_MOST_REFUSED = 256
_SMOOTHING = 0.2  # weight of the newest load in the running mean


@dataclass(eq=False)
class _Ticket:
    """One thread's wish for an adapter; ``resident`` once it is installed and leased for that thread."""

    resident: ResidentAdapter | None = None


class Residency:
    """Which adapters are on the device, by digest. Thread-safe."""

    def __init__(self, base: BaseModel, budget_bytes: int, metrics: EngineMetrics) -> None:
        self.load_s = 0.05  # running mean; a guess until the first load
        self._base = base
        self._reader = Reader(base)
        self._metrics = metrics
        self._slots = SlotTable(budget_bytes)
        self._resident: dict[str, ResidentAdapter] = {}
        self._tasks: dict[str, TaskKind] = {}
        # Problems of mixes by version and name, oldest first: they name the parts, which others call otherwise.
        self._refused: dict[tuple[str, str], tuple[str, ...]] = {}
        self._loading: dict[str, Future[None]] = {}
        self._tickets: defaultdict[str, list[_Ticket]] = defaultdict(list)
        self._changed = threading.Condition()
        self._loader = ThreadPoolExecutor(1, thread_name_prefix="adapter-loader")

    def register(self, stored: StoredAdapter, request: Request) -> Loaded:
        """Validate ``stored`` against the base and install it; blocks the caller, not the forward.

        Raises AdapterRejected with every problem; nothing is installed then.
        """
        try:
            return self._loader.submit(self._load, stored.digest, lambda: self._reader.read(stored, request)).result()
        except (CancelledError, RuntimeError) as error:
            raise AdapterUnavailable("the engine is closing") from error

    def acquire(self, version: AdapterVersion) -> ResidentAdapter:
        """Lease the adapter, loading it first when it is cold. Raises AdapterUnavailable or AdapterRejected."""
        while True:
            with self._changed:
                resident = self._lease(version.digest)
                if resident is not None:
                    return resident
                future = self._start_loading(version)
                ticket = _Ticket()
                self._tickets[version.digest].append(ticket)
            wait([future])
            with self._changed:
                if ticket.resident is not None:  # leased for us when it was installed
                    return ticket.resident
                self._tickets[version.digest].remove(ticket)
            if future.cancelled():
                raise AdapterUnavailable("the engine is closing")
            error = future.exception()
            if error is not None:
                raise error

    def try_acquire(self, digest: str) -> ResidentAdapter | None:
        """Lease the adapter if it is resident."""
        with self._changed:
            return self._lease(digest)

    def prefetch(self, version: AdapterVersion) -> None:
        """Start loading a cold adapter; one that fails is tried again by whoever acquires it."""
        with self._changed:
            if version.digest not in self._resident:
                self._start_loading(version)

    def release(self, digest: str) -> None:
        """Give one lease back."""
        with self._changed:
            self._slots.release(digest)
            self._changed.notify_all()

    def drop(self, digest: str) -> None:
        """Free an adapter's memory now, and that of mixes with it; what is in use is left to eviction."""
        with self._changed:
            self._tasks.pop(digest, None)
            wanted = [known for known, held in self._resident.items() if known == digest or digest in held.parts]
            for idle in wanted:
                if not self._slots.leased(idle):
                    self._evict(idle)

    def resident(self) -> list[str]:
        """Digests on the device, least recently used first."""
        with self._changed:
            return [digest for digest in self._slots.resident() if digest in self._resident]

    def close(self) -> None:
        """Stop the loader thread and free the device."""
        self._loader.shutdown(wait=True, cancel_futures=True)
        self._resident.clear()

    def _lease(self, digest: str) -> ResidentAdapter | None:
        resident = self._resident.get(digest)
        if resident is not None:
            self._slots.lease(digest)
        return resident

    def _start_loading(self, version: AdapterVersion) -> Future[None]:
        if version.digest not in self._loading:
            try:
                self._loading[version.digest] = self._loader.submit(self._load_cold, version)
            except RuntimeError as error:  # the executor has been shut down
                raise AdapterUnavailable("the engine is closing") from error
        return self._loading[version.digest]

    def _load_cold(self, version: AdapterVersion) -> None:
        try:
            if version.digest not in self._resident:
                self._load(version.digest, lambda: self._read(version))
        finally:
            with self._changed:
                self._loading.pop(version.digest, None)

    def _read(self, version: AdapterVersion) -> Loaded:
        """A mix is only read where its parts fit, and is refused at once when it was before: no part of it changes."""
        if not version.parts:
            return self._reader.read_version(version)
        key = (version.digest, version.adapter)
        if key in self._refused:
            raise AdapterRejected.because(self._refused[key])
        try:
            self._check_size(version.num_bytes, is_mix=True)
            return self._reader.read_version(version)
        except AdapterRejected as error:
            self._refused[key] = error.problems
            while len(self._refused) > _MOST_REFUSED:
                self._refused.pop(next(iter(self._refused)))
            raise

    def _load(self, digest: str, read: Callable[[], Loaded]) -> Loaded:
        start = time.perf_counter()
        try:
            loaded = read()
            self._check_task(digest, loaded)
            self._check_size(loaded.num_bytes, is_mix=bool(loaded.parts))
            self._install(digest, loaded)
            if not loaded.parts:
                self._tasks[digest] = loaded.tensors.task
        except AdapterRouterError as error:
            self._metrics.load_failed(error)
            raise
        except Exception as error:
            logger.exception("loading adapter %s failed", digest)
            failure = InternalError(f"loading the adapter failed: {type(error).__name__}")
            self._metrics.load_failed(failure)
            raise failure from error
        seconds = time.perf_counter() - start
        if not loaded.parts:
            self.load_s += _SMOOTHING * (seconds - self.load_s)
        self._metrics.loaded(seconds)
        return loaded

    def _check_task(self, digest: str, loaded: Loaded) -> None:
        """One content serves one task: what is resident is told by its digest alone. A mix's digest has its task."""
        if loaded.parts:
            return
        task = loaded.tensors.task
        known = self._tasks.get(digest, task)
        if known != task:
            raise AdapterRejected.because(
                [
                    f"the same files already serve {known} under another name; give these an adapter_router.json with "
                    f'{{"task": "{task}"}}'
                ]
            )

    def _check_size(self, num_bytes: int, *, is_mix: bool) -> None:
        if is_mix and num_bytes > self._slots.mix_bytes:
            raise AdapterRejected.because(
                [
                    f"the mixed adapters need {num_bytes} bytes on the device, mixes have {self._slots.mix_bytes} of "
                    "adapter_memory_bytes; merge them beforehand with adapter-router merge"
                ]
            )
        if num_bytes > self._slots.budget_bytes:
            raise AdapterRejected.because(
                [f"it needs {num_bytes} bytes on the device, adapter_memory_bytes is {self._slots.budget_bytes}"]
            )

    def _install(self, digest: str, loaded: Loaded) -> None:
        with self._changed:
            if digest in self._resident:
                return
            is_mix = bool(loaded.parts)
            self._make_room(loaded.num_bytes, is_mix)
            self._slots.add(digest, loaded.num_bytes, is_mix=is_mix)
        try:
            resident = place(digest, loaded, self._base)
        except BaseException:
            with self._changed:
                self._slots.remove(digest)
            raise
        with self._changed:
            self._resident[digest] = resident
            for ticket in self._tickets.pop(digest, []):
                ticket.resident = self._lease(digest)
            self._metrics.resident(self._slots.used_bytes, len(self._resident))

    def _make_room(self, num_bytes: int, is_mix: bool) -> None:
        """Evict until ``num_bytes`` fit, waiting for leases to come back where they must."""
        while (victims := self._slots.room_for(num_bytes, is_mix=is_mix)) is None:
            self._changed.wait()
        for victim in victims:
            self._evict(victim)
            self._metrics.evictions.inc()

    def _evict(self, digest: str) -> None:
        del self._resident[digest]
        self._slots.remove(digest)
        self._metrics.resident(self._slots.used_bytes, len(self._resident))
