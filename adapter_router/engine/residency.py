"""Adapters for forwards: leased where they are in memory, loaded where they are not. One lock, held for bookkeeping.

The forward thread never loads. A thread that waits for an adapter holds no lease while it waits, and a lease is only
held across a forward, so room always comes free and waiting threads cannot block each other.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping
from concurrent.futures import FIRST_COMPLETED, CancelledError, Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass, field
from typing import Any

from adapter_router.adapters.validate import Request
from adapter_router.catalog.store import StoredAdapter
from adapter_router.config import EngineConfig
from adapter_router.engine.base_model import BaseModel
from adapter_router.engine.loading import Arrival, Loading
from adapter_router.engine.reading import Loaded, Obtain
from adapter_router.engine.resident import ResidentAdapter
from adapter_router.engine.tiers import Tiers
from adapter_router.engine.transfer import Transfer
from adapter_router.errors import AdapterRejected, AdapterRouterError, AdapterUnavailable, InternalError
from adapter_router.metrics import EngineMetrics
from adapter_router.types import AdapterVersion, Capacity, HeldAdapter, ResidencyChange, TaskKind

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0  # for an adapter to come, and for room to come free
_SMOOTHING = 0.2  # weight of the newest load in the running mean

Ticket = Future[ResidentAdapter]
"""One thread's wish for an adapter: done once it is on the device and leased for that thread, or with what failed."""


@dataclass(eq=False)
class _Load:
    """An adapter on its way, and who waits for it."""

    since: float = field(default_factory=time.monotonic)
    tickets: list[Ticket] = field(default_factory=list)

    def fail(self, error: AdapterRouterError) -> None:
        """Tell everybody who waits."""
        for ticket in self.tickets:
            ticket.set_exception(error)
        self.tickets.clear()


