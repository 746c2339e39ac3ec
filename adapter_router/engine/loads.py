"""Adapters on their way to the device, and who waits for each: at most one load of a content at a time.

A thread that waits for an adapter holds no lease while it waits, and a lease is only held across a forward, so room
always comes free and waiting threads cannot block each other.
"""

from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future

from adapter_router.engine.loading import Arrival, Loading
from adapter_router.engine.resident import ResidentAdapter
from adapter_router.engine.tickets import Load, Ticket
from adapter_router.engine.tiers import Tiers
from adapter_router.errors import AdapterRejected, AdapterRouterError, AdapterUnavailable, InternalError
from adapter_router.metrics import EngineMetrics
from adapter_router.types import AdapterVersion, TaskKind

logger = logging.getLogger(__name__)

PATIENCE_S = 60.0  # for an adapter to come, and for room to come free
_SMOOTHING = 0.2  # weight of the newest load in the running mean


class Loads:
    """Loads by digest. ``changed`` is the lock of all that is in memory; it is told of whenever room comes free."""

    def __init__(
        self, fingerprint: str, loading: Loading, tiers: Tiers, changed: threading.Condition, metrics: EngineMetrics
    ) -> None:
        """``fingerprint``: the base's."""
        self.load_s = 0.05  # running mean; a guess until the first load
        self._fingerprint = fingerprint
        self._loading = loading
        self._tiers = tiers
        self._changed = changed
        self._metrics = metrics
        self._loads: dict[str, Load] = {}
        self._new: list[Load] = []
        self._tasks: dict[str, TaskKind] = {}
        self._closed = False

    # -- called with the lock --------------------------------------------------------------------------------------

    def ticket(self, version: AdapterVersion) -> Ticket:
        """Lease the adapter, if it is in memory and fits just now; otherwise wait for the load it takes."""
        ticket = Ticket(version)
        try:
            self._check_version(version)
            resident = self._tiers.lease(version.digest)
            if resident is not None:
                ticket.set_result(resident)
            else:
                self._wait_for_load(ticket)
        except AdapterRouterError as error:
            ticket.set_exception(error)
        except Exception as error:
            logger.exception("adapter %s cannot be brought to the device", version.digest)
            ticket.set_exception(InternalError(f"the adapter cannot be brought to the device: {type(error).__name__}"))
        return ticket

    def take_new(self) -> list[Load]:
        """What must be started once the lock is free: that looks at disks, and waits for threads to begin."""
        new, self._new = self._new, []
        return new

    def withdraw(self, ticket: Ticket) -> None:
        """Nobody waits for ``ticket``, which is not done, any more."""
        load = self._loads.get(ticket.version.digest)
        if load is not None and ticket in load.tickets:
            load.tickets.remove(ticket)

    def forget_task(self, digest: str) -> None:
        """The adapter's files may serve another task from now on."""
        self._tasks.pop(digest, None)

    def close(self) -> None:
        """Tell all who wait that nothing comes any more, and install nothing from now on."""
        self._closed = True
        for load in self._loads.values():
            load.fail(AdapterUnavailable("the engine is closing"))
        self._changed.notify_all()

    # -- called without it -----------------------------------------------------------------------------------------

    def start(self, load: Load) -> None:
        """What keeps a load from being started, and whatever else goes wrong, is told to those who wait for it."""
        waiting = load.waiting
        future: Future[None]
        try:
            if waiting is not None:
                future = self._loading.again(lambda: self._install(waiting, load))
            else:
                future = self._loading.load(load.version, lambda arrival: self._finish(arrival, load))
        except Exception as error:
            future = Future()
            future.set_exception(error)
        future.add_done_callback(lambda done: self._ended(load, done))

    def admitted(self, arrival: Arrival, *, keep: bool) -> None:
        """Put an adapter that was checked on the device if ``keep``, else in host memory where that is free."""
        self._arrived(arrival)
        adapter = arrival.adapter
        if keep:
            self._install(adapter)
            return
        with self._changed:
            self._claim(adapter)
            self._tiers.keep(adapter, into_free_room=True)

    def _finish(self, arrival: Arrival, load: Load) -> None:
        self._arrived(arrival)
        self._install(arrival.adapter, load)

    def _arrived(self, arrival: Arrival) -> None:
        adapter = arrival.adapter
        with self._changed:
            if not adapter.parts:
                self.load_s += _SMOOTHING * (arrival.seconds - self.load_s)
            self._tiers.popularity.loaded(adapter.digest, adapter.num_bytes, arrival.seconds)
        self._metrics.loaded(arrival.seconds)

    def _install(self, adapter: ResidentAdapter, load: Load | None = None) -> None:
        """Put ``adapter`` on the device, waiting for room while anybody waits for it.

        Without a ``load`` somebody does who has no ticket. Raises AdapterUnavailable when no room comes free.
        """
        deadline = time.monotonic() + PATIENCE_S
        with self._changed:
            self._claim(adapter)
            while not self._tiers.install(adapter):
                self._tiers.keep(adapter)
                if load is not None and not load.tickets:
                    break
                self._check_room(adapter)
                if not self._changed.wait(max(0.0, deadline - time.monotonic())):
                    raise AdapterUnavailable(
                        f"no room came free on the device within {PATIENCE_S:.0f} s: all is in use"
                    )
                self._claim(adapter)
            if load is None:
                return
            for ticket in load.tickets:
                resident = self._tiers.lease(adapter.digest)
                assert resident is not None
                ticket.set_result(resident)
            load.tickets.clear()
            self._forget(load)  # at once: who comes from now on must not wait for it

    def _ended(self, load: Load, future: Future[None]) -> None:
        with self._changed:
            self._forget(load)
            error = AdapterUnavailable("the engine is closing") if future.cancelled() else future.exception()
            if error is None:
                return
            if not isinstance(error, AdapterRouterError):
                logger.error("installing adapter %s failed", load.version.digest, exc_info=error)
                error = InternalError(f"installing the adapter failed: {type(error).__name__}")
            others = [] if self._closed else load.take_others()
            load.fail(error)
            for ticket in others:  # it may have been this name's fault, or this source's
                try:
                    self._wait_for_load(ticket)
                except AdapterRouterError as refused:
                    ticket.set_exception(refused)
            new = self.take_new()
        for other in new:
            self.start(other)

    # -- with the lock again -----------------------------------------------------------------------------------------

    def _check_version(self, version: AdapterVersion) -> None:
        """What is in memory is told by its digest alone, so that the rest of a version must be right for it."""
        if version.base and version.base != self._fingerprint:
            raise AdapterRejected.because(
                [f"{version.adapter} belongs to the base {version.base:.80}, this one is {self._fingerprint}"]
            )
        if not version.parts:  # a mix's digest has its task
            self._check_task(version.digest, version.task)

    def _check_task(self, digest: str, task: TaskKind) -> None:
        load = self._loads.get(digest)
        known = self._tasks.get(digest, load.version.task if load is not None else task)
        if known != task:
            raise AdapterRejected.because(
                [
                    f"the same files already serve {known} under another name; give these an adapter_router.json with "
                    f'{{"task": "{task}"}}'
                ]
            )

    def _claim(self, adapter: ResidentAdapter) -> None:
        """From now on the digest stands for the adapter's task. Raises AdapterRejected where it does for another."""
        if self._closed:
            raise AdapterUnavailable("the engine is closing")
        if not adapter.parts:
            self._check_task(adapter.digest, adapter.task)
            self._tasks[adapter.digest] = adapter.task

    def _check_room(self, adapter: ResidentAdapter) -> None:
        if not self._tiers.slots.can_ever_fit(adapter.num_bytes, is_mix=bool(adapter.parts)):
            pinned = self._tiers.slots.pinned_bytes
            raise AdapterUnavailable(
                f"it needs {adapter.num_bytes} bytes on the device, where pinned adapters hold {pinned} of "
                f"{self._tiers.slots.budget_bytes}"
            )

    def _wait_for_load(self, ticket: Ticket) -> None:
        """Join the load that is under way, or a new one. Raises what that would only find again."""
        version = ticket.version
        load = self._loads.get(version.digest)
        if load is None:
            waiting = self._tiers.host.get(version.digest)
            if waiting is None:
                self._loading.check(version)
            load = self._loads[version.digest] = Load(version, waiting)
            self._new.append(load)
        elif time.monotonic() - load.since > PATIENCE_S:
            raise AdapterUnavailable(f"{version.adapter} has been loading for over {PATIENCE_S:.0f} s; try again later")
        load.tickets.append(ticket)

    def _forget(self, load: Load) -> None:
        if self._loads.get(load.version.digest) is load:
            del self._loads[load.version.digest]
