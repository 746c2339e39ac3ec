"""Who holds device memory: leases and least-recently-used eviction under a byte budget. Pure bookkeeping, no torch.

A slot is one adapter's place on the device. While a lease is out its slot is neither evicted nor rewritten.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

MIX_SHARE = 0.5  # of the budget: anybody can make up any number of mixes, and shall not evict everybody's adapters


@dataclass
class _Slot:
    num_bytes: int
    is_mix: bool
    leases: int = 0


class SlotTable:
    """Slots by adapter digest, least recently used first. Not thread-safe: its owner holds a lock."""

    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self.mix_bytes = int(budget_bytes * MIX_SHARE)
        self.used_bytes = 0
        self._slots: OrderedDict[str, _Slot] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._slots

    def resident(self) -> list[str]:
        """Digests, least recently used first."""
        return list(self._slots)

    def room_for(self, num_bytes: int, *, is_mix: bool = False) -> list[str] | None:
        """Digests to evict so that ``num_bytes`` fit; None when leases hold too much just now.

        A mix evicts other mixes first, and all together have only their share.
        """
        victims = []
        free = self.budget_bytes - self.used_bytes
        free_for_mixes = self.mix_bytes - sum(slot.num_bytes for slot in self._slots.values() if slot.is_mix)
        slots = list(self._slots.items())
        if is_mix:
            slots.sort(key=lambda entry: not entry[1].is_mix)  # else in order of last use, still
        for digest, slot in slots:
            over_share = is_mix and free_for_mixes < num_bytes
            if free >= num_bytes and not over_share:
                break
            if slot.leases == 0 and (slot.is_mix or not over_share):
                victims.append(digest)
                free += slot.num_bytes
                free_for_mixes += slot.num_bytes * slot.is_mix
        fits = free >= num_bytes and not (is_mix and free_for_mixes < num_bytes)
        return victims if fits else None

    def add(self, digest: str, num_bytes: int, *, is_mix: bool = False) -> None:
        """Take a slot; the caller has made room."""
        assert digest not in self._slots and self.used_bytes + num_bytes <= self.budget_bytes
        self._slots[digest] = _Slot(num_bytes, is_mix)
        self.used_bytes += num_bytes

    def remove(self, digest: str) -> None:
        """Give a slot up; nobody may hold a lease on it."""
        slot = self._slots.pop(digest)
        assert slot.leases == 0
        self.used_bytes -= slot.num_bytes

    def lease(self, digest: str) -> None:
        """Hold a resident slot and make it the most recently used."""
        self._slots[digest].leases += 1
        self._slots.move_to_end(digest)

    def release(self, digest: str) -> None:
        """Give one lease back."""
        slot = self._slots[digest]
        assert slot.leases > 0
        slot.leases -= 1

    def leased(self, digest: str) -> bool:
        """Whether anybody holds a lease on a slot."""
        return self._slots[digest].leases > 0

    def check_integrity(self) -> None:
        """Raise AssertionError unless the books balance."""
        assert self.used_bytes == sum(slot.num_bytes for slot in self._slots.values())
        assert 0 <= self.used_bytes <= self.budget_bytes
        assert all(slot.leases >= 0 for slot in self._slots.values())
