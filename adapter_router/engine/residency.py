"""Adapters for forwards: leased where they are in memory, loaded where they are not. One lock, held for bookkeeping.

The forward thread never loads.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Hashable, Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError
from concurrent.futures import wait as wait_for
from typing import TypeVar

from adapter_router.adapters.validate import Request
from adapter_router.catalog.store import StoredAdapter
from adapter_router.config import EngineConfig
from adapter_router.engine.base_model import BaseModel
from adapter_router.engine.loading import Loading
from adapter_router.engine.loads import PATIENCE_S, Loads
from adapter_router.engine.reading import Loaded, Obtain
from adapter_router.engine.resident import ResidentAdapter
from adapter_router.engine.tickets import Ticket
from adapter_router.engine.tiers import Tiers
from adapter_router.engine.transfer import Transfer
from adapter_router.errors import AdapterRouterError, AdapterUnavailable
from adapter_router.metrics import EngineMetrics
from adapter_router.types import AdapterVersion, Capacity, HeldAdapter, ReplicaLoad, ResidencyChange

Key = TypeVar("Key", bound=Hashable)
"""What the caller tells the adapters it asks for apart by."""


class Residency:
    """Adapters by digest. Thread-safe."""

    def __init__(self, base: BaseModel, config: EngineConfig, obtain: Obtain, metrics: EngineMetrics) -> None:
        self._changed = threading.Condition()
        self._tiers = Tiers(config.adapter_memory_bytes, config.host_memory_bytes, Transfer(base.device), metrics)
        self._loading = Loading(base, obtain, config.loader_threads, self._tiers.unfit, self._tiers.activity, metrics)
        self._loads = Loads(base.fingerprint, self._loading, self._tiers, self._changed, metrics)

    @property
    def load_s(self) -> float:
        """Running mean of the time a load takes."""
        return self._loads.load_s

    # -- rows ----------------------------------------------------------------------------------------------------

    def request(self, versions: Mapping[Key, AdapterVersion], rows: Mapping[Key, int]) -> dict[Key, Ticket]:
        """Ask for adapters; ``rows`` that want each. Those in memory are leased at once, if they fit."""
        with self._changed:
            for key, count in rows.items():
                self._tiers.popularity.used(versions[key].digest, count)
            # Those on the device first: room for the others must not be made at their cost.
            order = sorted(versions, key=lambda key: not self._tiers.on_device(versions[key].digest))
            tickets = {key: self._loads.ticket(versions[key]) for key in order}
            new = self._loads.take_new()
        for load in new:
            self._loads.start(load)
        return tickets

    def collect(
        self, tickets: dict[Key, Ticket], deadline: float | None = None
    ) -> dict[Key, ResidentAdapter | AdapterRouterError]:
        """Take those of ``tickets`` that are done out of it.

        ``deadline``: wait for one until then (``time.monotonic``), when all that is left is given up.
        """
        if deadline is not None:
            wait_for(tickets.values(), max(0.0, deadline - time.monotonic()), FIRST_COMPLETED)
        done = [key for key, ticket in tickets.items() if ticket.done()]
        found = {key: tickets.pop(key).outcome() for key in done}
        if deadline is not None and not found:
            late = AdapterUnavailable(f"the adapter could not be loaded within {PATIENCE_S:.0f} s; try again later")
            found = dict.fromkeys(tickets, late)
            self.withdraw(tickets)
        return found

    def withdraw(self, tickets: dict[Key, Ticket]) -> None:
        """Give up waiting, and give back what came in the meantime."""
        if not tickets:
            return
        with self._changed:
            for ticket in tickets.values():
                if not ticket.done():
                    self._loads.withdraw(ticket)
                elif ticket.exception() is None:
                    self._tiers.release(ticket.version.digest)
            tickets.clear()
            self._changed.notify_all()

    def release(self, digest: str) -> None:
        """Give one lease back."""
        with self._changed:
            self._tiers.release(digest)
            self._changed.notify_all()

    # -- adapters ------------------------------------------------------------------------------------------------

    def admit(self, stored: StoredAdapter, request: Request, *, keep: bool) -> Loaded:
        """Check ``stored`` against the base; blocks the caller, not the forward.

        ``keep``: and put it on the device. Otherwise it stays in host memory while nobody else wants the room. Raises
        AdapterRejected with every problem; nothing is kept then.
        """
        try:
            return self._loading.admit(stored, request, lambda come: self._loads.admitted(come, keep=keep)).result()
        except CancelledError as error:
            raise AdapterUnavailable("the engine is closing") from error

    def acquire(self, version: AdapterVersion) -> ResidentAdapter:
        """Lease the adapter, loading it first when it is cold. Raises AdapterUnavailable, AdapterRejected and so on."""
        tickets = self.request({version.digest: version}, {version.digest: 1})
        (found,) = self.collect(tickets, time.monotonic() + PATIENCE_S).values()
        if isinstance(found, AdapterRouterError):
            raise found
        return found

    def prefetch(self, version: AdapterVersion) -> None:
        """Start loading a cold adapter; what goes wrong is told to whoever asks for it."""
        self.withdraw(self.request({version.digest: version}, {}))

    def pin(self, version: AdapterVersion) -> None:
        """Load the adapter if need be, and keep it on the device. Raises as ``acquire``; InvalidRequest if too many."""
        self.acquire(version)
        try:
            with self._changed:
                self._tiers.pin(version.digest)
        finally:
            self.release(version.digest)

    def unpin(self, digest: str) -> None:
        """Let an adapter be evicted again."""
        with self._changed:
            self._tiers.unpin(digest)
            self._changed.notify_all()

    def drop(self, digest: str) -> None:
        """Free an adapter's memory now, and that of mixes with it; what is in use is left to eviction."""
        with self._changed:
            self._loads.forget_task(digest)
            self._tiers.drop(digest)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop loading and free all memory; what is in use goes with its last lease."""
        with self._changed:
            self._loads.close()
        self._loading.close()
        with self._changed:
            self._tiers.clear()

    # -- what is where -------------------------------------------------------------------------------------------

    def resident(self) -> list[str]:
        """Digests on the device, least recently used first."""
        with self._changed:
            return self._tiers.resident()

    def changes(self, since: int) -> ResidencyChange:
        """What came into memory and what left it after revision ``since``."""
        with self._changed:
            return self._tiers.changes(since)

    def held(self) -> list[HeldAdapter]:
        """Every adapter in memory."""
        with self._changed:
            return self._tiers.held()

    def capacity(self) -> Capacity:
        """How much of the memory is taken."""
        with self._changed:
            return self._tiers.capacity()

    def load(self) -> ReplicaLoad:
        """How busy loading and evicting has been of late; whose rows wait is not known here."""
        with self._changed:
            capacity, activity = self._tiers.capacity(), self._tiers.activity
        return ReplicaLoad(
            load_s=self.load_s,
            loading_fraction=activity.loading_fraction,
            evictions_s=activity.evictions_s,
            used_bytes=capacity.device_used,
            capacity_bytes=capacity.device_bytes,
        )
