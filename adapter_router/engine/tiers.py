"""The device and the host tier behind it: what is where, who comes up, who goes down. Bookkeeping for one lock's owner.

An adapter is in one of the two. It comes up when rows ask for it and goes down when others are worth more; the host
tier lets go of what is worth least. The change log tells of what came to either, or left both.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from adapter_router.engine.activity import Activity
from adapter_router.engine.change_log import ChangeLog
from adapter_router.engine.eviction import Popularity
from adapter_router.engine.host_tier import HostTier
from adapter_router.engine.resident import ResidentAdapter
from adapter_router.engine.slots import PINNED_SHARE, SlotTable
from adapter_router.engine.transfer import Transfer
from adapter_router.errors import InvalidRequest
from adapter_router.metrics import EngineMetrics
from adapter_router.types import Capacity, HeldAdapter, ResidencyChange

logger = logging.getLogger(__name__)


class Tiers:
    """Adapters in memory, by digest. Not thread-safe."""

    def __init__(
        self,
        device_bytes: int,
        host_bytes: int,
        transfer: Transfer,
        metrics: EngineMetrics,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.activity = Activity(clock)
        self.popularity = Popularity()
        self.slots = SlotTable(device_bytes, self.popularity.worth)
        self.host = HostTier(host_bytes, self.popularity.worth)
        self._transfer = transfer
        self._metrics = metrics
        self._clock = clock
        self._device: dict[str, ResidentAdapter] = {}
        self._dropped: set[str] = set()  # on the device until their last lease comes back
        self._last_used: dict[str, float] = {}
        self._log = ChangeLog()

    def __contains__(self, digest: str) -> bool:
        return digest in self._device or digest in self.host

    def on_device(self, digest: str) -> bool:
        """Whether an adapter needs no room to be made for it."""
        return digest in self._device and digest not in self._dropped

    def lease(self, digest: str) -> ResidentAdapter | None:
        """Hold an adapter on the device, bringing it up if room can be made at once; None if it is not to be had."""
        waiting = self.host.get(digest)
        if waiting is not None:
            self.install(waiting)
        if not self.on_device(digest):
            return None
        self.slots.lease(digest)
        self._last_used[digest] = self._clock()
        return self._device[digest]

    def release(self, digest: str) -> None:
        """Give one lease back."""
        self.slots.release(digest)
        self._last_used[digest] = self._clock()
        if digest in self._dropped and not self.slots.leases(digest):
            self._forget(digest)
            self._measure()

    def install(self, adapter: ResidentAdapter) -> bool:
        """Put ``adapter``, which is in host memory, on the device; False when leases hold too much just now.

        Raises what the device does: then the adapter is in neither tier.
        """
        digest, is_mix = adapter.digest, bool(adapter.parts)
        if digest in self._device:
            return digest not in self._dropped
        adapter = self.host.get(digest) or adapter
        victims = self.slots.room_for(adapter.num_bytes, is_mix=is_mix)
        if victims is None:
            return False
        known = self.host.take(digest) is not None
        try:
            for victim in victims:
                self._demote(victim)
            moved = self._transfer.to_device(adapter)
        except BaseException:
            self._gone([digest] if known else [])
            self._measure()
            raise
        self._device[digest] = moved
        self.slots.add(digest, adapter.num_bytes, is_mix=is_mix)
        if not known:
            self._log.note(digest)
        self._last_used.setdefault(digest, self._clock())
        self.popularity.sized(len(self._device))
        self._metrics.promotions.inc(known)
        self._measure()
        return True

    def keep(self, adapter: ResidentAdapter, *, into_free_room: bool = False) -> None:
        """Take ``adapter`` into the host tier, if it is worth it."""
        if adapter.digest in self:
            return
        gone = self.host.offer(adapter, into_free_room=into_free_room)
        if adapter.digest in self.host:  # what was never there is no news, however often it is offered
            self._log.note(adapter.digest)
            self._last_used[adapter.digest] = self._clock()
            self._gone(gone)
            self._measure()

    def drop(self, digest: str) -> None:
        """Free an adapter's memory, and that of mixes with it; what is in use goes with its last lease."""
        mixes = [known for known, adapter in self._device.items() if digest in adapter.parts]
        for known in (digest, *mixes, *self.host.with_part(digest)):
            self._let_go(known)
        self._measure()

    def pin(self, digest: str) -> None:
        """Never evict an adapter that is leased just now. Raises InvalidRequest when pins have their share already."""
        if not self.slots.pin(digest):
            share = int(self.slots.budget_bytes * PINNED_SHARE)
            raise InvalidRequest(
                f"pinned adapters hold {self.slots.pinned_bytes} of the {share} bytes they may hold "
                f"({PINNED_SHARE:.0%} of adapter_memory_bytes): unpin another"
            )
        self._measure()

    def unpin(self, digest: str) -> None:
        """Let an adapter be evicted again."""
        self.slots.unpin(digest)
        self._measure()

    def unfit(self, num_bytes: int, is_mix: bool) -> Sequence[str]:
        """Why an adapter, or a mix, of so many bytes can never be on the device."""
        if is_mix and num_bytes > self.slots.mix_bytes:
            return [
                f"the mixed adapters need {num_bytes} bytes on the device, mixes have {self.slots.mix_bytes} of "
                "adapter_memory_bytes; merge them beforehand with adapter-router merge"
            ]
        if num_bytes > self.slots.budget_bytes:
            return [f"it needs {num_bytes} bytes on the device, adapter_memory_bytes is {self.slots.budget_bytes}"]
        return []

    def resident(self) -> list[str]:
        """Digests on the device, least recently used first."""
        return self.slots.resident()

    def changes(self, since: int) -> ResidencyChange:
        """What came and went after revision ``since``; what is in host memory counts as there."""
        return self._log.since(since, self.__contains__, lambda: [*self._device, *self.host.digests()])

    def held(self) -> list[HeldAdapter]:
        """Every adapter in memory."""
        now = self._clock()
        device = [
            HeldAdapter(
                digest,
                "device",
                adapter.num_bytes,
                self.slots.is_pinned(digest),
                self.slots.leases(digest),
                now - self._last_used[digest],
            )
            for digest, adapter in self._device.items()
        ]
        host = [(digest, self.host.get(digest)) for digest in self.host.digests()]
        return device + [
            HeldAdapter(digest, "host", adapter.num_bytes, False, 0, now - self._last_used[digest])
            for digest, adapter in host
            if adapter is not None
        ]

    def capacity(self) -> Capacity:
        """How much of the memory is taken."""
        return Capacity(
            device_bytes=self.slots.budget_bytes,
            device_used=self.slots.used_bytes,
            host_bytes=self.host.slots.budget_bytes,
            host_used=self.host.slots.used_bytes,
            pinned=self.slots.pinned_bytes,
        )

    def clear(self) -> None:
        """Free everything; what is in use goes with its last lease."""
        for digest in [*self._device, *self.host.digests()]:
            self._let_go(digest)
        self._measure()

    def check_integrity(self) -> None:
        """Raise AssertionError unless the books of both tiers agree."""
        self.slots.check_integrity()
        self.host.slots.check_integrity()
        assert set(self.slots.resident()) == set(self._device)
        assert set(self.host.slots.resident()) == set(self.host.digests())
        assert not set(self._device) & set(self.host.digests())
        assert all(self.slots.leases(digest) for digest in self._dropped)
        assert set(self._last_used) == {*self._device, *self.host.digests()}

    def _let_go(self, digest: str) -> None:
        if digest not in self._device:
            if self.host.take(digest) is not None:
                self._gone([digest])
        elif self.slots.leases(digest):
            self._dropped.add(digest)
        else:
            self._forget(digest)

    def _forget(self, digest: str) -> None:
        del self._device[digest]
        self._dropped.discard(digest)
        self.slots.remove(digest)
        self._gone([digest])

    def _demote(self, digest: str) -> None:
        """Down to host memory, if it is worth its room there, or out."""
        self.slots.remove(digest)
        adapter = self._device.pop(digest)
        self._metrics.evictions.inc()
        self.activity.evicted()
        try:
            gone = self.host.offer(adapter, self._transfer.to_host)
        except RuntimeError:  # of CUDA, which has no host memory to give: whoever needs the room gets it all the same
            logger.warning("adapter %s cannot be kept in host memory", digest, exc_info=True)
            gone = [digest]
        self._gone(gone)

    def _gone(self, digests: Sequence[str]) -> None:
        for digest in digests:
            self._log.note(digest)
            self._last_used.pop(digest, None)

    def _measure(self) -> None:
        self._metrics.resident(self.slots.used_bytes, len(self._device), self.slots.pinned_bytes)
        self._metrics.host(self.host.slots.used_bytes, len(self.host.slots))
