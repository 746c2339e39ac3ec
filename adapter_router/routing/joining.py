"""What a new replica loads before it gets rows: the adapters that it will be asked for."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Awaitable, Callable

from adapter_router.metrics import RouterMetrics
from adapter_router.routing.affinity import copies_by_right
from adapter_router.routing.demand import Demand
from adapter_router.routing.fleet import Fleet
from adapter_router.routing.replica_state import ReplicaState
from adapter_router.types import AdapterVersion

logger = logging.getLogger(__name__)

Warm = Callable[[str, AdapterVersion], Awaitable[object]]
"""Have one replica load one adapter."""

_REMEMBERED = 20_000
_HOTTEST = 1000  # adapters that are looked at when a replica comes
_AT_ONCE = 4


class Joining:
    """Remembers what is asked for; has a new replica load what it is a home of, hottest first, as far as it has room.

    Otherwise its first rows would all wait for loads, while those who held their adapters so far still do.
    """

    def __init__(self, fleet: Fleet, demand: Demand, warm: Warm, metrics: RouterMetrics) -> None:
        self._fleet = fleet
        self._demand = demand
        self._warm = warm
        self._metrics = metrics
        self._versions: OrderedDict[str, AdapterVersion] = OrderedDict()

    def note(self, version: AdapterVersion) -> None:
        """It was asked for."""
        self._versions[version.digest] = version
        self._versions.move_to_end(version.digest)
        if len(self._versions) > _REMEMBERED:
            self._versions.popitem(last=False)

    def wanted(self, state: ReplicaState, now: float) -> list[AdapterVersion]:
        """What ``state`` is a home of, hottest first; no more than there is room for where that is known."""
        found, room = [], state.weight if state.weight > 1 else float("inf")
        for digest in self._demand.hottest(_HOTTEST, now):
            version = self._versions.get(digest)
            if version is None or version.num_bytes > room:
                continue
            if state in self._fleet.homes(
                digest, copies_by_right(self._demand.rate(digest, now) * self._fleet.routers, state.row_s)
            ):
                found.append(version)
                room -= version.num_bytes
        return found

    async def warm_up(self, state: ReplicaState, now: float, timeout_s: float) -> None:
        """Have ``state`` load what it is wanted for; what cannot be loaded in time or at all, rows will load."""
        turns = asyncio.Semaphore(_AT_ONCE)

        async def load(version: AdapterVersion) -> None:
            async with turns:
                try:
                    await self._warm(state.replica, version)
                    self._fleet.loaded(state.replica, version.digest)
                    self._metrics.warmed.inc()
                except Exception as error:
                    logger.warning("replica %s did not load %s: %r", state.replica, version.adapter, error)

        wanted = self.wanted(state, now)
        loads = [asyncio.ensure_future(load(version)) for version in wanted]
        if loads:
            _, late = await asyncio.wait(loads, timeout=timeout_s)
            for each in late:
                each.cancel()