class Residency:
    """Adapters by digest. Thread-safe."""

    def __init__(self, base: BaseModel, config: EngineConfig, obtain: Obtain, metrics: EngineMetrics) -> None:
        self.load_s = 0.05  # running mean; a guess until the first load
        self._fingerprint = base.fingerprint
        self._metrics = metrics
        self._tiers = Tiers(config.adapter_memory_bytes, config.host_memory_bytes, Transfer(base.device), metrics)
        self._loading = Loading(base, obtain, config.loader_threads, self._tiers.unfit, metrics)
        self._loads: dict[str, _Load] = {}
        self._tasks: dict[str, TaskKind] = {}
        self._changed = threading.Condition()
        self._closed = False

    # -- rows ----------------------------------------------------------------------------------------------------

    def request(self, versions: Mapping[str, AdapterVersion], rows: Mapping[str, int]) -> dict[str, Ticket]:
        """Ask for adapters, by digest; ``rows`` that want each. Those in memory are leased at once, if they fit."""
        with self._changed:
            for digest, count in rows.items():
                self._tiers.popularity.used(digest, count)
            # Those on the device first: room for the others must not be made at their cost.
            order = sorted(versions, key=lambda digest: not self._tiers.on_device(digest))
            return {digest: self._ticket(versions[digest]) for digest in order}

    def collect(
        self, tickets: dict[str, Ticket], deadline: float | None = None
    ) -> dict[str, ResidentAdapter | AdapterRouterError]:
        """Take those of ``tickets`` that are done out of it.

        ``deadline``: wait for one until then (``time.monotonic``), when all that is left is given up.
        """
        if deadline is not None:
            wait_for(tickets.values(), max(0.0, deadline - time.monotonic()), FIRST_COMPLETED)
        done = [digest for digest, ticket in tickets.items() if ticket.done()]
        found = {digest: _outcome(tickets.pop(digest)) for digest in done}
        if deadline is not None and not found:
            late = AdapterUnavailable(f"the adapter could not be loaded within {PATIENCE_S:.0f} s; try again later")
            found = dict.fromkeys(tickets, late)
            self.withdraw(tickets)
        return found

    def withdraw(self, tickets: dict[str, Ticket]) -> None:
        """Give up waiting, and give back what came in the meantime."""
        with self._changed:
            for digest, ticket in tickets.items():
                if not ticket.done():
                    load = self._loads.get(digest)
                    if load is not None and ticket in load.tickets:
                        load.tickets.remove(ticket)
                elif ticket.exception() is None:
                    self.release(digest)
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

        def finish(arrival: Arrival) -> None:
            self._arrived(arrival)
            if keep:
                self._install(_Load(), arrival.adapter, needed=True)
            else:
                with self._changed:
                    self._tiers.keep(arrival.adapter, into_free_room=True)

        try:
            return self._loading.admit(stored, request, finish).result()
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
            self._tasks.pop(digest, None)
            self._tiers.drop(digest)
            self._changed.notify_all()

    def close(self) -> None:
        """Stop loading and free all memory."""
        with self._changed:
            self._closed = True
            for load in self._loads.values():
                load.fail(AdapterUnavailable("the engine is closing"))
            self._changed.notify_all()
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

    # -- loads; the lock is held, unless said otherwise ------------------------------------------------------------

    def _ticket(self, version: AdapterVersion) -> Ticket:
        ticket: Ticket = Future()
        try:
            self._check_version(version)
            resident = self._tiers.lease(version.digest)
            if resident is not None:
                ticket.set_result(resident)
            else:
                self._load_for(version).tickets.append(ticket)
        except AdapterRouterError as error:
            ticket.set_exception(error)
        except Exception as error:
            logger.exception("adapter %s cannot be brought to the device", version.digest)
            ticket.set_exception(InternalError(f"the adapter cannot be brought to the device: {type(error).__name__}"))
        return ticket

    def _check_version(self, version: AdapterVersion) -> None:
        """What is in memory is told by its digest alone, so that the rest of a version must be right for it."""
        if version.base and version.base != self._fingerprint:
            raise AdapterRejected.because(
                [f"{version.adapter} belongs to the base {version.base:.80}, this one is {self._fingerprint}"]
            )
        if not version.parts:
            self._check_task(version.digest, version.task)

    def _check_task(self, digest: str, task: TaskKind) -> None:
        known = self._tasks.get(digest, task)
        if known != task:
            raise AdapterRejected.because(
                [
                    f"the same files already serve {known} under another name; give these an adapter_router.json with "
                    f'{{"task": "{task}"}}'
                ]
            )

    def _load_for(self, version: AdapterVersion) -> _Load:
        """The load that is under way, or a new one. Raises what a new one would only find again."""
        load = self._loads.get(version.digest)
        if load is not None:
            if time.monotonic() - load.since > PATIENCE_S:
                raise AdapterUnavailable(
                    f"{version.adapter} has been loading for over {PATIENCE_S:.0f} s; try again later"
                )
            return load
        load = _Load()
        waiting = self._tiers.host.get(version.digest)
        if waiting is not None:  # all it needs is room
            future = self._loading.again(lambda: self._install(load, waiting))
        else:
            future = self._loading.load(version, lambda arrival: self._finish(load, arrival))
        self._loads[version.digest] = load
        future.add_done_callback(lambda done: self._ended(version.digest, load, done))
        return load

    def _finish(self, load: _Load, arrival: Arrival) -> None:
        """Called without the lock."""
        self._arrived(arrival)
        self._install(load, arrival.adapter)

    def _arrived(self, arrival: Arrival) -> None:
        """Called without the lock."""
        adapter = arrival.adapter
        with self._changed:
            if not adapter.parts:  # a mix's digest has its task
                self._check_task(adapter.digest, adapter.task)
                self._tasks[adapter.digest] = adapter.task
                self.load_s += _SMOOTHING * (arrival.seconds - self.load_s)
            self._tiers.popularity.loaded(adapter.digest, adapter.num_bytes, arrival.seconds)
        self._metrics.loaded(arrival.seconds)

    def _install(self, load: _Load, adapter: ResidentAdapter, *, needed: bool = False) -> None:
        """Put ``adapter`` on the device, waiting for room while anybody waits for it. Called without the lock.

        ``needed``: somebody does, without a ticket. Raises AdapterUnavailable when no room comes free.
        """
        deadline = time.monotonic() + PATIENCE_S
        with self._changed:
            while not self._tiers.install(adapter):
                self._tiers.keep(adapter)
                if not (needed or load.tickets):
                    break
                self._check_room(adapter)
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise AdapterUnavailable(
                        f"no room came free on the device within {PATIENCE_S:.0f} s: all is in use"
                    )
            for ticket in load.tickets:
                resident = self._tiers.lease(adapter.digest)
                assert resident is not None
                ticket.set_result(resident)
            load.tickets.clear()
            self._forget(adapter.digest, load)  # at once: who comes from now on must not wait for it

    def _check_room(self, adapter: ResidentAdapter) -> None:
        if self._closed:
            raise AdapterUnavailable("the engine is closing")
        if not self._tiers.slots.can_ever_fit(adapter.num_bytes, is_mix=bool(adapter.parts)):
            pinned = self._tiers.slots.pinned_bytes
            raise AdapterUnavailable(
                f"it needs {adapter.num_bytes} bytes on the device, where pinned adapters hold {pinned} of "
                f"{self._tiers.slots.budget_bytes}"
            )

    def _ended(self, digest: str, load: _Load, future: Future[Any]) -> None:
        """Called without the lock."""
        with self._changed:
            self._forget(digest, load)
            error = AdapterUnavailable("the engine is closing") if future.cancelled() else future.exception()
            if error is not None and not isinstance(error, AdapterRouterError):
                logger.error("installing adapter %s failed", digest, exc_info=error)
                error = InternalError(f"installing the adapter failed: {type(error).__name__}")
            if error is not None:
                load.fail(error)

    def _forget(self, digest: str, load: _Load) -> None:
        if self._loads.get(digest) is load:
            del self._loads[digest]


def _outcome(ticket: Ticket) -> ResidentAdapter | AdapterRouterError:
    error = ticket.exception()
    if error is None:
        return ticket.result()
    assert isinstance(error, AdapterRouterError)
    return error
