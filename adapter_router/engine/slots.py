"""Who holds the memory of one tier: leases, pins and eviction under a byte budget. Pure bookkeeping, no torch.

A slot is one adapter's place. While a lease is out its slot is neither evicted nor rewritten.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MIX_SHARE = 0.5  # of the budget: anybody can make up any number of mixes, and shall not evict everybody's adapters
PINNED_SHARE = 0.8  # of the budget: the others must make progress, too


@dataclass
class _Slot:
    num_bytes: int
    is_mix: bool
    leases: int = 0
    pinned: bool = False


class SlotTable:
    """Slots by adapter digest, least recently used first. Not thread-safe: its owner holds a lock."""

    def __init__(self, budget_bytes: int, worth: Callable[[str], float] | None = None) -> None:
        """``worth`` of a digest decides who is evicted: the smallest first, of equals the least recently used."""
        self.budget_bytes = budget_bytes
        self.mix_bytes = int(budget_bytes * MIX_SHARE)
        self.used_bytes = 0
        self.pinned_bytes = 0
        self._worth = worth
        self._mixes_use = 0
        self._slots: OrderedDict[str, _Slot] = OrderedDict()

    def __contains__(self, digest: str) -> bool:
        return digest in self._slots

    def __len__(self) -> int:
        return len(self._slots)

    def resident(self) -> list[str]:
        """Digests, least recently used first."""
        return list(self._slots)

    def room_for(self, num_bytes: int, *, is_mix: bool = False, below: float | None = None) -> list[str] | None:
        """Digests to evict so that ``num_bytes`` fit; None when leases and pins hold too much just now.

        A mix evicts other mixes first, and all together have only their share. ``below``: only what is worth less.
        """
        free = self.budget_bytes - self.used_bytes
        free_for_mixes = self.mix_bytes - self._mixes_use
        victims: list[str] = []
        for digest in self._candidates(is_mix, below) if free < num_bytes or is_mix else ():
            slot, over_share = self._slots[digest], is_mix and free_for_mixes < num_bytes
            if free >= num_bytes and not over_share:
                break
            if slot.is_mix or not over_share:
                victims.append(digest)
                free += slot.num_bytes
                free_for_mixes += slot.num_bytes * slot.is_mix
        fits = free >= num_bytes and not (is_mix and free_for_mixes < num_bytes)
        return victims if fits else None

    def _candidates(self, is_mix: bool, below: float | None) -> list[str]:
        """What may be evicted, in the order in which it should be.

        Names alone: thousands of tuples would bring in the garbage collector, for the whole process, under a lock.
        """
        idle = [digest for digest, slot in self._slots.items() if not (slot.leases or slot.pinned)]
        if self._worth is not None:
            idle.sort(key=self._worth)
            if below is not None:
                del idle[bisect_left(idle, below, key=self._worth) :]
        if is_mix:
            idle.sort(key=lambda digest: not self._slots[digest].is_mix)
        return idle

    def can_ever_fit(self, num_bytes: int, *, is_mix: bool = False) -> bool:
        """Whether there would be room if no lease were out."""
        pinned = [slot for slot in self._slots.values() if slot.pinned]
        mixes = sum(slot.num_bytes for slot in pinned if slot.is_mix)
        return num_bytes <= self.budget_bytes - self.pinned_bytes and not (
            is_mix and num_bytes > self.mix_bytes - mixes
        )

    def add(self, digest: str, num_bytes: int, *, is_mix: bool = False) -> None:
        """Take a slot; the caller has made room."""
        assert digest not in self._slots and self.used_bytes + num_bytes <= self.budget_bytes
        self._slots[digest] = _Slot(num_bytes, is_mix)
        self.used_bytes += num_bytes
        self._mixes_use += num_bytes * is_mix

    def remove(self, digest: str) -> None:
        """Give a slot up; nobody may hold a lease on it."""
        self.unpin(digest)
        slot = self._slots.pop(digest)
        assert slot.leases == 0
        self.used_bytes -= slot.num_bytes
        self._mixes_use -= slot.num_bytes * slot.is_mix

    def lease(self, digest: str) -> None:
        """Hold a resident slot and make it the most recently used."""
        self._slots[digest].leases += 1
        self._slots.move_to_end(digest)

    def release(self, digest: str) -> None:
        """Give one lease back."""
        slot = self._slots[digest]
        assert slot.leases > 0
        slot.leases -= 1

    def leases(self, digest: str) -> int:
        """How many leases are out on a slot."""
        return self._slots[digest].leases

    def pin(self, digest: str) -> bool:
        """Keep a resident slot until it is unpinned; False where the pinned ones have their share already."""
        slot = self._slots[digest]
        if not slot.pinned:
            if self.pinned_bytes + slot.num_bytes > self.budget_bytes * PINNED_SHARE:
                return False
            slot.pinned = True
            self.pinned_bytes += slot.num_bytes
        return True

    def unpin(self, digest: str) -> None:
        """Let a slot be evicted again; one that is not there, or not pinned, stays so."""
        slot = self._slots.get(digest)
        if slot is not None and slot.pinned:
            slot.pinned = False
            self.pinned_bytes -= slot.num_bytes

    def is_pinned(self, digest: str) -> bool:
        """Whether a slot is kept whatever comes."""
        return self._slots[digest].pinned

    def check_integrity(self) -> None:
        """Raise AssertionError unless the books balance."""
        slots = self._slots.values()
        assert self.used_bytes == sum(slot.num_bytes for slot in slots)
        assert 0 <= self.used_bytes <= self.budget_bytes
        assert self._mixes_use == sum(slot.num_bytes for slot in slots if slot.is_mix) <= self.mix_bytes
        assert self.pinned_bytes == sum(slot.num_bytes for slot in slots if slot.pinned)
        assert self.pinned_bytes <= self.budget_bytes * PINNED_SHARE
        assert all(slot.leases >= 0 for slot in slots)
